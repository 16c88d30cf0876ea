"""What the cells of 06_data do not reach: every malformed file, random captions, worker processes."""

import bz2
import csv
import gzip
import io
import json
import pickle
import random
import re
import time
from collections import Counter

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from pvtblip import data
from pvtblip.data import (
    CaptionDataset,
    Record,
    Row,
    clean_captions,
    find_fields,
    object_rows,
    read_captions,
    similar_files,
    split_by_name,
)
from pvtblip.pvt_encoder import BrokenImage
from pvtblip.training import Collate, SeededBatchSampler
from pvtblip.pvt_encoder import load_image
from pvtblip.tokenizer import CaptionTokenizer, collapse_whitespace

# ---------------------------------------------------------------- writers of the five formats


def write_json(rows):
    return json.dumps({file: list(captions) for file, captions in rows}, indent=1, ensure_ascii=False)


def write_lines(rows):
    return ''.join(json.dumps(dict(image=file, caption=list(captions))) + '\n' for file, captions in rows)


def write_list(rows):
    return (
        '['
        + ',\n'.join(
            json.dumps(dict(filename=file, text=caption)) for file, captions in rows for caption in captions
        )
        + ']'
    )


def write_token(rows):
    return ''.join(
        f'{file}#{i}\t{caption}\n' for file, captions in rows for i, caption in enumerate(captions)
    )


def write_comma(rows):
    out = io.StringIO(newline='')
    writer = csv.writer(out, lineterminator='\n')
    writer.writerow(('image', 'caption'))
    writer.writerows((file, caption) for file, captions in rows for caption in captions)
    return out.getvalue()


def write_bar(rows):
    lines = [f'{file}| {i}| {caption}\n' for file, captions in rows for i, caption in enumerate(captions)]
    return 'image_name| comment_number| comment\n' + ''.join(lines)


WRITERS = dict(
    json=write_json, lines=write_lines, list=write_list, token=write_token, comma=write_comma, bar=write_bar
)
words = st.text(st.characters(exclude_categories=['Cs']), min_size=1, max_size=40)
quotes = st.text(st.sampled_from('"\',|#\t 0a\u2028\r'), min_size=1, max_size=12)
one_caption = st.one_of(words, quotes, st.just('"Go", says, a "sign"'), st.just('x#3\ty| 2| z')).filter(
    # lists in a cell and special tokens are other tests' business
    lambda text: (collapse_whitespace(text) or '[')[0] not in '[(' and not re.search(r'\[[A-Z]+\]|<', text)
)
names = st.text(st.sampled_from('abcXYZ019_-. é漢'), min_size=1, max_size=12).map(
    lambda name: f'p{name.strip()}.jpg'
)
folders = st.dictionaries(names, st.lists(one_caption, min_size=1, max_size=6), min_size=1, max_size=5)


@pytest.mark.parametrize('form', WRITERS)
@given(rows=folders, bom=st.booleans(), windows=st.booleans())
@settings(max_examples=60, deadline=None)
def test_random_captions_come_back_from_each_format(tmp_path_factory, form, rows, bom, windows):
    in_a_line = {
        file: [c if form in ('json', 'lines', 'list') else re.sub('[\r\n]', ' ', c) for c in captions]
        for file, captions in rows.items()
    }
    text = WRITERS[form](in_a_line.items())
    path = tmp_path_factory.mktemp('captions') / 'anything.dat'  # the name says nothing about the format
    path.write_bytes(('\ufeff' * bom + (text.replace('\n', '\r\n') if windows else text)).encode())
    records = read_captions(path)
    assert [(r.file, r.captions) for r in records] == [
        (f, tuple(map(collapse_whitespace, c))) for f, c in rows.items()
    ]


@pytest.mark.parametrize('form', WRITERS)
def test_line_is_where_the_photo_is_first_named(tmp_path, form):
    text = WRITERS[form]([('a.jpg', ['one', 'two']), ('b.jpg', ['three'])])
    (tmp_path / 'c').write_text(text)
    for record in read_captions(tmp_path / 'c'):
        assert record.file in text.split('\n')[record.line - 1]
        assert not any(record.file in line for line in text.split('\n')[: record.line - 1])


def test_json_lines_count_every_line_break_and_no_other(tmp_path):
    path = tmp_path / 'c.json'
    path.write_text(
        '\n{ "a.jpg"\n:\n["x\u2028y",\n"z"]\n\n,\n "b.jpg": ["{\\"c.jpg\\": []}"] }', encoding='utf-8'
    )
    assert read_captions(path) == [Record('a.jpg', ('x y', 'z'), 2), Record('b.jpg', ('{"c.jpg": []}',), 8)]


def write_coco(records, indent=None):
    "COCO's captions_*.json: photos and captions in two lists, joined by number"
    images = [dict(id=r.image_id, file_name=r.file, height=9, width=9) for r in records]
    annotations = [
        dict(image_id=r.image_id, id=1000 + i, caption=c)
        for i, (r, c) in enumerate((r, c) for r in records for c in r.captions)
    ]
    random.Random(0).shuffle(annotations)  # COCO's own are in no order
    return json.dumps(dict(info={}, licenses=[], images=images, annotations=annotations), indent=indent)


def test_coco_joins_captions_to_photos_by_number(tmp_path):
    written = [Record(f'{i:012}.jpg', (f'caption {i}',) * (1 + i % 3), 1, None, i * 7) for i in range(1, 9)]
    (tmp_path / 'c').write_text(write_coco(written))
    assert read_captions(tmp_path / 'c') == written
    (tmp_path / 'c').write_text(text := write_coco(written, indent=1))
    for record in read_captions(tmp_path / 'c'):  # the line is that of the photo's entry
        assert (
            text.split('\n')[record.line - 1 : record.line + 2][0].strip() == '{'
            and record.file in text.split('\n')[record.line + 1]
        )


def test_karpathy_states_folders_splits_and_numbers(tmp_path):
    images = [
        dict(
            filepath='val2014',
            filename='a.jpg',
            cocoid=7,
            imgid=0,
            split='train',
            sentences=[dict(raw='One.', tokens=['one']), dict(raw='Two.', tokens=['two'])],
        ),
        dict(
            filepath='train2014',
            filename='a.jpg',
            cocoid=8,
            imgid=1,
            split='restval',
            sentences=[dict(raw='Three.', tokens=['three'])],
        ),
        dict(filename='b.jpg', imgid=2, split='test', sentences=[dict(raw='Four.', tokens=['four'])]),
    ]
    path = tmp_path / 'c'
    path.write_text(json.dumps(dict(images=images, dataset='coco')))
    one, two, three = read_captions(path)
    assert one == Record('val2014/a.jpg', ('One.', 'Two.'), 1, 'train', 7)
    assert (two.file, two.image_id, three.file, three.image_id) == ('train2014/a.jpg', 8, 'b.jpg', 2)
    assert read_captions(path, split='train+restval') == [one, two] and read_captions(path, split='test') == [
        three
    ]
    with pytest.raises(ValueError, match=r"no split 'val'; .*'train' \(1 photos\), 'restval' \(1 photos\)"):
        read_captions(path, split='val')


@pytest.mark.parametrize('file', ['file', 'file_name', 'filename', 'image', 'image_path', 'Image'])
@pytest.mark.parametrize('text', ['caption', 'captions', 'text'])
@pytest.mark.parametrize('as_list', [False, True])
def test_json_lines_and_lists_with_the_names_that_people_use(tmp_path, file, text, as_list):
    entries = [
        {file: 'a.jpg', text: ['one', 'two']},
        {file: 'b/a.jpg', text: 'three', 'id': 5},
        {file: 'a.jpg', text: 'four'},
    ]
    path = tmp_path / 'c'
    path.write_text(json.dumps(entries, indent=0) if as_list else '\n\n'.join(map(json.dumps, entries)))
    assert [(r.file, r.captions) for r in read_captions(path)] == [
        ('a.jpg', ('one', 'two', 'four')),
        ('b/a.jpg', ('three',)),
    ]
    if not as_list:
        assert [r.line for r in read_captions(path)] == [1, 3]


def test_tables_with_named_columns(tmp_path):
    path = tmp_path / 'c'
    path.write_bytes(
        (
            '\ufefffilename;Split; TEXT ;image_id\r\n\r\na.jpg;train;"one;\r\ntwo";7\r\nsub/a.jpg;;3" '
            'of rain;\r\n'
            '"b;c.jpg";val;"say ""hi""";x9\r\na.jpg;train;four;7'
        ).encode()
    )
    assert read_captions(path) == [
        Record('a.jpg', ('one; two', 'four'), 3, 'train', '7'),
        Record('sub/a.jpg', ('3" of rain',), 5),
        Record('b;c.jpg', ('say "hi"',), 6, 'val', 'x9'),
    ]
    path.write_text('image,caption_0,caption_1,caption_2\na.jpg,one,,two\nb.jpg,three,,\n')
    assert [r.captions for r in read_captions(path)] == [('one', 'two'), ('three',)]
    path.write_text('what,where\none,a.jpg\n')
    assert read_captions(path, columns=dict(file='where', caption='what')) == [Record('a.jpg', ('one',), 2)]


one_line = st.text(st.sampled_from('abc 019_-.é'), max_size=8)
cells = st.one_of(
    one_caption,
    st.text(st.sampled_from('"\n\r,;|\t ab'), min_size=1, max_size=14).filter(collapse_whitespace),
)


@given(
    rows=st.lists(st.tuples(names, cells, one_line), min_size=1, max_size=6),
    delimiter=st.sampled_from(',;\t|'),
    order=st.permutations(['file', 'text', 'note']),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    end=st.sampled_from(['\n', '\r\n']),
    bom=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_what_the_csv_module_writes_comes_back(tmp_path_factory, rows, delimiter, order, quoting, end, bom):
    # the csv module writes a bare \r without quotes
    rows = [(file, text.replace('\r', '\r\n'), note) for file, text, note in rows]
    out = io.StringIO(newline='')
    lines = []  # where each row begins
    writer = csv.DictWriter(out, order, delimiter=delimiter, quoting=quoting, lineterminator=end)
    writer.writeheader()
    for file, text, note in rows:
        lines.append(out.getvalue().count('\n') + 1)
        writer.writerow(dict(file=file, text=text, note=note))
    path = tmp_path_factory.mktemp('captions') / 'c'
    path.write_bytes(('\ufeff' * bom + out.getvalue()).encode())
    wanted, first = {}, {}
    for (file, text, _), line in zip(rows, lines):
        wanted.setdefault(file, []).append(collapse_whitespace(text))
        first.setdefault(file, line)
    assert read_captions(path) == [
        Record(file, tuple(captions), first[file]) for file, captions in wanted.items()
    ]


def test_a_caption_of_a_thousand_words(tmp_path):
    long = ' '.join(f'word{i}' for i in range(1_100))  # 9,800 characters; more than 10,000 are refused
    for form in WRITERS:
        (tmp_path / 'c').write_text(WRITERS[form]([('a.jpg', [long, long.replace('7', ','), 'short'])]))
        assert read_captions(tmp_path / 'c')[0].captions == (long, long.replace('7', ','), 'short')


def test_a_photo_that_is_only_in_sub_folders_is_named_with_them(tmp_path):
    for folder in ('x', 'y/z'):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / 'a.jpg').touch()
    (tmp_path / 'x' / 'loop').symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / 'c').write_text('image,caption\nx/a.jpg,one\ny/z/a.jpg,two\n')
    assert [record.file for record in read_captions(tmp_path / 'c', tmp_path)] == [
        'x/a.jpg',
        'y/z/a.jpg',
    ]  # two photos, not one
    (tmp_path / 'c').write_text('image,caption\na.jpg,one\n')
    with pytest.raises(
        FileNotFoundError,
        match=r"c:2: 'a.jpg' is not in .* it is in its sub-folders as 'x/a.jpg', 'y/z/a.jpg': write the "
        r'path below',
    ):
        read_captions(tmp_path / 'c', tmp_path)


def test_columns_name_fields_with_other_names(tmp_path):
    path = tmp_path / 'c'
    path.write_text('{"photo": "a.jpg", "says": "one", "file": 3, "part": "x"}')
    columns = dict(file='photo', caption='says', split='part')
    assert read_captions(path, columns=columns) == [Record('a.jpg', ('one',), 1, 'x')]
    with pytest.raises(ValueError, match="c:1: no field 'sais', which columns calls the caption"):
        read_captions(path, columns=columns | dict(caption='sais'))
    with pytest.raises(ValueError, match='columns has photo; it may hold file, caption, split, image_id'):
        read_captions(path, columns=dict(photo='file'))


def test_the_known_broken_line_of_flickr30k(tmp_path):
    path = tmp_path / 'results.csv'
    path.write_text(
        'image_name| comment_number| comment\n2199200615.jpg| 3| A dog .\n2199200615.jpg| 4   A dog '
        'runs across the grass .\n'
    )
    assert read_captions(path) == [Record('2199200615.jpg', ('A dog .', 'A dog runs across the grass .'), 2)]


def test_commas_without_quotes(tmp_path):
    path = tmp_path / 'captions.txt'
    path.write_text(
        'image,caption\na.jpg,A dog, a cat, and a hat\na.jpg,"Go" says a sign, loudly\n"b,c.jpg",x\n'
    )
    assert read_captions(path) == [
        Record('a.jpg', ('A dog, a cat, and a hat', '"Go" says a sign, loudly'), 2),
        Record('b,c.jpg', ('x',), 4),
    ]


# ---------------------------------------------------------------- lists in a cell, photos without captions,
# ids, line ends

two = ['it\'s a "dog"', 'a café, a cat\\ [sic]']
PRINTED = {
    'json': json.dumps(two),
    'json as it is': json.dumps(two, ensure_ascii=False),
    'python': repr(two),
    'tuple': repr(tuple(two)),
    'numpy': f'[{two[0]!r}\n {two[1]!r}]',
    'array': f'array([{two[0]!r},\n       {two[1]!r}], dtype=object)',
    'spaces': f'  {two!r} ',
}


@pytest.mark.parametrize('form', PRINTED)
def test_a_list_in_a_cell_is_a_list_of_captions(tmp_path, form):
    path = tmp_path / 'c'
    cell = PRINTED[form]
    table = io.StringIO(newline='')
    csv.writer(table, lineterminator='\n').writerows([('image', 'caption'), ('a.jpg', cell), ('b.jpg', 'x')])
    for text in (
        table.getvalue(),
        json.dumps({'a.jpg': [cell], 'b.jpg': ['x']}),
        json.dumps([dict(file='a.jpg', text=cell), dict(file='b.jpg', text=['x'])]),
    ):
        path.write_text(text, encoding='utf-8')
        assert [(record.file, record.captions) for record in read_captions(path)] == [
            ('a.jpg', tuple(two)),
            ('b.jpg', ('x',)),
        ]


@given(
    texts=st.lists(
        st.text(st.characters(exclude_categories=['Cs', 'Cc'])).filter(
            lambda text: text.strip() and not re.search(r'[<\[]', text)
        ),
        min_size=1,
        max_size=5,
    )
)
@settings(max_examples=300, deadline=None)
def test_what_python_and_json_print_of_any_texts_comes_back(texts):
    wanted = [collapse_whitespace(text) for text in texts]
    for printed in (repr(texts), json.dumps(texts), repr(tuple(texts)), f'[{" ".join(map(repr, texts))}]'):
        assert clean_captions(printed) == wanted


@pytest.mark.parametrize(
    'caption',
    [
        '[a dog] barks',
        'a dog [barks]',
        '(two) dogs',
        '("Go" says a sign)',
        '[a dog]',
        '[]x',
        'array of (two) dogs',
        'arrays',
        '("Go")',
        '3 < 5',
    ],
)
def test_brackets_that_are_words_stay(caption):
    assert clean_captions(caption) == [caption]


def test_a_long_cell_costs_no_time():
    "Patterns that go back over what they have read would need years here"
    for text in (
        "['" + '\\' * 99_999 + ']',
        '[' + "'a' " * 49_000 + 'x]',
        '[' + ' ' * 190_000 + "'a' 'b]",
        'array(' + '(' * 190_000 + ')',
        '[' * 200_000,
        "['a'" + ' ' * 190_000 + 'x]',
    ):
        start = time.perf_counter()
        try:
            clean_captions(text)
        except ValueError:
            pass
        assert time.perf_counter() - start < 3


def test_ten_megabytes_are_refused_at_once(tmp_path):
    path = tmp_path / 'c'
    start = time.perf_counter()
    for text in (
        'image,caption\na.jpg,{}\n',
        '{{"a.jpg": ["{}"]}}',
        'a.jpg#0\t{}\n',
        '{{"file": "a.jpg", "text": "{}"}}\n{{}}',
        '{}\n',
        'image_name| comment_number| comment\na.jpg| 0| {}\n',
    ):
        path.write_text(text.format('word ' * 2_000_000))
        with pytest.raises(ValueError):
            read_captions(path)
    assert time.perf_counter() - start < 20


UNLABELLED = {
    'mapping': '{"a.jpg": ["x"],\n "b.jpg": [],\n "c.jpg": ["z"]}',
    'coco': '{"images": [{"id": 1, "file_name": "a.jpg"},\n{"id": 2, "file_name": "b.jpg"}, '
    '{"id": 3, "file_name": "c.jpg"}],\n "annotations": [{"image_id": 3, "caption": "z"}, '
    '{"image_id": 1, "caption": "x"}]}',
    'karpathy': '{"images": [{"filename": "a.jpg", "sentences": [{"raw": "x"}]},\n'
    '{"filename": "b.jpg", "sentences": []}, {"filename": "c.jpg", "sentences": [{"raw": "z"}]}]}',
    'lines': '{"file": "a.jpg", "text": "x"}\n{"file": "b.jpg", "text": null}\n{"file": "c.jpg", "text": ["z"]}',
    'table': 'image,caption_0,caption_1,note\na.jpg,x,,\nb.jpg,,,\nc.jpg,,z,\n',
    'printed': 'image,caption\na.jpg,x\nb.jpg,[]\nc.jpg,z\n',
}


@pytest.mark.parametrize('form', UNLABELLED)
def test_a_photo_without_captions_is_left_out_and_said(tmp_path, form):
    (tmp_path / 'c').write_text(UNLABELLED[form])
    said = []
    assert [(record.file, record.captions) for record in read_captions(tmp_path / 'c', log=said.append)] == [
        ('a.jpg', ('x',)),
        ('c.jpg', ('z',)),
    ]
    line = UNLABELLED[form].split('b.jpg')[0].count('\n') + 1
    assert said == [
        f"{tmp_path / 'c'}:{line}: no captions for 'b.jpg'; 1 of 3 photos have none and are left out"
    ]
    with pytest.warns(UserWarning, match="no captions for 'b.jpg'"):
        read_captions(tmp_path / 'c')


@pytest.mark.parametrize(
    'number, other', [(7, '7'), (7, 7.0), ('7', 7), (7.0, 7), ('000007', 7), ('7.0', 7), ('x7', 'x7')]
)
def test_coco_ids_are_compared_as_numbers(tmp_path, number, other):
    (tmp_path / 'c').write_text(
        json.dumps(
            dict(images=[dict(id=number, file_name='a.jpg')], annotations=[dict(image_id=other, caption='x')])
        )
    )
    assert read_captions(tmp_path / 'c') == [Record('a.jpg', ('x',), 1, None, 'x7' if other == 'x7' else 7)]


def test_coco_annotations_that_name_their_photos_need_no_images(tmp_path):
    (tmp_path / 'c').write_text(
        '{"annotations": [{"image_id": 1, "file_name": "a.jpg", "caption": "x"},\n'
        '{"image_id": 1, "file_name": "a.jpg", "caption": "y"}]}'
    )
    assert read_captions(tmp_path / 'c') == [Record('a.jpg', ('x', 'y'), 1, None, 1)]


@pytest.mark.parametrize(
    'folder, file',
    [
        ('', 'a.jpg'),
        ('.', 'a.jpg'),
        ('./', 'a.jpg'),
        ('val2014/', 'val2014/a.jpg'),
        ('val2014', 'val2014/a.jpg'),
    ],
)
def test_karpathys_folder_may_be_empty(tmp_path, folder, file):
    (tmp_path / 'c').write_text(
        json.dumps(dict(images=[dict(filepath=folder, filename='a.jpg', sentences=[dict(raw='x')])]))
    )
    assert [record.file for record in read_captions(tmp_path / 'c')] == [file]


def test_sentences_as_tables_keep_them(tmp_path):
    "The datasets library turns a list of objects into an object of lists"
    (tmp_path / 'c').write_text(
        json.dumps(
            [
                dict(filename='a.jpg', sentences=dict(raw=['x', 'y'], tokens=[['x'], ['y']])),
                dict(filename='b.jpg', sentences=[dict(caption='z')]),
            ]
        )
    )
    assert [record.captions for record in read_captions(tmp_path / 'c')] == [('x', 'y'), ('z',)]


@pytest.mark.parametrize(
    'text',
    [
        'a.jpg#0\tA dog\nb.jpg#0\tA cat\n',
        'image,caption\na.jpg,A dog\nb.jpg,A cat\n',
        '{"file": "a.jpg", "text": "A dog"}\n{"file": "b.jpg", "text": "A cat"}\n',
        'image_name| comment_number| comment\na.jpg| 0| A dog\nb.jpg| 0| A cat\n',
    ],
)
@pytest.mark.parametrize('end', ['\r', '\r\n', '\n'])
def test_line_ends_of_every_system(tmp_path, text, end):
    for last in ('', end, '\n'):  # some programs add a line feed at the end
        (tmp_path / 'c').write_bytes((text[:-1].replace('\n', end) + last).encode())
        assert [(record.file, record.captions, record.line) for record in read_captions(tmp_path / 'c')] == [
            ('a.jpg', ('A dog',), text.split('a.jpg')[0].count('\n') + 1),
            ('b.jpg', ('A cat',), text.split('b.jpg')[0].count('\n') + 1),
        ]


def test_one_object_over_several_lines_is_one_photo(tmp_path):
    (tmp_path / 'c').write_text('\n{\n "file": "a.jpg",\n "captions": ["x", "y"]\n}\n')
    assert read_captions(tmp_path / 'c') == [Record('a.jpg', ('x', 'y'), 2)]


@pytest.mark.parametrize(
    'there, named',
    [
        ('a.jpg', 'a.JPG'),
        ('A.jpg', 'a.jpg'),
        ('a.jpg', 'a.jpeg'),
        ('é.jpg', 'e\u0301.jpg'),
        ('x/a.jpg', 'x/A.jpg'),
    ],
)
def test_a_file_with_almost_the_same_name_is_named(tmp_path, there, named):
    (tmp_path / there).parent.mkdir(exist_ok=True)
    (tmp_path / there).touch()
    (tmp_path / 'c').write_text(json.dumps({named: ['x']}))
    with pytest.raises(FileNotFoundError, match=f"'{there}' is there: write the name as the file has it"):
        read_captions(tmp_path / 'c', tmp_path)
    assert similar_files(tmp_path, [named, 'other.jpg', 'nowhere/a.jpg']) == {named: there}


def test_errors_obey_no_terminal_and_stay_short(tmp_path):
    path = tmp_path / 'c\x1b[2J\n'
    for text in (
        '{"\\u001b[31m/../x": ["y"]}',
        '{"' + 'x' * 5_000 + '": ["y", null]}',
        '\x1b[31m,caption\nx\n',
        'image,caption,\x1b[2J\nx\n',
        '{"file": "a", "text": "x", "split": {"' + 'k' * 999 + '": 1}}',
    ):
        path.write_text(text)
        with pytest.raises(ValueError) as caught:
            read_captions(path)
        assert (
            not re.search(r'[\x00-\x1f]', str(caught.value)) and len(str(caught.value)) < len(str(path)) + 350
        )


# ---------------------------------------------------------------- every malformed file says where

MALFORMED = {  # content: (line, words of the message)
    '': (1, 'the file is empty'),
    '\ufeff \r\n\n': (1, 'the file is empty'),
    '{}': (1, 'no captions in this file'),
    'image,caption\n': (1, 'no captions in this file'),
    'image_name| comment_number| comment\n': (1, 'no captions in this file'),
    '{"a.jpg": ["x"],\n "b.jpg": ["y"],}': (2, 'not JSON'),
    '{"a.jpg": ["x"]\n "b.jpg": ["y"]}': (2, "not JSON (Expecting ',' delimiter"),
    '{"a.jpg": ["x"]}\n{"b.jpg": ["y"]}': (2, 'not JSON (Extra data'),
    '{"a.jpg": ["x\ny"]}': (1, 'not JSON (Invalid control character'),
    '{"a.jpg":' * 100_000: (1, 'nested more than 100 levels deep'),
    '{"a.jpg": ' + '[' * 150 + ']' * 150 + '}': (1, 'nested more than 100 levels deep'),
    '{"file": "a.jpg", "text": "x"}\n{"file": "b.jpg", "text": ' + '[' * 100_000: (
        2,
        'nested more than 100 levels deep',
    ),
    '{"a.jpg": ["x"],\n "b.jpg": [' + '9' * 5_000 + ']}': (2, 'not JSON that can be read (Exceeds the limit'),
    '{"file": "a.jpg", "text": "x"}\n{"file": "b.jpg", "text": ' + '9' * 5_000 + '}': (
        2,
        'not JSON that can be read (Exceeds the limit',
    ),
    '{"a.jpg": []}': (1, 'no captions in this file'),
    '{"a.jpg": ["x"],\n "b.jpg": "y"}': (2, "'b.jpg' has a str where its list"),
    '{"images": [{"id": 1}],\n "annotations": []}': (1, "an entry of 'images' has no 'file_name'"),
    '{"images": [{"id": 1, "file_name": "a.jpg"}],\n "annotations": []}': (1, 'no captions in this file'),
    '{"images": [{"id": 1, "file_name": "a.jpg"},\n{"id": 1, "file_name": "b.jpg"}],\n "annotations": []}': (
        2,
        'id 1 stands here again',
    ),
    '{"images": [{"id": 1, "file_name": "a.jpg"},\n{"id": 2, "file_name": "a.jpg"}],\n "annotations": []}': (
        2,
        "file_name 'a.jpg' stands here again",
    ),
    '{"images": [{"id": 1, "file_name": "a.jpg"}],\n "annotations": [\n{"image_id": 2, "caption": "x"}]}': (
        3,
        "image_id 2, which 'images' does not list",
    ),
    '{"images": [{"id": 1, "file_name": "a.jpg"}],\n "annotations": [\n{"image_id": 1, "bbox": []}]}': (
        3,
        'instances_*.json',
    ),
    '{"images": [{"id": 1, "file_name": "a.jpg"}],\n "annotations": [\n{"image_id": 1, "caption": " "}]}': (
        3,
        "a caption of 'a.jpg' is empty",
    ),
    '{"images": [{"filename": "a.jpg", "split": "val"}]}': (
        1,
        "no field for the caption, among 'filename', 'split'; call one of them 'caption'",
    ),
    '{"images": [{"filename": "a.jpg", "split": 3, "sentences": [{"raw": "x"}]}]}': (
        1,
        "'split' of 'a.jpg' is 3",
    ),
    '{"images": [{"filename": "a.jpg", "sentences": []}]}': (1, 'no captions in this file'),
    '{"images": [{"filename": "a.jpg", "sentences": [{"tokens": ["x"]}]}]}': (
        1,
        'is {"tokens": ["x"]}, not a string',
    ),
    '{"file": "a.jpg", "text": "x"}\n\n{"file": "b.jpg", "text": "y"': (3, 'not JSON'),
    '{"file": "a.jpg", "text": "x"}\n["b.jpg"]': (2, 'where an object should be'),
    '{"file": "a.jpg", "text": "x"}\n{"file": "b.jpg"}': (2, 'no field for the caption'),
    '{"file": "a.jpg", "text": "x"}\n{"file": 7, "text": "y"}': (2, "'file' is 7, not the name of a photo"),
    '{"file": "a.jpg", "text": "x", "split": "a"}\n{"file": "a.jpg", "text": "y", "split": "b"}': (
        2,
        "'a.jpg' has split 'b'",
    ),
    '{"file": "a.jpg", "text": "x", "image_id": [1]}': (1, "the id of 'a.jpg' is [1]"),
    '{"a.jpg": ["x"],\n "b.jpg": ["y",\n null]}': (2, "a caption of 'b.jpg' is null, not a string"),
    '{"a.jpg": ["x"],\n "b.jpg": [3]}': (2, "a caption of 'b.jpg' is 3, not a string"),
    '{"a.jpg": ["x"],\n "b.jpg": [" \\u2028"]}': (2, "a caption of 'b.jpg' is empty"),
    '{"a.jpg": ["x"],\n\n "a.jpg": ["y"]}': (3, "'a.jpg' stands here again (first on line 1)"),
    '{"a.jpg": ["x"],\n "../b.jpg": ["y"]}': (2, "'../b.jpg' leads out of the folder"),
    '{"a/../../b.jpg": ["y"]}': (1, 'leads out of the folder'),
    '{"/b.jpg": ["y"]}': (1, 'leads out of the folder'),
    '{"C:\\\\b.jpg": ["y"]}': (1, 'leads out of the folder'),
    '{"..\\\\b.jpg": ["y"]}': (1, 'leads out of the folder'),
    '{"": ["y"]}': (1, 'no photo is named'),
    '{"folder/": ["y"]}': (1, 'no photo is named'),
    '{"a\\u0000.jpg": ["y"]}': (1, 'is no file name'),
    '["a.jpg"]': (1, 'where an object should be'),
    '[]': (1, 'no captions in this file'),
    '\n\nhello\n': (3, "unknown format ('hello')"),
    'a.jpg,A dog without a header\n': (1, 'unknown format'),
    'a.jpg#0\tA dog\n\na.jpg A cat\n': (3, "cannot read 'a.jpg A cat'; write name#number"),
    'a.jpg#0\tA dog\na.jpg#1\t \n': (2, "a caption of 'a.jpg' is empty"),
    'a.jpg#0\tA dog\n../b.jpg#1\tx\n': (2, 'leads out of the folder'),
    'image,caption\na.jpg\n': (
        2,
        '1 field where the first line names 2; write image, caption, separated by commas',
    ),
    'image,caption\na.jpg,"A dog\nand a cat\n': (2, 'a quoted field is not well formed'),
    'image,caption\na.jpg,"A dog\nand" a cat\n': (2, 'close every opened quote'),
    'caption,image\n"A" dog,a.jpg\n': (2, 'a quoted field is not well formed'),
    'caption,image\nA dog, a cat,a.jpg\n': (2, '3 fields where the first line names 2'),
    'image,caption\na.jpg;A dog\n': (2, 'it seems to be separated by semicolons'),
    'image;caption\na.jpg\tA dog\n': (2, 'it seems to be separated by tabs'),
    '\nimage:caption\na.jpg:A dog\n': (
        2,
        "which seems to be separated by ':'; commas, tabs, semicolons, bars are read",
    ),
    'image caption\na.jpg A dog\n': (1, "which seems to be separated by ' '"),
    'photo,caption\na.jpg,A dog\n': (1, 'a table whose first line names the columns'),
    'image,caption,caption\na.jpg,A dog,x\n': (
        1,
        "2 columns are called 'caption'; rename them, as caption_0, caption_1",
    ),
    'image,image,text\na.jpg,a.jpg,x\n': (1, "2 columns are called 'image'"),
    'image,caption,split\na.jpg,A dog,train\na.jpg,A cat,val\n': (
        3,
        "'a.jpg' has split 'val' and id None here, 'train' and None on line 2",
    ),
    'image,caption_0,caption_1\na.jpg,,\n': (1, 'no captions in this file'),
    'file,text\n"a\nb.jpg",x\n': (2, 'is no file name'),
    'image,caption\n,A dog\n': (2, 'no photo is named'),
    'image,caption\na.jpg,\n': (1, 'no captions in this file'),
    'image,caption\na.jpg, \n': (2, "a caption of 'a.jpg' is empty"),
    'image,caption\na.jpg,' + 'x' * 10_001 + '\n': (
        2,
        "a caption of 'a.jpg' has 10,001 characters, more than 10,000; shorten it",
    ),
    'image,caption\na.jpg,[' + 'x' * 200_001 + ']\n': (2, 'has 200,003 characters'),
    'x' * 20_000 + '\n': (1, 'unknown format'),
    'image,caption\na.jpg,"[\'x\', nan]"\n': (2, 'looks like a printed list, and cannot be read as one'),
    "image,caption\na.jpg,\"['x' ... 'y']\"\n": (2, 'looks like a printed list'),
    "image,caption\na.jpg,\"['x', '']\"\n": (2, "a caption of 'a.jpg' is empty"),
    'image,caption\na.jpg,"[[\'x\']]"\n': (2, 'looks like a printed list'),
    'image,caption\na.jpg,[CLS] a dog [SEP]\n': (
        2,
        "holds '[CLS]', a token of a vocabulary and no word; remove the token",
    ),
    'image,caption\na.jpg,<start> a dog <end>\n': (2, "holds '<start>'"),
    '{"a.jpg": ["a dog </s>"]}': (1, "holds '</s>'"),
    '{"annotations": [{"image_id": 1, "caption": "x"}]}': (
        1,
        "no list 'images' says which photos these are; give COCO's whole",
    ),
    '{"images": [],\n "annotations": [{"image_id": 1, "caption": "x"}]}': (
        2,
        "no list 'images' says which photos these are",
    ),
    '{"images": [{"id": 1, "file_name": "a.jpg"}, {"id": "1", "file_name": "b.jpg"}], "annotations": []}': (
        1,
        'id 1 stands here again',
    ),
    '{"images": [{"id": 1.5, "file_name": "a.jpg"}], "annotations": []}': (
        1,
        "an entry of 'images' has no 'id'",
    ),
    '{"file": "a.jpg", "text": "x", "split": "\\ud800"}': (
        1,
        "the split of 'a.jpg' is '\\ud800'; give a short name",
    ),
    '{"file": "a.jpg", "text": "x", "image_id": "\\u001b"}': (1, "the id of 'a.jpg' is '\\x1b'"),
    '{"file": "a.jpg", "text": {"bbox": [1]}}': (
        1,
        'a caption of \'a.jpg\' is {"bbox": [1]}, not a string; write a string, or a list of strings',
    ),
    'a.jpg#0\tA dog\rb.jpg#0\tA cat\na.jpg#1\tx\n': (1, 'two captions, with a carriage return between them'),
    'image_name| comment_number| comment\na.jpg| A dog\n': (2, 'write name| number| caption'),
    'image_name| comment_number| comment\na.jpg| 0| \n': (2, "a caption of 'a.jpg' is empty"),
}


@pytest.mark.parametrize('content', MALFORMED, ids=lambda content: repr(content)[:40])
def test_malformed_text_names_file_and_line(tmp_path, content):
    line, words = MALFORMED[content]
    path = tmp_path / 'captions.dat'
    path.write_text(content, encoding='utf-8', newline='')
    with pytest.raises(ValueError) as caught:
        read_captions(path)
    message = str(caught.value)
    assert message.startswith(f'{path}:{line}: ') and words in message
    assert '\n' not in message and '; ' in message  # one line, and what to do
    assert len(message) < len(str(path)) + 270


@pytest.mark.parametrize(
    'content, line', [(b'a.jpg#0\tok\n\na.jpg#1\tcaf\xe9\n', 3), (b'\xef\xbb\xbfok\n\xff', 2)]
)
def test_not_utf8_names_the_line_of_the_bad_byte(tmp_path, content, line):
    path = tmp_path / 'captions.dat'
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f'captions.dat:{line}: not UTF-8'):
        read_captions(path)


@pytest.mark.parametrize(
    'content, words',
    [
        ('{"a.jpg": ["x"]}'.encode('utf-16'), 'UTF-16; save it as UTF-8'),
        ('image,caption\n'.encode('utf-16-le'), 'UTF-16'),
        ('image,caption\n'.encode('utf-16-be'), 'UTF-16'),
        (b'PAR1\x15\x04\xff', 'a parquet file; save it as CSV or JSON lines'),
        (gzip.compress(b'image,caption\n', mtime=0), 'a gzip archive; unpack it first'),
        (b'PK\x03\x04\x14\x00\xff', 'a zip archive or an Excel file'),
        (pickle.dumps({'a.jpg': [b'\xff']}), 'a pickle'),
        (bz2.compress(b'x' * 99), 'a bzip2 archive'),
    ],
)
def test_a_file_that_is_no_text_is_named_as_what_it_is(tmp_path, content, words):
    (tmp_path / 'c.csv').write_bytes(content)
    with pytest.raises(ValueError, match=f'c.csv: not text but {words}'):
        read_captions(tmp_path / 'c.csv')


starts = [
    'image,caption\n',
    'file\ttext\tsplit\n',
    'image_name| comment_number| comment\n',
    'a#0\tb\n',
    '{"images": [',
    '{"file": "a", "text": "b"}\n',
    '[{"file": "a", "text": "b"},',
    '{"images": [{"id": 1, "file_name": "a"}], "annotations": [',
    '{"images": [{"filename": "a", "sentences": [',
]


@given(
    content=st.one_of(
        st.binary(max_size=60),
        st.tuples(st.sampled_from(starts).map(str.encode), st.binary(max_size=40)).map(b''.join),
        st.tuples(
            st.sampled_from(starts), st.text(st.sampled_from('{}[]":,;\t|#ax1\\u\n\r '), max_size=40)
        ).map(lambda t: ''.join(t).encode()),
        st.text(max_size=60).map(lambda t: ('image,caption\n' + t).encode('utf-8', 'surrogatepass')),
        st.text(st.sampled_from('{}[]":,ax1\\u\n '), max_size=30).map(lambda t: ('{' + t).encode()),
    )
)
@example(b'\r\x00')
@example(b'image,cap\rtion\na.jpg,b\n')
@settings(max_examples=300, deadline=None)
def test_no_content_raises_anything_else(tmp_path_factory, content):
    path = tmp_path_factory.mktemp('captions') / 'c'
    path.write_bytes(content)
    try:
        records = read_captions(path)
    except ValueError as error:
        assert str(error).startswith(f'{path}:') and '\n' not in str(error)
    else:
        assert all(record.captions and record.file and record.line >= 1 for record in records)


def test_missing_files_and_folders(tmp_path):
    path = tmp_path / 'c.json'
    with pytest.raises(FileNotFoundError, match='c.json: no such file'):
        read_captions(path)
    with pytest.raises(FileNotFoundError, match='no such file'):
        read_captions(tmp_path)
    path.write_text('{"a.jpg": ["x"],\n "b.jpg": ["y"],\n "c.jpg": ["z"]}')
    with pytest.raises(FileNotFoundError, match='nowhere: no such folder'):
        read_captions(path, tmp_path / 'nowhere')
    (tmp_path / 'a.jpg').touch()
    with pytest.raises(FileNotFoundError) as caught:
        read_captions(path, tmp_path)
    assert str(caught.value).startswith(f"{path}:2: 'b.jpg' is not in {tmp_path} (2 of 3 photos are missing)")


# ---------------------------------------------------------------- items, order, batches


def tiny_load(path):
    "What a user would write: photo -> (3, 8, 8)"
    image = load_image(path).resize((8, 8))
    return torch.tensor(list(image.tobytes()), dtype=torch.float32).reshape(8, 8, 3).permute(2, 0, 1) / 255


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "23 photos, two of them broken, with 1 to 5 captions"
    folder = tmp_path_factory.mktemp('photos')
    for i in range(23):
        Image.new('RGB', (9, 9), (i * 10, 0, 255 - i * 10)).save(folder / f'{i}.png')
    (folder / '4.png').write_bytes((folder / '4.png').read_bytes()[:40])  # cut short
    (folder / '11.png').write_text('<html>not found</html>')
    return folder


@pytest.fixture(scope='module')
def records():
    return [
        Record(f'{i}.png', tuple(f'photo {i} words {j}' for j in range(1 + i % 5)), i + 1) for i in range(23)
    ]


def loader(records, folder, workers=0, **sampler):
    dataset = CaptionDataset(records, folder, tiny_load, captions_per_image=3, seed=5)
    batches = SeededBatchSampler(len(dataset), 4, seed=5, **sampler)
    return DataLoader(
        dataset, batch_sampler=batches, num_workers=workers, collate_fn=Collate(CaptionTokenizer())
    )


def same(a, b):
    "Compare two batches, tensor by tensor"
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key]) if torch.is_tensor(a[key]) else _equal(a[key], b[key])


def _equal(a, b):
    assert a == b


def test_a_resumed_run_with_workers_continues_the_unbroken_one(records, folder):
    unbroken = list(loader(records, folder, num_batches=11))  # two epochs of 5 batches and one batch more
    first = loader(records, folder, workers=2, num_batches=4)
    rest = loader(records, folder, workers=2, start_batch=4, num_batches=7)
    resumed = [*first, *rest]
    assert len(resumed) == len(unbroken) == 11
    for a, b in zip(resumed, unbroken):
        same(a, b)
    assert unbroken[0]['files'] != unbroken[5]['files']  # the second epoch has its own order


def test_broken_photos_are_counted(records, folder):
    sampler = SeededBatchSampler(23, 4, seed=5, drop_last=False, num_batches=6)
    dataset = CaptionDataset(records, folder, tiny_load, captions_per_image=3)
    batches = list(
        DataLoader(dataset, batch_sampler=sampler, collate_fn=Collate(CaptionTokenizer()), num_workers=2)
    )
    broken = {item.file: item.reason for batch in batches for item in batch['broken']}
    assert broken.keys() == {'4.png', '11.png'} and all(file in reason for file, reason in broken.items())
    assert sorted(file for batch in batches for file in batch['files']) == sorted(
        r.file for r in records if r.file not in broken
    )
    for batch in batches:
        count = len(batch['files'])
        assert batch['pixel_values'].shape == (count, 3, 8, 8) and batch['input_ids'].shape[0] == 3 * count
        text = CaptionTokenizer().decode_batch(batch['input_ids'])
        assert [words.split()[1] for words in text] == [
            file[:-4] for file in batch['files'] for _ in range(3)
        ]  # rows of a photo adjacent


def test_only_what_a_bad_photo_raises_is_caught(records, folder):
    def faulty(path):
        raise TypeError('a bug in the program')

    with pytest.raises(TypeError, match='a bug in the program'):
        CaptionDataset(records, folder, faulty)[0]
    with pytest.raises(ValueError, match='4.png'):
        CaptionDataset(records, folder, tiny_load, strict=True)[4]
    gone = CaptionDataset([Record('gone.png', ('x',), 1)], folder, tiny_load)[0]
    assert isinstance(gone, BrokenImage) and gone.file == 'gone.png' and 'gone.png' in gone.reason


def test_item_depends_on_seed_epoch_and_index_only(records, folder):
    one, other = (CaptionDataset(records, folder, tiny_load, captions_per_image=3, seed=1) for _ in range(2))
    state = random.getstate(), torch.get_rng_state()
    before = [one[(2, i)] for i in (5, 9)]
    after = [other[(2, i)] for i in (9, 5)][::-1]
    for a, b in zip(before, after):
        same(a, b)
    assert random.getstate() == state[0] and torch.equal(
        torch.get_rng_state(), state[1]
    )  # nobody else's numbers are drawn
    assert one[9]['captions'] == one[(0, 9)]['captions']
    assert len({tuple(one.captions(epoch, 9)) for epoch in range(20)}) > 5
    assert one.captions(0, 9) != CaptionDataset(records, folder, tiny_load, 3, seed=2).captions(0, 9)


@given(own=st.integers(1, 8), count=st.integers(1, 8), epoch=st.integers(0, 9))
def test_captions_are_drawn_without_replacement_then_cycled(tmp_path_factory, own, count, epoch):
    record = Record('a.png', tuple(f'caption {i}' for i in range(own)), 1)
    drawn = CaptionDataset([record], '.', tiny_load, captions_per_image=count).captions(epoch, 0)
    times = Counter(drawn)
    assert len(drawn) == count and set(drawn) <= set(record.captions)
    assert len(times) == min(own, count) and max(times.values()) - min(times.values()) <= 1


def test_default_number_of_captions():
    def default(*numbers):
        return CaptionDataset(
            [Record('a', ('x',) * n, 1) for n in numbers], '.', tiny_load
        ).captions_per_image

    assert (default(5, 5, 4), default(1), default(7, 7), default(2, 2, 3), default(2, 3)) == (5, 1, 5, 2, 3)


@given(
    length=st.integers(1, 60),
    batch_size=st.integers(1, 12),
    drop=st.booleans(),
    seed=st.integers(0, 3),
    start=st.integers(0, 200),
)
@settings(deadline=None)
def test_sampler_properties(length, batch_size, drop, seed, start):
    if drop and length < batch_size:
        return
    make = lambda **more: SeededBatchSampler(length, batch_size, seed, drop, **more)
    epochs = make(num_batches=2 * make().batches_per_epoch)
    for epoch in range(2):
        batches = list(epochs)[epoch * epochs.batches_per_epoch : (epoch + 1) * epochs.batches_per_epoch]
        pairs = [pair for batch in batches for pair in batch]
        assert {e for e, _ in pairs} == {epoch} and len(set(pairs)) == len(pairs)
        assert len(pairs) == (length // batch_size * batch_size if drop else length)
    unbroken = list(make(num_batches=start + 3))
    assert list(make(start_batch=start, num_batches=3)) == unbroken[start:]
    assert make().batch(start) == unbroken[start]


def test_sampler_says_what_is_wrong():
    for arguments, words in (
        ((0, 4), 'must be 1 or more'),
        ((3, 4), 'do not fill a batch of 4'),
        ((8, 0), 'must be 1 or more'),
    ):
        with pytest.raises(ValueError, match=words):
            SeededBatchSampler(*arguments)
    with pytest.raises(ValueError, match='must not be negative'):
        SeededBatchSampler(8, 4, start_batch=-1)
    with pytest.raises(TypeError, match='give num_batches'):
        len(SeededBatchSampler(8, 4))
    assert len(SeededBatchSampler(8, 4, num_batches=7)) == 7


def test_collate_travels_and_says_what_is_wrong():
    collate = pickle.loads(pickle.dumps(Collate(CaptionTokenizer())))  # spawned workers receive it this way
    item = dict(pixel_values=torch.zeros(3, 4, 4), captions=['a dog', 'a cat'], file='a.png')
    batch = collate([item, BrokenImage('b.png', 'bad'), item])
    assert (
        batch['files'] == ['a.png', 'a.png']
        and batch['broken'] == [BrokenImage('b.png', 'bad')]
        and batch['labels'].shape[0] == 4
    )
    assert collate([BrokenImage('b.png', 'bad')]) == dict(broken=[BrokenImage('b.png', 'bad')])
    with pytest.raises(ValueError, match='different sizes'):
        collate([item, item | dict(pixel_values=torch.zeros(3, 5, 4))])
    with pytest.raises(ValueError, match='different numbers of captions'):
        collate([item, item | dict(captions=['a dog'])])


def test_data_set_says_what_is_wrong(tmp_path, records):
    with pytest.raises(ValueError, match='no records'):
        CaptionDataset([], tmp_path, tiny_load)
    with pytest.raises(ValueError, match='captions_per_image is 0'):
        CaptionDataset(records, tmp_path, tiny_load, 0)
    with pytest.raises(FileNotFoundError, match='no such folder'):
        CaptionDataset(records, tmp_path / 'nowhere', tiny_load)


def test_split_does_not_depend_on_the_other_photos():
    records = [Record(f'{i}.jpg', ('x',), i) for i in range(2000)]
    training, validation = split_by_name(records)
    assert len(training) + len(validation) == 2000 and 70 <= len(validation) <= 130
    again = split_by_name(records[::-2])[1]
    assert set(again) == set(validation) & set(records[::-2])
    assert set(validation) <= set(split_by_name(records, 0.2)[1])  # a larger share keeps what it had
    assert split_by_name(records, 0) == (records, []) and split_by_name(records, 1) == ([], records)
    with pytest.raises(ValueError, match='share is 5'):
        split_by_name(records, 5)


# ---------------------------------------------------------------- the folded readers of 06_data, one by one


def test_fields_have_many_names():
    found = find_fields(['Image', 'split', 'text'], {})
    assert found == dict(file=['Image'], caption=['text'], split=['split'], image_id=[])
    assert find_fields(['image', 'caption_0', 'caption_1'], {})['caption'] == ['caption_0', 'caption_1']
    with pytest.raises(ValueError, match="c.csv:1: no field for the file, among 'photo', 'text'; call one"):
        data._needed_fields('c.csv', 1, ['photo', 'text'], {})
    assert data._needed_fields('c.csv', 1, ['photo', 'text'], {'file': 'photo'})['file'] == ['photo']


def test_members_of_json_keep_their_lines():
    members = [(line, key, value) for line, key, _, value in data._json_members('{\n"a": [1],\n\n"b": 2}', 0)]
    assert members == [(2, 'a', [1]), (4, 'b', 2)]
    assert [line for line, *_ in data._json_members('[1,\n2,\n3]', 0)] == [1, 2, 3]


def test_rows_of_an_object():
    rows = lambda **entry: list(object_rows('c.jsonl', 1, entry, {}))
    assert rows(image='a.jpg', caption=['one', 'two']) == [Row(1, 'a.jpg', 'one'), Row(1, 'a.jpg', 'two')]
    assert rows(image='a.jpg', caption=[]) == [Row(1, 'a.jpg', data.NO_CAPTION)]
    karpathy = dict(filepath='val2014', filename='a.jpg', split='test', cocoid=7)
    sentences = [dict(raw='one', tokens=['one'])]
    assert rows(**karpathy, sentences=sentences) == [Row(1, 'val2014/a.jpg', 'one', 'test', 7)]
    with pytest.raises(ValueError, match="c.jsonl:1: 'image' is 3, not the name of a photo"):
        rows(image=3, caption='one')


def test_rows_of_json_files():
    rows = lambda text: list(data._json_rows('c.json', text, {}))
    assert rows('{\n"a.jpg": ["one", "two"],\n\n"b.jpg": ["three"]}') == [
        Row(2, 'a.jpg', 'one'),
        Row(2, 'a.jpg', 'two'),
        Row(4, 'b.jpg', 'three'),
    ]
    lines = '{"file": "a.jpg", "text": "one"}\n{"file": "b.jpg", "text": "two"}'
    assert rows(lines) == [Row(1, 'a.jpg', 'one'), Row(2, 'b.jpg', 'two')]
    with pytest.raises(ValueError, match=r"c.json:2: 'a.jpg' stands here again \(first on line 1\)"):
        rows('{"a.jpg": ["one"],\n "a.jpg": ["three"]}')


def test_rows_of_tables():
    rows = lambda text: list(data._text_rows('c.csv', text, {}))
    assert rows('image,caption\na.jpg,"A ""good"" dog, a cat"') == [Row(2, 'a.jpg', 'A "good" dog, a cat')]
    assert rows('text;file;split\n"A dog\nand a cat";a.jpg;val\nA cat;b.jpg;val') == [
        Row(2, 'a.jpg', 'A dog\nand a cat', 'val'),
        Row(4, 'b.jpg', 'A cat', 'val'),
    ]
    # without quotes: not CSV, but frequent
    assert rows('image,caption\na.jpg,A dog, a cat') == [Row(2, 'a.jpg', 'A dog, a cat')]
    for text, message in (
        ('image,caption\na.jpg,"A dog', 'c.csv:2: a quoted field is not well formed'),
        ('image,caption\na.jpg;A dog', 'it seems to be separated by semicolons'),
        ('image:caption\na.jpg:A dog', "which seems to be separated by ':'"),
    ):
        with pytest.raises(ValueError, match=message):
            rows(text)


def test_patterns_of_lines():
    token, bar = (pattern for _, _, pattern, _ in data._LINES)
    assert token.fullmatch('a.jpg#0\tA dog').groups() == ('a.jpg', 'A dog')
    assert bar.fullmatch('a.jpg| 0| A dog | a cat').groups() == ('a.jpg', ' A dog | a cat')


def test_a_file_of_an_old_mac_and_a_blank_one(tmp_path):
    (tmp_path / 'mac.txt').write_bytes(b'\xef\xbb\xbfhello\rcaf\xc3\xa9\r')
    assert data._caption_text(tmp_path / 'mac.txt') == 'hello\ncafé\n'
    (tmp_path / 'blank.txt').write_text(' \n')
    with pytest.raises(ValueError, match='blank.txt:1: the file is empty'):
        data._caption_text(tmp_path / 'blank.txt')


def test_captions_are_cleaned_or_refused():
    assert clean_captions(' a  dog ') == ['a dog']
    assert clean_captions("['a dog', 'a cat ']") == ['a dog', 'a cat']
    assert clean_captions("array(['one', 'two'], dtype=object)") == ['one', 'two']
    for caption, message in (
        ('[CLS] a dog [SEP]', r"holds '\[CLS\]', a token of a vocabulary"),
        ('a dog ' * 2000, 'has 12,000 characters, more than 10,000'),
    ):
        with pytest.raises(ValueError, match=message):
            clean_captions(caption)
