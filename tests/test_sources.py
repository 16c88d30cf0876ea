"""What the cells of 13_sources do not reach: several processes, damaged archives, a folder of 1,000 photos
with every kind of fault.
"""

import gzip
import http.server
import io
import json
import os
import pickle
import re
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
import zlib

import pytest
import torch
import torch.multiprocessing as multiprocessing
from PIL import Image
from torch.utils.data import DataLoader

from pvtblip.data import CaptionDataset, Record
from pvtblip.pvt_encoder import BrokenImage
from pvtblip.training import Collate
from pvtblip.pvt_encoder import load_image
from pvtblip.sources import (
    MAX_PHOTO_BYTES,
    MAX_TEXT_BYTES,
    ShardDataset,
    ShardReading,
    find_shards,
    is_photo,
    open_photo,
    open_source,
    read_hub_dataset,
    read_shard,
)
from pvtblip.data_check import check_data, contact_sheet, photo_problem
from pvtblip.tokenizer import CaptionTokenizer

datasets = pytest.importorskip('datasets')


def tiny_load(image):
    "PIL image -> (3, 4, 4)"
    return (
        torch.tensor(list(image.convert('RGB').resize((4, 4)).tobytes()), dtype=torch.float32)
        .reshape(4, 4, 3)
        .permute(2, 0, 1)
        / 255
    )


PLACE = ('start_batch', 'num_batches', 'process_index', 'num_processes')


def shard_set(shards, batch_size, **settings):
    "A `ShardDataset` of small pictures; settings are those of `ShardReading`, or the place in the run."
    place = {name: settings.pop(name) for name in PLACE if name in settings}
    return ShardDataset(shards, tiny_load, ShardReading(batch_size, **settings), **place)


def png(number):
    out = io.BytesIO()
    Image.new('RGB', (8, 8), (number % 256, number // 256, 77)).save(out, 'PNG')
    return out.getvalue()


def add(archive, name, content):
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


SIZES = (9, 1, 7, 3, 12, 2, 5, 8)


@pytest.fixture(scope='module')
def shards(tmp_path_factory):
    "Eight shards of unequal size, 47 photos with two captions"
    folder = tmp_path_factory.mktemp('shards')
    number = 0
    for shard, size in enumerate(SIZES):
        with tarfile.open(folder / f'part-{shard:03}.tar', 'w') as archive:
            for _ in range(size):
                add(archive, f'{number:04}.png', png(number))
                add(archive, f'{number:04}.txt', f'photo {number}\nnumber {number}'.encode())
                number += 1
    return find_shards(folder)


def same(items):
    return items


def files_of(batches):
    return [[item['file'].split('/')[1][:4] for item in batch] for batch in batches]


def everything():
    return [f'{number:04}' for number in range(sum(SIZES))]


# ---------------------------------------------------------------- shards in two processes with two workers


def one_process(rank, shards, place):
    "Read shards as one of two gloo processes; what was read goes into a file"
    os.environ['OMP_NUM_THREADS'] = '1'
    torch.distributed.init_process_group('gloo', init_method=f'file://{place}/meet', rank=rank, world_size=2)

    def batches(workers=2, **more):
        data = shard_set(shards, 3, num_workers=workers, shuffle=4, **more)
        # a spawned process would spawn its workers, and each imports torch anew
        start = 'fork' if workers else None
        for batch in DataLoader(
            data, batch_size=None, num_workers=workers, collate_fn=same, multiprocessing_context=start
        ):
            if 'num_batches' in more:  # as a training step does: everybody must be there
                torch.distributed.all_reduce(torch.ones(1))
            yield batch

    found = dict(
        one_pass=files_of(batches(passes=1)),
        three_passes=files_of(batches(passes=3)),
        endless=files_of(batches(num_batches=40)),
        resumed={
            start: files_of(batches(start_batch=start, num_batches=40 - start)) for start in (1, 6, 13, 30)
        },
        one_worker=files_of(batches(workers=0, num_batches=9)),
        one_worker_resumed=files_of(batches(workers=0, start_batch=4, num_batches=5)),
    )
    with open(f'{place}/{rank}.json', 'w') as out:
        json.dump(found, out)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope='module')
def two(shards, tmp_path_factory):
    place = tmp_path_factory.mktemp('two')
    multiprocessing.spawn(one_process, args=(shards, str(place)), nprocs=2)
    return [json.loads((place / f'{rank}.json').read_text()) for rank in range(2)]


def flat(batches):
    return [file for batch in batches for file in batch]


def test_two_processes_with_two_workers_see_each_photo_once_in_a_pass(two):
    assert sorted(flat(two[0]['one_pass']) + flat(two[1]['one_pass'])) == everything()
    assert sorted(flat(two[0]['three_passes']) + flat(two[1]['three_passes'])) == sorted(everything() * 3)
    assert len(flat(two[0]['one_pass'])) != len(
        flat(two[1]['one_pass'])
    )  # which is why training counts batches


def test_uneven_shards_give_every_process_the_same_number_of_whole_batches(two):
    for found in two:
        assert [len(batch) for batch in found['endless']] == [3] * 40
    counts = [sum((flat(found['endless']) for found in two), []).count(file) for file in everything()]
    assert 240 == sum(counts) and min(counts) >= 3  # 47 photos, 240 places: about five times each


def test_a_restart_continues_the_shards_where_they_were(two):
    for found in two:
        for start, batches in found['resumed'].items():
            assert batches == found['endless'][int(start) :]
        assert found['one_worker_resumed'] == found['one_worker'][4:]


# ---------------------------------------------------------------- one process


def test_shards_go_through_collate_and_depend_on_the_seed_alone(shards):
    def batches(**more):
        data = shard_set(shards, 5, num_batches=4, **more)
        return list(DataLoader(data, batch_size=None, collate_fn=Collate(CaptionTokenizer())))

    one, again, other = batches(), batches(), batches(seed=1)
    for a, b in zip(one, again):
        assert (
            a['files'] == b['files']
            and torch.equal(a['input_ids'], b['input_ids'])
            and torch.equal(a['pixel_values'], b['pixel_values'])
        )
    assert (
        one[0]['pixel_values'].shape == (5, 3, 4, 4) and one[0]['input_ids'].shape[0] == 10
    )  # two captions a photo, by the first
    assert [batch['files'] for batch in one] != [batch['files'] for batch in other]
    for batch in one:
        for file, text in zip(batch['files'], CaptionTokenizer().decode_batch(batch['input_ids'])[::2]):
            assert text.split()[-1] == str(int(file.split('/')[1][:4]))


def test_json_captions_foreign_files_and_faulty_samples(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / 'executed'), 'w'))

    path = str(tmp_path / 'a.tar')
    with tarfile.open(path, 'w') as archive:
        add(archive, '0.png', png(0))
        add(
            archive,
            '0.json',
            json.dumps(dict(captions=['one', 'two'], file_name='elsewhere.png', width=8)).encode(),
        )
        for suffix in ('pickle', 'pyd', 'pth', 'cls'):
            add(archive, f'0.{suffix}', pickle.dumps(Evil()))
        add(archive, '1.PNG', png(1))
        add(archive, '1.json', json.dumps(dict(caption='three')).encode())
        for name, captions in (
            ('2', b'{"caption": null}'),
            ('3', b'{'),
            ('4', b'[]'),
            ('5', b'{"caption": " "}'),
        ):
            add(archive, f'{name}.png', png(2))
            add(archive, f'{name}.json', captions)
        add(archive, '6.png', png(6))
        add(archive, '7.txt', b'no photo')
        add(archive, '8.png', b'<html>')
        add(archive, '8.txt', b'x')
        add(archive, '9.jpg', png(9)[:30])
        add(archive, '9.txt', b'caf\xe9')
    (items,) = shard_set([path], 20, passes=1, shuffle=1)
    assert [item['captions'] for item in items[:2]] == [items[0]['captions'], ['three', 'three']] and sorted(
        items[0]['captions']
    ) == ['one', 'two']
    reasons = {item.file: item.reason for item in items[2:]}
    assert all(isinstance(item, BrokenImage) for item in items[2:]) and len(items) == 10
    for name, words in (
        ('2', 'no captions'),
        ('3', '3.json:1: not JSON (Expecting'),
        ('4', 'is no object'),
        ('5', 'no captions'),
        ('6', 'no captions'),
        ('7', 'no photo'),
        ('8', 'not an image'),
        ('9', '9.txt:1: not UTF-8 (byte 0xe9)'),
    ):
        assert any(f'/{name}' in file and words in reason for file, reason in reasons.items()), (
            name,
            reasons,
        )
    assert not (tmp_path / 'executed').exists()
    with pytest.raises(ValueError, match='a.tar/'):
        list(shard_set([path], 20, passes=1, strict=True))


@pytest.mark.parametrize('cut', [0.3, 0.5, 0.7, 'boundary', 'not a tar', 'empty'])
def test_damaged_shards_are_reported_and_the_place_stays_exact(shards, tmp_path, cut):
    whole = open(shards[4], 'rb').read()
    content = (
        {'boundary': whole[: 1024 * 8], 'not a tar': b'<html>' * 300, 'empty': b''}.get(cut)
        if isinstance(cut, str)
        else whole[: int(len(whole) * cut)]
    )
    (tmp_path / 'cut.tar').write_bytes(content)
    mixed = [shards[0], str(tmp_path / 'cut.tar'), shards[2]]

    def give(**more):
        return [
            [item.file if isinstance(item, BrokenImage) else item['file'] for item in batch]
            for batch in shard_set(mixed, 2, **more)
        ]

    unbroken = give(num_batches=30)
    assert (
        sum(name.endswith('cut.tar') for batch in give(passes=1) for name in batch) == 1
    )  # one item says so
    for start in (1, 7, 20):
        assert give(start_batch=start, num_batches=30 - start) == unbroken[start:]


def test_gzip_shards_are_read(shards, tmp_path):
    import gzip

    (tmp_path / 'a.tar.gz').write_bytes(gzip.compress(open(shards[0], 'rb').read()))
    assert sorted(flat(files_of(shard_set(find_shards(tmp_path), 4, passes=1)))) == everything()[:9]


def test_shard_errors_come_before_work_starts(shards, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match='8 shards for 3 processes with 4 workers each; write 12 shards'):
        shard_set(shards, 2, num_workers=4, num_processes=3)
    with pytest.raises(ValueError, match='batch_size is 0; it must be a whole number from 1'):
        shard_set(shards, 0)
    with pytest.raises(ValueError, match='must not be negative'):
        shard_set(shards, 1, start_batch=-1)
    with pytest.raises(ValueError, match='goes with neither'):
        shard_set(shards, 1, passes=1, num_batches=3)
    with pytest.raises(ValueError, match='1 workers, the data set was told 2'):
        next(iter(shard_set(shards, 1, num_workers=2)))
    with pytest.raises(FileNotFoundError, match=r'part-008.tar: no such shard \(2 of 10 are missing\)'):
        find_shards(shards[0].replace('000', '{000..009}'))
    with pytest.raises(ValueError, match='runs a command'):
        open_source('pipe:touch executed')
    (tmp_path / 'x.tar').write_bytes(b'')
    with pytest.raises(ValueError, match='x.tar'):
        shard_set([str(tmp_path / 'x.tar')], 1)
    monkeypatch.setitem(sys.modules, 'datasets', None)
    with pytest.raises(
        ValueError, match=r"needs the package datasets; install it with: pip install 'pvtblip\[datasets\]'"
    ):
        read_hub_dataset('owner/name')


# ---------------------------------------------------------------- addresses, sizes, names and lines in shards

FOREIGN = [
    'pipe:touch {}/executed',
    'PIPE:touch {}/executed; echo .tar',
    ' pipe:touch {}/executed; echo .tar',
    'PiPe:touch {}/executed #.tar',
    '{{pipe:touch {}/executed,b}}.tar',
    'a.tar::pipe:touch {}/executed',
    '${{X:-pipe:touch {}/executed}}.tar',
    'gs://bucket/a.tar',
    'S3://bucket/{{000..127}}.tar',
    'hf://datasets/a.tar',
    'ftp://host/a.tar',
    'sftp://host/a.tar',
    'ais://bucket/a.tar',
    'htcp://host/a.tar',
    'file://host/a.tar',
    'http:///a.tar',
    'https:a.tar',
    'http://[a.tar',
    '\tpipe:touch {}/executed',
    'data:application/x-tar,a.tar',
]


@pytest.mark.parametrize('source', FOREIGN)
def test_foreign_addresses_are_refused_at_once(tmp_path, source):
    source = source.format(tmp_path)
    start = time.perf_counter()
    (tmp_path / 'a.tar').write_bytes(b'')
    ways = [
        lambda: open_source(source),
        lambda: find_shards(source),
        lambda: check_data(source, progress=False),
    ]
    if '{' not in source and '::' not in source:
        ways += [lambda: list(read_shard(source)), lambda: shard_set([source], 1)]
    for open_it in ways:
        with pytest.raises(ValueError) as caught:
            open_it()
        assert 'which is refused; give files or http addresses' in str(caught.value) and '\n' not in str(
            caught.value
        )
    assert not (tmp_path / 'executed').exists() and time.perf_counter() - start < 5


def test_safety_does_not_hang_on_assertions(tmp_path):
    code = (
        f"from pvtblip.sources import open_source\ntry: open_source('PIPE:touch {tmp_path}/executed; echo "
        ".tar')\nexcept ValueError as error: print(error)"
    )
    said = subprocess.run(
        [sys.executable, '-O', '-c', code],
        capture_output=True,
        text=True,
        env=os.environ | {'CUDA_VISIBLE_DEVICES': ''},
    )
    assert 'runs a command, which is refused' in said.stdout and not (tmp_path / 'executed').exists(), (
        said.stderr
    )


def test_patterns_of_shards_and_files_with_strange_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('part-08.tar', 'part-09.tar', 'part-10.tar', 'a-x.tar', 'a-y.tar', 'pipe:echo.tar'):
        pack(tmp_path / name, [('a', dict(png=png(1), txt=b'one'))])
    assert find_shards('part-{08..10}.tar') == ['part-08.tar', 'part-09.tar', 'part-10.tar']
    assert find_shards('{a-{x,y},part-08}.tar') == [
        'a-x.tar',
        'part-08.tar',
        'a-y.tar',
        'part-08.tar',
    ] and find_shards('a-x.tar::a-{y..y}.tar'.replace('{y..y}', 'y')) == ['a-x.tar', 'a-y.tar']
    assert find_shards(f'file://{tmp_path}/a-{{x,y}}.tar') == [f'{tmp_path}/a-x.tar', f'{tmp_path}/a-y.tar']
    assert (
        find_shards('pipe:echo.tar') == ['pipe:echo.tar'] and len(list(read_shard('pipe:echo.tar'))) == 1
    )  # a file that is there is a file
    for pattern, words in (
        ('a-{0..999999999}.tar', 'more than 1,000,000 shards'),
        ('a-{5..3}.tar', 'names no shards'),
        ('{a,b}' * 30 + '.tar', 'more than 20 braces'),
    ):
        with pytest.raises(ValueError, match=words):
            find_shards(pattern)


def test_shards_over_http_and_what_servers_do(tmp_path, shards):
    whole = open(shards[0], 'rb').read()

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == '/away.tar':
                self.send_response(302)
                self.send_header('Location', '/0.tar')
                self.end_headers()
            elif self.path == '/ftp.tar':
                self.send_response(302)
                self.send_header('Location', 'ftp://localhost/0.tar')
                self.end_headers()
            elif self.path in ('/0.tar', '/cut.tar'):
                self.send_response(200)
                self.send_header('Content-Length', str(len(whole)))
                self.end_headers()
                self.wfile.write(whole if self.path == '/0.tar' else whole[:4096])
            else:
                self.send_error(404)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def read(name):
            return list(read_shard(f'http://127.0.0.1:{server.server_address[1]}/{name}'))

        try:
            assert (
                [sample['__key__'] for sample in read('0.tar')]
                == [sample['__key__'] for sample in read('away.tar')]
                == everything()[:9]
            )
            assert (
                'Not Found' in read('gone.tar')[0].reason
                and 'ftp' in read('ftp.tar')[0].reason
                and isinstance(read('cut.tar')[-1], BrokenImage)
            )
        finally:
            server.shutdown()


def zeros(path, name, size, kind=tarfile.REGTYPE):
    "A small .tar.gz with one file of `size` zeros, and a whole sample behind it"
    with gzip.open(path, 'wb', 1) as out, tarfile.open(fileobj=out, mode='w|') as archive:
        entry = tarfile.TarInfo(name)
        entry.size, entry.type = size, kind
        archive.addfile(
            entry,
            type(
                'Zeros',
                (io.RawIOBase,),
                dict(readable=lambda self: True, read=lambda self, count=-1: bytes(count)),
            )(),
        )
        for suffix, content in dict(png=png(1), txt=b'one').items():
            add(archive, f'whole.{suffix}', content)


@pytest.mark.parametrize(
    'name, size', [('big.jpg', 2**27 + 1), ('big.txt', 2**20 + 1), ('big.json', 2**24), ('big.pickle', 2**27)]
)
def test_a_member_of_gigabytes_is_one_broken_sample(tmp_path, name, size):
    zeros(tmp_path / 'a.tar.gz', name, size)
    tracemalloc.start()
    *first, whole = read_shard(str(tmp_path / 'a.tar.gz'))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert whole['__key__'] == 'whole' and peak < 2**25
    if name != 'big.pickle':
        (items,) = shard_set([str(tmp_path / 'a.tar.gz')], 5, passes=1, shuffle=1)
        assert f'its .{name[4:]} has {size:,} bytes, more than' in items[0].reason and items[1][
            'captions'
        ] == ['one']
        assert f'{size:,} bytes' in check_data(tmp_path / 'a.tar.gz', progress=False).broken['a.tar.gz/big']


@pytest.mark.parametrize('kind', [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_name_of_gigabytes_is_a_damaged_shard(tmp_path, kind):
    zeros(tmp_path / 'a.tar.gz', 'x', 2**28, kind)
    tracemalloc.start()
    (broken,) = read_shard(str(tmp_path / 'a.tar.gz'))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 'a header of 268,435,456 bytes' in broken.reason and peak < 2**25


def test_the_limit_of_a_photo_is_named():
    assert MAX_PHOTO_BYTES == 2**27 and MAX_TEXT_BYTES == 2**20


def test_dots_in_keys_are_named_as_the_cause(tmp_path):
    pack(
        tmp_path / '0.tar',
        [(f'img.2019.05.{i}', dict(png=png(i), txt=b'one')) for i in range(3)]
        + [
            ('b', {'png': png(4), 'txt': b'b', '2.png': png(5), '2.txt': b'b2'}),
            ('c', {'png': png(6), 'seg.png': png(7), 'txt': b'c'}),
        ],
    )
    report = check_data(tmp_path / '0.tar', progress=False)
    assert (
        list(report.broken) == ['0.tar/img', '0.tar/b'] and report.captions == 1
    )  # a second picture without captions of its own is usual
    assert all(
        'a key ends at the first dot' in problem and 'write _ for the dots in names' in problem
        for problem in report.broken.values()
    )
    (items,) = shard_set([str(tmp_path / '0.tar')], 5, passes=1, shuffle=1)
    assert '.2019.05.0.png belongs to all photos of this name' in items[0].reason and items[2][
        'captions'
    ] == ['c']


@pytest.mark.parametrize(
    'files, wanted',
    [
        (dict(txt='A dog\nruns\r\nhome.'), ['A dog', 'runs', 'home.']),
        (dict(txt='A dog\rruns'), ['A dog', 'runs']),
        (dict(txt='\ufeffA dog'), ['A dog']),
        (dict(json=json.dumps(dict(caption='A dog\nruns'))), ['A dog runs']),
        (dict(txt='A dog\nruns', json=json.dumps(dict(caption='A dog\nruns', width=3))), ['A dog runs']),
        (dict(txt='A dog\nA cat', json=json.dumps(dict(caption='A bird'))), ['A dog', 'A cat']),
        (dict(txt='A dog', json='{'), ['A dog']),
        (dict(txt='\n', json=json.dumps(dict(caption='A bird'))), ['A bird']),
        (dict(json=json.dumps(dict(caption="['A dog', 'A cat']"))), ['A dog', 'A cat']),
        (dict(txt="['A dog'\n 'A cat']"), ['A dog', 'A cat']),
        (dict(json=json.dumps(dict(sentences=[dict(raw='A dog'), dict(raw='A cat')]))), ['A dog', 'A cat']),
    ],
)
def test_a_line_of_a_txt_is_a_caption_and_a_text_of_a_json_is_one(tmp_path, files, wanted):
    pack(
        tmp_path / '0.tar',
        [('a', dict(png=png(1)) | {suffix: content.encode() for suffix, content in files.items()})],
    )
    ((item,),) = shard_set([str(tmp_path / '0.tar')], 1, captions_per_image=len(wanted), passes=1)
    assert sorted(item['captions']) == sorted(wanted)


BAD = {
    'deep': (b'{"caption": ' + b'[' * 100_000, 'nested more than 100 levels'),
    'number': (b'{"caption": ' + b'9' * 5_000 + b'}', 'Exceeds the limit'),
    'long': (b'x' * 10_001, '10,001 characters'),
    'special': (b'[CLS] a dog [SEP]', "'[CLS]', a token"),
    'object': (b'{"caption": {"a": 1}}', 'not a string'),
    'half': (b'{"caption": "\xff"}', 'not UTF-8'),
    'utf16': ('a dog'.encode('utf-16'), 'UTF-16'),
}


@pytest.mark.parametrize('first', [False, True])
def test_a_bad_sample_is_one_broken_sample_and_ends_nothing(tmp_path, first):
    bad = [
        (name, {'png': png(2), 'json' if content[:1] == b'{' else 'txt': content})
        for name, (content, _) in BAD.items()
    ]
    good = [('good', dict(png=png(1), txt=b'one\ntwo'))]
    pack(tmp_path / '0.tar', bad + good if first else good + bad)
    data = shard_set([str(tmp_path / '0.tar')], 20, passes=1, shuffle=1)
    assert data.captions_per_image == 2  # the first that can be read says
    (items,) = data
    reasons = {item.file.partition('/')[2]: item.reason for item in items if isinstance(item, BrokenImage)}
    assert reasons.keys() == BAD.keys() and all(
        words in reasons[name] and '\n' not in reasons[name] for name, (_, words) in BAD.items()
    ), reasons
    report = check_data(tmp_path / '0.tar', progress=False)
    assert report.photos == len(BAD) + 1 and all(
        BAD[file.partition('/')[2]][1] in problem for file, problem in report.broken.items()
    )


def test_errors_of_shards_say_what_is_wrong(tmp_path):
    (tmp_path / 'folder.tar').mkdir()
    assert (
        'No such file or directory' in next(read_shard(str(tmp_path / 'gone.tar'))).reason
        and 'Is a directory' in next(read_shard(str(tmp_path / 'folder.tar'))).reason
    )
    pack(tmp_path / 'only.tar', [('a', dict(png=png(1)))])
    with pytest.raises(ValueError, match='only.tar/a: no captions'):
        shard_set([str(tmp_path / 'only.tar')], 1)


@pytest.mark.parametrize('suffix, kind', [('jfif', 'JPEG'), ('JPE', 'JPEG'), ('apng', 'PNG'), ('pgm', 'PPM')])
def test_other_names_of_the_same_formats_are_photos(tmp_path, suffix, kind):
    out = io.BytesIO()
    Image.new('L', (8, 8)).save(out, kind)
    pack(tmp_path / '0.tar', [('a', {suffix: out.getvalue(), 'txt': b'one'})])
    ((item,),) = shard_set([str(tmp_path / '0.tar')], 1, passes=1)
    assert item['captions'] == ['one'] and is_photo(f'x.{suffix}') and not is_photo(suffix)


# ---------------------------------------------------------------- tables of Hugging Face


def test_sequences_of_objects_and_other_columns(tmp_path):
    rows = dict(
        file_name=['a.png', 'b.png', 'c.png'],
        sentences=[[dict(raw='one', id=1), dict(raw='two', id=2)], [dict(raw='three', id=3)], []],
    )
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / 'list')
    objects = datasets.Features(
        file_name=datasets.Value('string'),
        sentences=datasets.Sequence(dict(raw=datasets.Value('string'), id=datasets.Value('int32'))),
    )
    datasets.Dataset.from_dict(
        rows
        | dict(
            sentences=[dict(raw=['one', 'two'], id=[1, 2]), dict(raw=['three'], id=[3]), dict(raw=[], id=[])]
        ),
        features=objects,
    ).save_to_disk(tmp_path / 'table')
    for name in ('list', 'table'):
        said = []
        records, _ = read_hub_dataset(tmp_path / name, images=tmp_path, log=said.append)
        assert [(record.file, record.captions) for record in records] == [
            ('a.png', ('one', 'two')),
            ('b.png', ('three',)),
        ] and '1 of 3 photos have none' in said[0]
    for column, words in (
        (dict(boxes=[1]), 'not a string; write a string, or a list of strings'),
        (b'x', 'not a string'),
    ):
        datasets.Dataset.from_dict(dict(file_name=['a.png'], caption=[column])).save_to_disk(tmp_path / 'odd')
        with pytest.raises(ValueError, match=words):
            read_hub_dataset(tmp_path / 'odd', images=tmp_path)
    datasets.Dataset.from_dict(dict(file_name=['a.png'], caption=["['x', 'y']"])).with_format(
        'numpy'
    ).save_to_disk(tmp_path / 'numpy')
    assert read_hub_dataset(tmp_path / 'numpy', images=tmp_path)[0][0].captions == ('x', 'y')


@pytest.mark.parametrize('file', ['data/train-00000-of-00001.parquet', 'default/train/0000.parquet'])
@pytest.mark.parametrize('typed', [True, False])
def test_a_downloaded_folder_with_parquet_files_is_opened(tmp_path, monkeypatch, file, typed):
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', str(tmp_path / 'cache'))
    place = tmp_path / 'flickr' / file
    place.parent.mkdir(parents=True)
    table = datasets.Dataset.from_dict(
        dict(image=[dict(bytes=png(i), path=None) for i in range(2)], caption=['one', 'two'])
    )
    (table.cast_column('image', datasets.Image()) if typed else table).to_parquet(place)
    (tmp_path / 'flickr' / 'README.md').write_text(
        "---\nconfigs: [{config_name: default, data_files: 'http://localhost/x'}]\n---\n"
    )
    source = open_source(tmp_path / 'flickr')
    assert [(record.file, record.captions, record.split) for record in source.records] == [
        ('train/000000', ('one',), 'train'),
        ('train/000001', ('two',), 'train'),
    ]
    assert torch.equal(
        CaptionDataset(source.records, source.images, tiny_load)[1]['pixel_values'],
        tiny_load(Image.open(io.BytesIO(png(1)))),
    )


def test_only_names_are_looked_up_on_the_hub():
    for name in ('gs://bucket/x', 'hf://datasets/x', 'https://host/x', 'a/b/c', '../x y'):
        with pytest.raises(ValueError, match='neither a folder nor a name on the hub'):
            read_hub_dataset(name)


def test_hub_rows_join_by_file_name_and_say_what_is_wrong(tmp_path):
    photos = [dict(bytes=png(i), path=None) for i in (1, 1, 2)]
    table = datasets.Dataset.from_dict(
        dict(
            image=photos,
            filename=['a.png', 'a.png', 'b.png'],
            caption=['one', 'two', 'three'],
            split=['train', 'train', 'val'],
        )
    )
    table.cast_column('image', datasets.Image()).save_to_disk(tmp_path / 'good')
    records, images = read_hub_dataset(tmp_path / 'good')
    assert records == [Record('a.png', ('one', 'two'), 1, 'train'), Record('b.png', ('three',), 3, 'val')]
    data = CaptionDataset(records, images, tiny_load, captions_per_image=2)
    assert torch.equal(data[1]['pixel_values'], tiny_load(Image.open(io.BytesIO(png(2)))))
    (batch,) = DataLoader(
        data,
        batch_size=2,
        num_workers=1,
        collate_fn=Collate(CaptionTokenizer()),
        multiprocessing_context='spawn',
    )
    assert batch['files'] == ['a.png', 'b.png']
    table.remove_columns('image').save_to_disk(tmp_path / 'without')
    with pytest.raises(ValueError, match='no column holds photos'):
        read_hub_dataset(tmp_path / 'without')
    table.remove_columns('caption').cast_column('image', datasets.Image()).save_to_disk(tmp_path / 'silent')
    with pytest.raises(ValueError, match='silent:1: no field for the caption'):
        read_hub_dataset(tmp_path / 'silent')
    datasets.Dataset.from_dict(
        dict(image=[None], text=['x']),
        features=datasets.Features(image=datasets.Image(), text=datasets.Value('string')),
    ).save_to_disk(tmp_path / 'none')
    gone = CaptionDataset(*read_hub_dataset(tmp_path / 'none'), tiny_load)[0]
    assert isinstance(gone, BrokenImage) and 'has no photo' in gone.reason
    with pytest.raises(ValueError, match="no split 'test'"):
        read_hub_dataset(tmp_path / 'good', split='test')
    (tmp_path / 'good' / 'data-00000-of-00001.arrow').write_bytes(b'damaged')
    with pytest.raises(ValueError, match='the datasets library cannot load it'):
        open_source(tmp_path / 'good')


def test_numbered_captions_and_photos_in_a_folder(tmp_path):
    (tmp_path / 'a.png').write_bytes(png(1))
    datasets.Dataset.from_dict(dict(file_name=['a.png'], caption_0=['one'], caption_1=['two'])).save_to_disk(
        tmp_path / 'table'
    )
    source = open_source(tmp_path / 'table', images=tmp_path)
    assert source.records[0].captions == ('one', 'two') and source.images == tmp_path


@pytest.mark.parametrize('name', ['owner/captions.json', 'nowhere/x/y', 'captions', 'tests/nothing'])
def test_a_mistyped_path_is_never_looked_up_in_the_network(tmp_path, monkeypatch, name):
    (tmp_path / 'tests').mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match='no such file'):
        open_source(name)


# ---------------------------------------------------------------- the report


def photo(kind='JPEG', size=(40, 30), mode='RGB', **options):
    out = io.BytesIO()
    Image.effect_noise(size, 80).convert(mode).save(out, kind, **options)
    return out.getvalue()


def faults():
    "file -> (content, words of the report), or None as content for what is made otherwise"
    jpeg, png, webp = photo(), photo('PNG'), photo('WEBP')
    return {
        'empty.jpg': (b'', 'empty'),
        'page.jpg': (b'<html>404</html>', 'not an image'),
        'text.png': (b'hello', 'not an image'),
        'head.jpg': (jpeg[:20], ''),
        'half.jpg': (jpeg[: len(jpeg) // 2], 'truncated'),
        'nearly.jpg': (jpeg[:-40], 'truncated'),
        'half.png': (png[: len(png) // 2], 'truncated'),
        'half.webp': (webp[: len(webp) // 2], ''),
        'zeros.jpg': (bytes(500), 'not an image'),
        'postscript.jpg': (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', 'not an image'),
        'bomb.png': (bomb(), 'pixels'),
    }


def bomb():
    "A PNG that says it has 40,000 x 40,000 pixels"
    import struct, zlib

    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    return (
        b'\x89PNG\r\n\x1a\n'
        + chunk(b'IHDR', struct.pack('>IIBBBBB', 40_000, 40_000, 8, 2, 0, 0, 0))
        + chunk(b'IDAT', zlib.compress(b'0'))
        + chunk(b'IEND', b'')
    )


@pytest.mark.parametrize('full', [False, True])
def test_every_kind_of_broken_photo_in_a_folder_of_1000(tmp_path, full):
    images = tmp_path / 'photos'
    wanted = {}
    images.mkdir()
    captions = {f'{i:04}.jpg': [f'photo {i}'] for i in range(984)}
    for file in captions:
        (images / file).write_bytes(photo(size=(8, 8)))
    for file, (content, words) in faults().items():
        (images / file).write_bytes(content)
        wanted[file] = words
    (images / 'loop.jpg').symlink_to('loop2.jpg')
    (images / 'loop2.jpg').symlink_to('loop.jpg')
    (images / 'dangling.jpg').symlink_to('nowhere.jpg')
    (images / 'folder.jpg').mkdir()
    os.mkfifo(images / 'pipe.jpg')  # would wait for ever
    wanted |= {
        'loop.jpg': 'loop of symbolic links',
        'dangling.jpg': 'link to a file that is missing',
        'folder.jpg': 'a folder',
        'pipe.jpg': 'no regular file',
        'gone.jpg': 'missing',
    }
    (tmp_path / 'c.json').write_text(json.dumps(captions | {file: ['x'] for file in wanted}))
    assert len(captions) + len(wanted) == 1000
    report = check_data(tmp_path / 'c.json', images, full=full, progress=False)
    assert report.broken.keys() == wanted.keys()
    for file, words in wanted.items():
        assert words in report.broken[file], (file, report.broken[file])
    assert json.loads(json.dumps(report.to_dict()))[
        'photos'
    ] == 1000 and 'broken or missing photos: 16 of 1,000' in str(report)


@pytest.mark.parametrize(
    'kind, mode, options',
    [
        ('JPEG', 'RGB', {}),
        ('JPEG', 'L', dict(progressive=True)),
        ('JPEG', 'CMYK', {}),
        ('PNG', 'RGBA', {}),
        ('PNG', 'P', {}),
        ('WEBP', 'RGB', {}),
        ('WEBP', 'RGB', dict(lossless=True)),
        ('GIF', 'L', {}),
        ('BMP', 'RGB', {}),
        ('TIFF', 'RGB', {}),
        ('PPM', 'RGB', {}),
    ],
)
def test_whole_photos_of_every_format_pass(tmp_path, kind, mode, options):
    content = photo(kind, mode=mode, **options)
    (tmp_path / 'a').write_bytes(content)
    (tmp_path / 'tail').write_bytes(content + bytes(3000))  # some cameras write more behind the end
    for full in (False, True):
        assert photo_problem('a', tmp_path / 'a', full) is None and photo_problem('a', content, full) is None
        assert photo_problem('tail', tmp_path / 'tail', full) is None
    assert open_photo('a', content).size == (40, 30)


def test_damage_in_the_middle_is_found_by_full(tmp_path):
    content = bytearray(photo('PNG', size=(300, 300)))
    content[len(content) // 2] ^= 255
    (tmp_path / 'a.png').write_bytes(content)
    assert (
        photo_problem('a.png', tmp_path / 'a.png') is None
    )  # header and end are whole: what headers first costs
    assert 'damaged' in photo_problem('a.png', tmp_path / 'a.png', full=True)


def test_a_report_obeys_no_terminal_and_names_what_is_near(tmp_path):
    (tmp_path / 'a.jpg').write_bytes(photo())
    entries = [
        dict(file='a.JPG', split='\u202etrain', captions=['one']),
        dict(file='b.jpg', split='x', captions=['\u200eword']),
        dict(file='c.jpg', split='x', captions=[]),
    ]
    source = tmp_path / 'c\x1b[2J.jsonl'
    source.write_text('\n'.join(map(json.dumps, entries)))
    report = check_data(source, tmp_path, progress=False)
    assert report.broken == {'a.JPG': "missing; 'a.jpg' is there", 'b.jpg': 'missing'} and 'look at: ' in str(
        report
    )
    assert any("no captions for 'c.jpg'; 1 of 3 photos have none" in remark for remark in report.remarks)
    assert not re.search('[\x00-\x09\x0b-\x1f\u202e\u200e]', str(report)) and all(
        line.strip() for line in str(report).split('\n')
    )
    pack(
        tmp_path / '0.tar',
        [('a\x1b[31m\nb', dict(jpg=photo(), txt=b'one')), ('c\x07', dict(jpg=b'<html>', txt=b'one'))],
    )
    assert not re.search('[\x00-\x09\x0b-\x1f]', str(check_data(tmp_path / '0.tar', progress=False)))


def test_duplicates_lengths_and_scripts(tmp_path):
    def write(name, content):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)

    write('a.jpg', one := photo()), write('b.jpg', one), write('c.jpg', photo()), write('sub/a.jpg', photo())
    lines = [
        ('a.jpg', 'train', ['A dog', 'Собака 🐶']),
        ('b.jpg', 'val', ['a cat']),
        ('c.jpg', 'train', ['A CAT']),
        ('sub/a.jpg', 'train', ['word ' * 1_900]),
    ]
    (tmp_path / 'c.jsonl').write_text(
        '\n'.join(json.dumps(dict(file=f, split=s, captions=c)) for f, s, c in lines)
    )
    report = check_data(
        tmp_path / 'c.jsonl', tmp_path, tokenizer=CaptionTokenizer(max_length=20), progress=False
    )
    assert report.duplicates == {
        'same name': [['a.jpg', 'sub/a.jpg']],
        'same bytes': [['a.jpg', 'b.jpg']],
        'same captions': [['b.jpg', 'c.jpg']],
    }
    assert report.across_splits == {
        'same name': [],
        'same bytes': [['a.jpg', 'b.jpg']],
        'same captions': [['b.jpg', 'c.jpg']],
    }
    assert (
        report.text['truncated'] == 0.2
        and report.text['words']['max'] == 1_900
        and report.text['unknown_words'] == {'🐶': 1}
    )
    assert (report.splits, report.splits_by) == (dict(train=3, val=1), 'stated')
    assert any(
        'in more than one split (2)' in remark for remark in report.remarks
    ) and '20.0% of the captions lose their end' in str(report)
    by_name = check_data(tmp_path / 'c.jsonl', tmp_path, split='train', progress=False)
    assert by_name.photos == 3 and by_name.across_splits['same bytes'] == []


def test_truncation_is_what_the_tokenizer_does():
    "A caption counts as truncated exactly when its row has lost its [SEP]"
    tokenizer = CaptionTokenizer(max_length=12)
    from pvtblip.data_check import caption_statistics

    captions = ['dog ' * count for count in range(1, 12)]
    cut = sum(tokenizer.sep_token_id not in row.tolist() for row in tokenizer(captions)['input_ids'])
    assert 0 < cut < 11 and caption_statistics(captions, tokenizer)['truncated'] == cut / 11


def test_contact_sheet_with_odd_captions(tmp_path):
    (tmp_path / 'a.jpg').write_bytes(photo(size=(900, 20)))
    contact_sheet(
        [
            ('$x_/a.jpg', tmp_path / 'a.jpg', ['costs $5 and $\\frac$', '一只狗 ' * 50]),
            ('b', photo('PNG', mode='RGBA'), ['one']),
        ]
        * 5,
        tmp_path / 'sheet.png',
    )
    with Image.open(tmp_path / 'sheet.png') as sheet:
        assert sheet.format == 'PNG' and sheet.width == 800 and sheet.height == 720
    (tmp_path / 'c.json').write_text('{"gone.jpg": ["x"]}')
    with pytest.raises(ValueError, match='a contact sheet needs photos'):
        check_data(tmp_path / 'c.json', sheet=tmp_path / 's.png', progress=False)
    # the report is not lost for want of a picture
    report = check_data(tmp_path / 'c.json', tmp_path, sheet=tmp_path / 's.png', progress=False)
    assert (
        list(report.broken) == ['gone.jpg']
        and 'no contact sheet' in str(report)
        and not (tmp_path / 's.png').exists()
    )


def test_photos_that_vanish_after_the_check(tmp_path):
    (tmp_path / 'a.jpg').write_bytes(photo())
    (tmp_path / 'c.json').write_text('{"a.jpg": ["x"]}')
    source = open_source(tmp_path / 'c.json', tmp_path)
    assert not check_data(tmp_path / 'c.json', tmp_path, progress=False).broken
    (tmp_path / 'a.jpg').unlink()
    from pvtblip.pvt_encoder import load_image

    gone = CaptionDataset(source.records, source.images, lambda path: tiny_load(load_image(path)))[0]
    assert isinstance(gone, BrokenImage) and 'no such image file' in gone.reason


# ---------------------------------------------------------------- the report on shards


def pack(path, samples):
    "A shard of (key, {suffix: content}), as they come"
    with tarfile.open(path, 'w') as archive:
        for key, files in samples:
            for suffix, content in files.items():
                add(archive, f'{key}.{suffix}', content)


def test_shards_and_a_folder_of_the_same_photos_have_the_same_report(tmp_path):
    (tmp_path / 'photos').mkdir()
    captions = {
        f'{i:03}.jpg': [f'photo number {i}', '一只狗', 'word ' * (i % 50 + 1)][: i % 3 + 1]
        for i in range(150)
    }
    contents = {file: photo(size=(8, 8)) for file in captions} | {
        '007.jpg': b'',
        '017.jpg': b'<html>',
        '027.jpg': photo()[:400],
    }
    for file, content in contents.items():
        (tmp_path / 'photos' / file).write_bytes(content)
    (tmp_path / 'c.json').write_text(json.dumps(captions))
    for shard in range(3):
        pack(
            tmp_path / f'{shard}.tar',
            [
                (file[:3], dict(jpg=contents[file], txt='\n'.join(own).encode()))
                for file, own in list(captions.items())[50 * shard : 50 * shard + 50]
            ],
        )
    folder = check_data(tmp_path / 'c.json', tmp_path / 'photos', progress=False)
    shards = check_data(tmp_path / '{0..2}.tar', progress=False)
    assert shards.text == folder.text and shards.captions_per_photo == folder.captions_per_photo
    assert (shards.photos, shards.captions, shards.photos_checked) == (150, folder.captions, 150)
    assert {file.partition('/')[2]: why for file, why in shards.broken.items()} == folder.broken and len(
        folder.broken
    ) == 3
    assert (
        shards.splits == dict(training=100, validation=50)
        and 'the last shard' in str(shards)
        and json.loads(json.dumps(shards.to_dict()))
    )


def test_doubles_and_holes_of_shards_are_named(tmp_path):
    one = photo()
    text = b'a dog'
    pack(
        tmp_path / '0.tar',
        [
            ('a', dict(jpg=one, txt=b'one')),
            ('b', dict(jpg=photo(), txt=b'two')),
            ('a', dict(jpg=photo(), txt=b'three')),
            ('no_photo', dict(txt=b'words')),
            ('none', dict(jpg=photo(), txt=b' ')),
            ('list', dict(jpg=photo(), json=b'[]')),
            ('bad', dict(jpg=photo(), json=b'{')),
        ],
    )
    pack(
        tmp_path / '1.tar',
        [
            ('b', dict(jpg=photo(), txt=b'four')),
            ('c', dict(jpg=photo(), txt=text)),
            ('c', dict(jpg=photo(), txt=text)),
            ('d', dict(jpg=photo(), txt=text)),
        ],
    )
    pack(tmp_path / '2.tar', [])
    pack(tmp_path / '3.tar', [('e', dict(jpg=one, txt=text)), ('f', dict(png=photo('PNG'), txt=b'A DOG'))])
    report = check_data(tmp_path / '{0..3}.tar', sheet=tmp_path / 'sheet.png', progress=False)
    for name, words in {
        '0.tar/no_photo': 'no photo',
        '0.tar/none': 'no captions',
        '0.tar/list': 'is no object',
        '0.tar/bad': 'not JSON',
        '1.tar/c': 'duplicate file name',
        str(tmp_path / '2.tar'): 'no photos in this shard',
    }.items():
        assert words in report.broken.pop(name)
    assert not report.broken and report.photos == 12
    assert report.duplicates == {
        'same key': [['0.tar/a.jpg', '0.tar/a.jpg'], ['0.tar/b.jpg', '1.tar/b.jpg']],
        'same bytes': [['0.tar/a.jpg', '3.tar/e.jpg']],
        'same captions': [['1.tar/d.jpg', '3.tar/e.jpg', '3.tar/f.png']],
    }
    assert report.across_splits == {
        'same key': [],
        'same bytes': [['0.tar/a.jpg', '3.tar/e.jpg']],
        'same captions': [['1.tar/d.jpg', '3.tar/e.jpg', '3.tar/f.png']],
    }
    with Image.open(tmp_path / 'sheet.png') as sheet:
        assert sheet.format == 'PNG'
    pack(tmp_path / 'mute.tar', [('a', dict(jpg=one))])
    with pytest.raises(ValueError, match='not one caption can be read.*no captions'):
        check_data(tmp_path / 'mute.tar', progress=False)


def test_the_check_of_shards_holds_few_photos_at_a_time(tmp_path):
    import tracemalloc

    small = photo()
    for shard in range(4):
        pack(
            tmp_path / f'{shard}.tar',
            [(f'{i}', dict(jpg=small + os.urandom(100_000), txt=b'a dog')) for i in range(150)],
        )
    check_data(tmp_path / '{0..0}.tar', progress=False)  # what is loaded once
    tracemalloc.start()
    report = check_data(tmp_path / '{0..3}.tar', progress=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (
        report.photos == 600 and not report.broken and not report.duplicates['same bytes'] and peak < 20e6
    )  # of 60 MB


def test_a_contact_sheet_leaves_out_what_only_decoding_finds(tmp_path):
    content = bytearray(photo('PNG', size=(300, 300)))
    content[len(content) // 2] ^= 255
    (tmp_path / 'a.png').write_bytes(content)
    (tmp_path / 'b.png').write_bytes(photo('PNG'))
    (tmp_path / 'c.json').write_text('{"a.png": ["x"], "b.png": ["y"]}')
    report = check_data(tmp_path / 'c.json', tmp_path, sheet=tmp_path / 's.png', progress=False)
    assert (
        list(report.broken) == ['a.png']
        and (tmp_path / 's.png').exists()
        and '1 photos cannot be read' in str(report)
    )


@pytest.mark.parametrize('full', (False, True))
def test_the_check_and_the_loader_agree_about_what_surrounds_the_pixels(full, tmp_path):
    """Broken EXIF, a megabyte of text in a PNG: sound photos for both. A damaged beginning, a HEIC file: the
    same words from both.
    """
    picture = Image.effect_noise((40, 30), 80).convert('RGB')
    picture.save(tmp_path / 'exif.jpg', exif=b'Exif\0\0garbagegarbage')
    picture.save(tmp_path / 'text.png')
    plain = (tmp_path / 'text.png').read_bytes()
    note = b'Comment\0\0' + zlib.compress(b'\0' * 2_000_000)
    chunk = len(note).to_bytes(4, 'big') + b'zTXt' + note + zlib.crc32(b'zTXt' + note).to_bytes(4, 'big')
    (tmp_path / 'text.png').write_bytes(plain[:33] + chunk + plain[33:])
    # as a transfer in text mode leaves it
    (tmp_path / 'start.png').write_bytes(plain.replace(b'\r\n', b'\n', 1))
    (tmp_path / 'phone.jpg').write_bytes(b'\0\0\0\x18ftypheic\0\0\0\0mif1heic')
    for name in ('exif.jpg', 'text.png'):
        for photo in (tmp_path / name, (tmp_path / name).read_bytes()):
            assert photo_problem(name, photo, full) is None
        assert (
            load_image(tmp_path / name).size
            == open_photo(name, (tmp_path / name).read_bytes()).size
            == (40, 30)
        )
    for name, words in (
        ('start.png', 'damaged at its beginning'),
        ('phone.jpg', 'HEIC, as iPhones write photos; save it as JPEG'),
    ):
        with pytest.raises(ValueError, match=words) as error:
            load_image(tmp_path / name)
        problems = {
            photo_problem(name, photo, full) for photo in (tmp_path / name, (tmp_path / name).read_bytes())
        }
        assert problems == {str(error.value).removeprefix(f'{tmp_path / name}: ')}
