"""Many photos: every kind of input, killed and continued runs, several processes, one line a photo whatever
it is.
"""

import io, json, os, random, shutil, signal, subprocess, sys, tarfile, time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from pvtblip.confidence import Calibration
from pvtblip.decoder import Captioner, CaptionerConfig, DecoderConfig
from pvtblip.generation import GenerationConfig, generate, generate_caption, process_image
from pvtblip.pipeline import (
    CaptionRun,
    CaptionedBatch,
    LineWriter,
    Photo,
    caption_batches,
    caption_files,
    caption_many,
    check_inputs,
    count_photos,
    cut_half_line,
    default_workers,
    describe_skipped,
    gather_parts,
    json_line,
    list_photos,
    photos_in_list,
)
from pvtblip.fast import fingerprint
from pvtblip.files import only_writer
from pvtblip.shapes import make_scene
from pvtblip.tokenizer import CaptionTokenizer


def how(**settings):
    "A `CaptionRun` in one process."
    return CaptionRun(**dict(num_workers=0) | settings)


QUIET = dict(progress=False, log=lambda line: None, run=how())


def babbler(seed=0):
    """A tiny captioner with large random weights: it says something else of every photo, so that a mix-up
    shows.
    """
    torch.manual_seed(seed)
    words = sorted(
        set(
            CaptionTokenizer()([caption for i in range(50) for caption in make_scene(0, i).captions])[
                'input_ids'
            ]
            .unique()
            .tolist()
        )
        - {0}
    )
    return Captioner(
        CaptionerConfig.tiny(
            max_length=12, decoder=DecoderConfig.tiny(initializer_range=0.2), output_vocabulary=words
        )
    ).eval()


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp('model')
    babbler().save_pretrained(folder)
    return folder


@pytest.fixture(scope='module')
def captioner(model):
    return Captioner.from_pretrained(model)


def photos(folder, number=24, size=(200, 150)):
    folder.mkdir(parents=True)
    for i in range(number):
        Image.fromarray(make_scene(0, i, image_size=128).image).resize(size).save(folder / f'{i:02}.jpg')
    return folder


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return photos(tmp_path_factory.mktemp('data') / 'photos')


def entries(file):
    return [json.loads(line) for line in Path(file).read_bytes().splitlines()]


def command(*arguments):
    return [sys.executable, '-m', 'pvtblip', 'caption', *map(str, arguments)]


def run(*arguments, **options):
    return subprocess.run(command(*arguments), capture_output=True, timeout=300, **options)


# the captions are those of one photo at a time
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize('num_workers', [0, 2])
def test_pixels_and_captions_are_those_of_one_call(folder, model, captioner, tmp_path, num_workers):
    files = sorted(folder.iterdir())
    batches = list(
        caption_batches(files, captioner, GenerationConfig(num_beams=3).check(captioner), 7, num_workers)
    )
    assert [photo for batch in batches for photo in batch.photos] == files and [
        len(batch.photos) for batch in batches
    ] == [7, 7, 7, 3]
    for batch in batches:
        torch.testing.assert_close(batch.pixel_values, process_image(batch.photos, captioner), rtol=0, atol=0)
    said = generate_caption(captioner, files)
    assert len(set(said)) > 12
    tell = QUIET | dict(run=how(num_workers=num_workers))
    assert caption_many([folder], model, tmp_path / 'out.jsonl', **tell) == 0
    assert [(entry['image'], entry['caption']) for entry in entries(tmp_path / 'out.jsonl')] == [
        (str(file), caption) for file, caption in zip(files, said)
    ]
    lines = []
    assert caption_files([folder], model, how(num_workers=num_workers), out=lines.append) == 0
    assert lines == [f'{file}\t{caption}' for file, caption in zip(files, said)]


def test_what_a_line_holds(folder, model, tmp_path):
    run = how(generation=GenerationConfig(num_beams=3, num_return_sequences=2))
    caption_many([folder / '00.jpg'], model, tmp_path / 'out.jsonl', tokens=True, **QUIET | dict(run=run))
    (entry,) = entries(tmp_path / 'out.jsonl')
    assert (
        list(entry) == ['image', 'caption', 'score', 'confidence', 'tokens', 'more']
        and len(entry['more']) == 1
    )
    assert entry['confidence'] == pytest.approx(
        np.mean([token['logprob'] for token in entry['tokens']]), abs=1e-5
    ) and entry['score'] == pytest.approx(entry['confidence'], abs=1e-5)
    assert entry['more'][0]['score'] <= entry['score']


def dead_end(captioner, files, **options):
    """A rule that some photos cannot keep: greedy search says a word behind which nothing is allowed.
    (options, the photos that keep it)
    """
    said = [
        generate(captioner, process_image(file, captioner), **options)
        .sequences[0, :, captioner.tokenizer.prompt_length : -1]
        .flatten()
        .tolist()
        for file in files
    ]
    word = next(id for id in said[2] if 5 < sum(id in ids for ids in said) < len(files))
    options = GenerationConfig(
        **options, bad_words_ids=[[word, other] for other in captioner.output_ids.tolist()]
    ).check(captioner)
    return options, [file for file, ids in zip(files, said) if word not in ids]


def test_a_photo_without_a_caption_that_keeps_the_rules_is_one_failure(folder, model, captioner, tmp_path):
    place = shutil.copytree(folder, tmp_path / 'photos')
    (place / '05.jpg').write_bytes(b'')
    files = sorted(place.iterdir())
    options, good = dead_end(
        captioner, [file for file in files if file.name != '05.jpg'], output_attentions=True
    )
    for size in (1, 5, 24):
        batches = list(caption_batches(files, captioner, options, size))
        assert [len(batch.photos) for batch in batches] == (
            [size] * (24 // size) + [24 % size] * (24 % size > 0)
        ) and [photo for batch in batches for photo in batch.read] == good
        for batch in batches:
            if not batch.read:
                assert batch.output is batch.pixel_values is None
                continue
            torch.testing.assert_close(
                batch.pixel_values, process_image(batch.read, captioner), rtol=0, atol=0
            )
            alone = generate(captioner, batch.pixel_values, output_attentions=True)
            assert torch.equal(batch.output.sequences, alone.sequences)
            torch.testing.assert_close(batch.output.token_logprobs, alone.token_logprobs, rtol=0, atol=1e-5)
            torch.testing.assert_close(batch.output.scores, alone.scores, rtol=0, atol=1e-5)
            for one, other, ids in zip(
                batch.output.cross_attentions, alone.cross_attentions, alone.sequences
            ):
                last = (
                    int((ids[0] == captioner.tokenizer.sep_token_id).nonzero()[-1])
                    if captioner.tokenizer.sep_token_id in ids[0]
                    else ids.shape[1] - 1
                )
                torch.testing.assert_close(one[:, :, :, :last], other[:, :, :, :last], rtol=0, atol=1e-4)
    tell = QUIET | dict(run=how(generation=replace(options, output_attentions=False), batch_size=5))
    assert caption_many([place], model, tmp_path / 'out.jsonl', **tell) == 24 - len(good)
    found = {entry['image']: entry for entry in entries(tmp_path / 'out.jsonl')}
    assert [name for name, entry in found.items() if 'caption' in entry] == list(map(str, good)) and list(
        found
    ) == list(map(str, files))
    problems = [
        entry['error']
        for entry in found.values()
        if 'error' in entry and not entry['image'].endswith('05.jpg')
    ]
    assert len(problems) == 23 - len(good) and all(
        problem.startswith('no word is left at position') for problem in problems
    ), problems
    whole = (tmp_path / 'out.jsonl').read_bytes()  # cut in the middle of a line, and continued
    (tmp_path / 'out.jsonl').write_bytes(b''.join(whole.splitlines(keepends=True)[:10]) + b'{"ima')
    caption_many([place], model, tmp_path / 'out.jsonl', **tell)
    assert (tmp_path / 'out.jsonl').read_bytes() == whole


def test_no_photo_keeps_the_rules_and_options_without_sense(folder, model, captioner):
    files = sorted(folder.iterdir())[:3]
    errors = []
    nothing = GenerationConfig(
        num_beams=3, bad_words_ids=[[id] for id in captioner.output_ids.tolist()], min_length=8
    )
    assert caption_files(files, model, how(generation=nothing), error=errors.append) == 3
    assert [error.split(': ')[0] for error in errors] == list(map(str, files)) and all(
        ': no 1 caption(s) of at most' in error for error in errors
    ), errors
    with pytest.raises(ValueError, match='num_beams is 0'):
        next(caption_batches(files, captioner, GenerationConfig(num_beams=0)))


def test_the_random_numbers_of_the_process_are_left_alone(folder, captioner):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    list(caption_batches([folder / '00.jpg'], captioner, GenerationConfig().check(captioner), num_workers=1))
    assert torch.equal(torch.get_rng_state(), state)


# draws ------------------------------------------------------------------------------------------------------
# ----------------------


def drawn(place, model, file, **options):
    run = how(generation=GenerationConfig(do_sample=True, num_return_sequences=2), **options)
    assert caption_many([place], model, file, **QUIET | dict(run=run)) == 0
    return {
        entry.pop('image'): [
            (one['caption'], pytest.approx(one['score'], abs=1e-5)) for one in (entry, *entry['more'])
        ]
        for entry in entries(file)
    }


@pytest.fixture
def named(folder, monkeypatch):
    """The folder by a name that is the same in every run: draws hang on names, and so would what these tests
    see.
    """
    monkeypatch.chdir(folder.parent)
    return Path(folder.name)


def test_draws_hang_on_seed_and_name_alone(named, model, tmp_path):
    found = drawn(named, model, tmp_path / 'whole.jsonl', batch_size=24)
    assert all(first != second for (first, _), (second, _) in found.values())  # two draws of a photo are two
    for i, options in enumerate((dict(batch_size=1), dict(batch_size=5, num_workers=2))):
        assert drawn(named, model, tmp_path / f'{i}.jsonl', **options) == found
    other = drawn(named, model, tmp_path / 'other.jsonl', seed=1)
    assert other.keys() == found.keys() and sum(other[name][0][0] == found[name][0][0] for name in found) < 6
    few = tmp_path / 'few.txt'
    few.write_text(f'{named}/07.jpg\n')
    assert drawn(few, model, tmp_path / 'few.jsonl') == {f'{named}/07.jpg': found[f'{named}/07.jpg']}
    with pytest.raises(ValueError, match='seed: 0 then, 3 now'):
        drawn(named, model, tmp_path / 'whole.jsonl', seed=3)
    lines = []
    run = how(generation=GenerationConfig(do_sample=True), batch_size=3, seed=1)
    caption_files([named], model, run, out=lines.append)
    again = []
    run = how(generation=GenerationConfig(do_sample=True), batch_size=7, seed=1)
    caption_files([named], model, run, out=again.append)
    assert lines == again


def test_the_same_photo_under_two_names_is_drawn_twice(folder, captioner):
    content = (folder / '00.jpg').read_bytes()
    (batch,) = caption_batches(
        [Photo(f'{i}', content) for i in range(16)], captioner, GenerationConfig(do_sample=True)
    )
    assert len(set(captioner.tokenizer.decode_batch(batch.output.sequences[:, 0]))) > 8


def test_draws_of_photos_beside_one_that_fails_are_theirs(named, captioner):
    files = sorted(named.iterdir())
    (plain,) = caption_batches(files, captioner, GenerationConfig(do_sample=True), 24)
    said = plain.output.sequences[:, 0].tolist()
    word = next(
        id for id in said[0][captioner.tokenizer.prompt_length :] if not all(id in ids for ids in said)
    )
    (limited,) = caption_batches(
        files,
        captioner,
        GenerationConfig(
            do_sample=True, bad_words_ids=[[word, other] for other in captioner.output_ids.tolist()]
        ),
        24,
    )
    good = [ids for ids in said if word not in ids]
    assert 0 < len(good) < 24 and captioner.tokenizer.decode_batch(
        limited.output.sequences[:, 0]
    ) == captioner.tokenizer.decode_batch(torch.tensor(good))
    assert limited.read == [file for file, ids in zip(files, said) if word not in ids]


def test_a_run_of_draws_that_was_killed_goes_on_to_the_same_bytes(folder, model, tmp_path):
    arguments = [
        folder,
        '--model',
        model,
        '--batch-size',
        3,
        '--workers',
        1,
        '--set',
        'do_sample=true',
        '--seed',
        5,
        '--jsonl',
    ]
    tell = QUIET | dict(run=how(generation=GenerationConfig(do_sample=True), batch_size=3, seed=5))
    assert caption_many([folder], model, tmp_path / 'whole.jsonl', **tell) == 0
    out = tmp_path / 'killed.jsonl'
    process = start(*arguments, out)
    wait_for_lines(process, out, 6)
    process.kill()
    process.wait()
    assert 6 <= out.read_bytes().count(b'\n') < 24
    done = run(*arguments, out)
    assert done.returncode == 0 and out.read_bytes() == (tmp_path / 'whole.jsonl').read_bytes(), done.stderr


# another type of numbers
# -----------------------------------------------------------------------------------------------------------


def test_dtype(folder, model, tmp_path):
    half = Captioner.from_pretrained(model).to(torch.bfloat16)
    said = generate_caption(half, sorted(folder.iterdir()))
    lines = []
    assert caption_files([folder], model, how(dtype='bfloat16'), out=lines.append) == 0
    assert [line.split('\t')[1] for line in lines] == said
    caption_many([folder], model, tmp_path / 'half.jsonl', **QUIET | dict(run=how(dtype='bfloat16')))
    assert [entry['caption'] for entry in entries(tmp_path / 'half.jsonl')] == said
    with pytest.raises(ValueError, match='model: '):
        # a file holds the captions of one type
        caption_many([folder], model, tmp_path / 'half.jsonl', **QUIET)


def test_settings_without_sense_are_refused_before_work_starts(folder, model):
    for more, says in (
        (dict(dtype='int8'), "dtype is 'int8'; it must be 'bfloat16' or"),
        (dict(dtype='bfloat16', sure=0.9), 'leave dtype=bfloat16 out'),
        (dict(seed=3), 'seed is 3, but nothing is drawn; set do_sample=true'),
    ):
        with pytest.raises(ValueError, match=says):
            how(**more)
    done = run(folder, '--model', model, '--dtype', 'int8')
    assert done.returncode == 2 and b"dtype is 'int8'" in done.stderr and not done.stdout


# not sure ---------------------------------------------------------------------------------------------------
# ----------------------


def test_not_sure(folder, model, captioner, tmp_path):
    place = shutil.copytree(model, tmp_path / 'model')
    caption_many([folder], model, tmp_path / 'plain.jsonl', tokens=True, **QUIET)
    plain = entries(tmp_path / 'plain.jsonl')
    weakest = [min(token['logprob'] for token in entry['tokens']) for entry in plain]
    middle = sorted(weakest)[12]
    # another measure than the line's own confidence
    Calibration(2.0, 1.0, [[middle - 1e-4, 100, 100], [-99.0, 200, 100]], 'min').save(place)
    sure = QUIET | dict(run=how(sure=0.9))
    assert caption_many([folder], place, tmp_path / 'out.jsonl', **sure) == 0
    for entry, before, value in zip(entries(tmp_path / 'out.jsonl'), plain, weakest):
        assert (
            list(entry) == ['image', 'caption', 'score', 'confidence', 'probability', 'sure']
            and entry['caption'] == before['caption']
        )
        assert entry['sure'] is (value >= middle) and entry['probability'] == pytest.approx(
            1 / (1 + np.exp(-2 * value - 1)), abs=1e-5
        )
    lines = []
    caption_files([folder], place, how(sure=0.9), out=lines.append)
    assert (
        lines
        == [
            f'{before["image"]}\t{before["caption"] if value >= middle else "not sure"}'
            for before, value in zip(plain, weakest)
        ]
        and 0 < ''.join(lines).count('not sure') < 24
    )
    with pytest.raises(ValueError, match="sure: {'precision': 0.9, .* then, None now"):
        caption_many([folder], place, tmp_path / 'out.jsonl', **QUIET)
    with pytest.raises(ValueError, match="sure: None then, {'precision'"):
        caption_many([folder], place, tmp_path / 'plain.jsonl', tokens=True, **sure)
    Calibration(3.0, 1.0, [[middle, 100, 100]], 'min').save(place)  # calibrated anew
    with pytest.raises(ValueError, match="'slope': 3.0"):
        caption_many([folder], place, tmp_path / 'out.jsonl', **sure)


def test_what_cannot_be_sure_is_said_before_work_starts(folder, model, tmp_path):
    for call in (
        lambda **more: caption_many(
            **dict(inputs=[folder], model=model, out=tmp_path / 'new' / 'out.jsonl') | QUIET | more
        ),
        lambda **more: caption_files(**dict(inputs=[folder], model=model) | more),
    ):
        with pytest.raises(FileNotFoundError, match='confidence.json: no such file; .*pvtblip calibrate'):
            call(run=how(sure=0.9))
        with pytest.raises(FileNotFoundError, match='some/body: no such folder; .*hub'):
            call(model='some/body', run=how(sure=0.9))
    place = shutil.copytree(model, tmp_path / 'model')
    Calibration(2.0, 1.0, [[-1.0, 10, 5]]).save(place)
    for precision, says in (
        (1.5, 'sure is 1.5; it must be a number above 0'),
        (0.0, 'sure is 0.0; it must be a number above 0'),
        (1.0, 'above 0 and below 1'),
        (0.9, 'no threshold promises'),
    ):
        with pytest.raises(ValueError, match=says):
            tell = QUIET | dict(run=how(sure=precision))
            caption_many([folder], place, tmp_path / 'new' / 'out.jsonl', **tell)
    assert not (tmp_path / 'new').exists()


# what goes in -----------------------------------------------------------------------------------------------
# ----------------------


def test_folders_lists_shards_and_photos_in_one_go(folder, model, tmp_path, monkeypatch):
    monkeypatch.chdir(folder.parent)
    with tarfile.open('some.tar', 'w') as archive:
        for i in (1, 2):
            archive.add(folder / f'{i:02}.jpg', f'{i:02}.jpg')
    # relative to where one is, not to the list
    (tmp_path / 'list.txt').write_bytes(b'photos/03.jpg\r\n\n./photos//04.jpg\nphotos/gone.jpg')
    done = run(
        'some.tar',
        tmp_path / 'list.txt',
        '-',
        'photos/06.jpg',
        '--model',
        model,
        '--jsonl',
        tmp_path / 'out.jsonl',
        input=b'photos/05.jpg\nphotos/03.jpg\n',
    )
    assert done.returncode == 1, done.stderr
    found = entries(tmp_path / 'out.jsonl')
    assert [entry['image'] for entry in found] == [
        'some.tar/01.jpg',
        'some.tar/02.jpg',
        'photos/03.jpg',
        'photos/04.jpg',
        'photos/gone.jpg',
        'photos/05.jpg',
        'photos/06.jpg',
    ]
    assert found[4]['error'] == 'no such image file'
    same = dict(
        line.split('\t')
        for line in run('photos/01.jpg', 'photos/03.jpg', '--model', model).stdout.decode().splitlines()
    )
    assert same == {'photos/01.jpg': found[0]['caption'], 'photos/03.jpg': found[2]['caption']}


def test_a_large_photo_in_a_shard_has_the_pixels_of_its_file(captioner, tmp_path):
    # decoded at reduced scale
    Image.fromarray(make_scene(0, 3, image_size=256).image).resize((1000, 701)).save(tmp_path / 'large.jpg')
    options = GenerationConfig().check(captioner)
    (batch,) = caption_batches(
        [Photo('in a shard', (tmp_path / 'large.jpg').read_bytes()), tmp_path / 'large.jpg'],
        captioner,
        options,
    )
    assert torch.equal(*batch.pixel_values) and batch.photos[0] == Photo('in a shard')


def test_what_a_folder_gives(tmp_path):
    place = photos(tmp_path / 'photos', 3)
    (place / 'album' / 'x.jpg').mkdir(parents=True)  # a folder, whatever it is called
    shutil.copy(place / '00.jpg', place / 'album/x.jpg/inner.JPEG')
    for name in (
        'notes.md',
        '.hidden.jpg',
        'captions.json',
        'a.HEIC',
        'b.heic',
        'c.avif',
        'README',
        'd.jfif',
        'e.JPE',
    ):
        shutil.copy(place / '00.jpg', place / name)
    for link in ('loop', 'x.jpg/loop'):
        os.symlink(place, place / 'album' / link)
    os.symlink('self.jpg', place / 'self.jpg')
    skipped = Counter()
    names = [photo.name for photo in list_photos(check_inputs([f'{place}//']), skipped)]
    assert names == [
        str(place / name)
        for name in ('00.jpg', '01.jpg', '02.jpg', 'd.jfif', 'e.JPE', 'self.jpg', 'album/x.jpg/inner.JPEG')
    ]
    assert skipped == {
        '.heic': 2,
        '.avif': 1,
        '.md': 1,
        '.json': 1,
        'file without a suffix': 1,
        'linked folder': 2,
    }
    line = describe_skipped(skipped)
    assert (
        '\n' not in line
        and all(
            part in line
            for part in (
                '2 .heic',
                '2 linked folders',
                '1 .avif',
                '.jfif',
                'give a linked folder by its own name',
            )
        )
        and describe_skipped(Counter()) == ''
    )


def test_what_is_left_out_in_a_folder_is_said_once(folder, model, tmp_path):
    place = shutil.copytree(folder, tmp_path / 'photos')
    shutil.copy(place / '00.jpg', place / 'other.jfif')
    for name in ('a.heic', 'b.heic'):
        (place / name).touch()
    for call in (
        lambda log: caption_files([place], model, how(), out=lambda line: None, log=log),
        lambda log: caption_many([place], model, tmp_path / 'out.jsonl', **QUIET | dict(log=log)),
    ):
        said = []
        assert call(said.append) == 0 and sum('2 .heic' in line for line in said) == 1
    assert len(entries(tmp_path / 'out.jsonl')) == 25
    (tmp_path / 'heic').mkdir()
    (tmp_path / 'heic/a.heic').touch()
    with pytest.raises(ValueError, match='no photos .*1 .heic'):
        caption_files([tmp_path / 'heic'], model)


@pytest.mark.parametrize(
    'content, says',
    [
        ('photos/00.jpg\n'.encode('utf-16'), 'UTF-16'),
        ('photos/00.jpg\n'.encode('utf-16-le'), ':1: not a list of photos but something else'),
        ('\u72ac\n'.encode('utf-16'), 'UTF-16'),
        (b'PK\x03\x04\n\0', ':2: not a list of photos but a zip archive'),
        (b'\xff\xd8\xff\xe0\0', 'a picture'),
    ],
)
def test_lists_that_are_none(content, says, model, tmp_path):
    (tmp_path / 'list.txt').write_bytes(content)
    for call in (
        lambda: caption_many([tmp_path / 'list.txt'], model, tmp_path / 'out.jsonl', **QUIET),
        lambda: caption_files([tmp_path / 'list.txt'], model),
    ):
        with pytest.raises(ValueError, match=f'list.txt.*{says}'):
            call()
    done = run('-', '--model', model, input=content)
    assert (
        done.returncode == 1
        and done.stderr.count(b'error: standard input') == 1
        and b'Traceback' not in done.stderr
    ), done.stderr


def test_numbers_that_no_machine_stands(folder, model, captioner, tmp_path):
    for wrong in (
        dict(num_workers=10**11),
        dict(num_workers=-1),
        dict(batch_size=0),
        dict(batch_size=10**20),
    ):
        name = next(iter(wrong))
        with pytest.raises(ValueError, match=f'{name} is'):
            how(**wrong)
        with pytest.raises(ValueError, match=f'{name} is'):
            next(caption_batches([], captioner, GenerationConfig(), **wrong))
    for option in (
        ['--workers', 10**11],
        ['--batch-size', '1e20'],
        ['--batch-size', 10**20],
        ['--seed', -1],
        ['--seed', 10**22],
        ['--num-beams', 10**9],
    ):
        done = run(folder, '--model', model, *option)
        assert (
            done.returncode == 2 and option[0].encode() in done.stderr and b'Traceback' not in done.stderr
        ), done.stderr
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    place = photos(tmp_path / 'photos', 1)
    (place / 'closed').mkdir()
    real = os.scandir

    def scandir(path):
        if str(path).endswith('closed'):
            raise PermissionError(13, 'Permission denied', str(path))
        return real(path)

    monkeypatch.setattr(os, 'scandir', scandir)
    assert [(photo.name, photo.problem) for photo in list_photos([str(place)])][1:] == [
        (str(place / 'closed'), 'this folder cannot be read (Permission denied)')
    ]


@pytest.mark.parametrize(
    'inputs, says',
    [
        ([], 'no photos'),
        (['gone.jpg'], 'gone.jpg: no such'),
        (['gone.txt'], 'gone.txt: no such'),
        (['gone.tar'], 'gone.tar'),
        (['-', '-'], 'twice'),
    ],
)
def test_inputs_that_are_none(inputs, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        check_inputs(inputs)


def test_nothing_to_caption(model, tmp_path):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'empty.txt').write_text('\n\n')
    for one in ('empty', 'empty.txt'):
        for call in (
            lambda: caption_many([tmp_path / one], model, tmp_path / 'out.jsonl', **QUIET),
            lambda: caption_files([tmp_path / one], model),
        ):
            with pytest.raises(ValueError, match='no photos'):
                call()
    done = run('-', '--model', model, '--jsonl', tmp_path / 'out.jsonl', input=b'')
    assert done.returncode == 1 and b'no photos' in done.stderr


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.binary(min_size=1).filter(
            lambda name: (
                not set(name) & set(b'\n\r\0') and name.strip() and not name.startswith(b'\xef\xbb\xbf')
            )
        ),
        max_size=5,
    )
)
def test_any_name_survives_lists_and_json(names):
    found = [photo.name for photo in photos_in_list([name + b'\n' for name in names])]
    assert (
        [json.loads(json_line(dict(image=name)))['image'] for name in found]
        == found
        == [str(Path(os.fsdecode(name))) for name in names]
    )
    for name in found:
        json_line(dict(image=name)).decode('utf-8')


def test_json_steers_no_terminal_and_keeps_the_names():
    from pvtblip.pipeline import json_text

    for name in ('\x1b[2J', '\x07', '\x7f', '\x9b31m', 'a\u202eb', 'a\u2028b', '\udc9b', 'é 犬 😀'):
        text = json_text(dict(image=name))
        assert json.loads(text)['image'] == name and not set(text) & set('\x1b\x07\x7f\x9b\u202e\u2028\udc9b')
    assert '犬 😀' in json_text(dict(image='犬 😀'))


# photos that are none ---------------------------------------------------------------------------------------
# ----------------------


def zoo(place):
    "One of each kind: {name: what its error says, or None where it can be read}"
    place.mkdir()
    scene = Image.fromarray(make_scene(0, 0, image_size=128).image)
    jpeg = io.BytesIO()
    scene.save(jpeg, 'jpeg')
    kinds = {}

    def add(name, says, make):
        kinds[str(place) + '/' + name] = says
        make(os.path.join(place, name))

    def write(content):
        return lambda file: Path(file).write_bytes(content)

    add('00 whole.jpg', None, write(jpeg.getvalue()))
    add('01 zero.jpg', 'empty', write(b''))
    add('02 text.jpg', 'not an image', write(b'I am no picture'))
    add('03 half.jpg', 'damaged', write(jpeg.getvalue()[:900]))
    add('04 bomb.png', 'pixels', lambda file: Image.new('1', (20_000, 20_000)).save(file))
    add(
        '05 sixteen.png',
        None,
        lambda file: Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16).save(file),
    )
    add('06 cmyk.jpg', None, lambda file: scene.convert('CMYK').save(file))
    add(
        '07 animated.gif',
        None,
        lambda file: scene.save(file, save_all=True, append_images=[scene.rotate(90)]),
    )
    exif = Image.Exif()
    exif[0x112] = 6
    add('08 turned.jpg', None, lambda file: scene.save(file, exif=exif))
    add('09 palette.png', None, lambda file: scene.convert('P').save(file, transparency=0))
    add('10 alpha.webp', None, lambda file: scene.convert('RGBA').save(file, lossless=True))
    add('11 floats.tiff', '8 bits', lambda file: Image.fromarray(np.zeros((8, 8), np.float32)).save(file))
    add('12 nowhere.jpg', 'no such image', lambda file: os.symlink('nowhere', file))
    add('13 self.jpg', 'no such image', lambda file: os.symlink('13 self.jpg', file))
    add('14 line\nbreak\t.jpg', None, write(jpeg.getvalue()))
    add(os.fsdecode(b'15 caf\xe9.jpg'), None, write(jpeg.getvalue()))
    add('16 犬.jpg', None, write(jpeg.getvalue()))
    add('17 pipe.jpg', 'no such image', os.mkfifo)
    add('18 thin.png', None, lambda file: Image.new('RGB', (1, 3000), 'red').save(file))
    return kinds


def test_one_of_each_kind(model, tmp_path):
    kinds = zoo(tmp_path / 'zoo')
    done = run(
        tmp_path / 'zoo',
        '--model',
        model,
        '--jsonl',
        tmp_path / 'out.jsonl',
        '--batch-size',
        4,
        '--workers',
        1,
    )
    assert done.returncode == 1 and b'Traceback' not in done.stderr and b'Warning' not in done.stderr, (
        done.stderr
    )
    found = entries(tmp_path / 'out.jsonl')
    assert [entry['image'] for entry in found] == list(kinds)
    for entry, says in zip(found, kinds.values()):
        assert ('caption' in entry) == (says is None) and (
            says is None or says in entry['error'] and str(tmp_path) not in entry['error']
        ), entry
    # and as text: a line of error for each, the other ones on stdout
    text = run(tmp_path / 'zoo', '--model', model)
    assert text.returncode == 1 and text.stderr.count(b'error: ') == sum(
        says is not None for says in kinds.values()
    )
    assert b'15 caf\xe9.jpg\t' in text.stdout and b'Traceback' not in text.stderr
    assert b'14 line\\nbreak\\t.jpg\t' in text.stdout and len(text.stdout.splitlines()) == sum(
        says is None for says in kinds.values()
    )
    array = json.loads(run(tmp_path / 'zoo', '--model', model, '--json').stdout.decode('utf-8'))
    assert [entry['image'] for entry in array] == list(kinds)


def test_a_bomb_costs_no_memory(tmp_path, model):
    Image.new('1', (20_000, 20_000)).save(tmp_path / 'bomb.png')
    (tmp_path / 'zeros.png').write_bytes((tmp_path / 'bomb.png').read_bytes())
    script = (
        'import resource, sys\nfrom functools import partial\n'
        'from pvtblip.pipeline import PhotoReader\nfrom pvtblip.pvt_encoder import load_pixels\n'
        'reader = PhotoReader(partial(load_pixels, size=64))\n'
        'before = '
        'resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\nprint(reader[sys.argv[1]][1])\n'
        'print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss '
        '- before)'
    )
    problem, grown = subprocess.run(
        [sys.executable, '-c', script, tmp_path / 'bomb.png'], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert 'pixels' in problem and int(grown) < 50_000  # kilobytes; decoded it would be 400 MB


def test_a_photo_that_vanishes_after_it_was_listed(folder, model, tmp_path, captioner):
    place = shutil.copytree(folder, tmp_path / 'photos')
    listed = list_photos([str(place)])
    batches = caption_batches(listed, captioner, GenerationConfig().check(captioner), 4)
    next(batches)
    (place / '09.jpg').unlink()
    problems = {
        str(photo): problem for batch in batches for photo, problem in zip(batch.photos, batch.problems)
    }
    assert (
        problems.pop(str(place / '09.jpg')) == 'no such image file'
        and not any(problems.values())
        and len(problems) == 19
    )


def test_a_shard_that_ends_early(folder, model, tmp_path):
    with tarfile.open(tmp_path / 'some.tar', 'w') as archive:
        for i in range(4):
            archive.add(folder / f'{i:02}.jpg', f'{i:02}.jpg')
        note = tarfile.TarInfo('lonely.txt')
        note.size = 2
        archive.addfile(note, io.BytesIO(b'hi'))
    whole = (tmp_path / 'some.tar').read_bytes()
    assert caption_many([tmp_path / 'some.tar'], model, tmp_path / 'whole.jsonl', **QUIET) == 1
    assert entries(tmp_path / 'whole.jsonl')[-1] == dict(
        image=f'{tmp_path}/some.tar/lonely', error='no photo in this sample'
    )
    (tmp_path / 'half.tar').write_bytes(whole[: whole.index(b'02.jpg') + 800])
    assert caption_many([tmp_path / 'half.tar'], model, tmp_path / 'half.jsonl', **QUIET) >= 1
    found = entries(tmp_path / 'half.jsonl')
    assert (
        found[0]['caption'] == entries(tmp_path / 'whole.jsonl')[0]['caption']
        and found[-1]['image'] == f'{tmp_path}/half.tar'
        and 'damaged' in found[-1]['error']
    )


# what is written --------------------------------------------------------------------------------------------
# ----------------------


def test_what_is_done_is_skipped_and_failures_are_tried_again_on_request(folder, model, tmp_path):
    place = shutil.copytree(folder, tmp_path / 'photos')
    out = tmp_path / 'out.jsonl'
    said = []
    good = (place / '05.jpg').read_bytes()
    (place / '05.jpg').write_bytes(good[:500])
    tell = QUIET | dict(log=said.append)
    assert caption_many([place], model, out, **tell) == 1 and said[-1].startswith('24 photos, ')
    before = out.read_bytes()
    (place / '05.jpg').write_bytes(good)
    assert (
        caption_many([place], model, out, **tell) == 1
        and said[-1].startswith('0 photos (and 24 before), ')
        and out.read_bytes() == before
    )
    shutil.copy(place / '00.jpg', place / '03b.jpg')
    assert (
        caption_many([place], model, out, **tell) == 1
        and out.read_bytes().startswith(before)
        and len(entries(out)) == 25
    )
    assert (
        caption_many([place], model, out, retry=True, **tell) == 0
        and len(entries(out)) == 25
        and entries(out)[-1]['image'] == str(place / '05.jpg')
    )


def test_another_run_is_refused(folder, model, tmp_path):
    out = tmp_path / 'deep' / 'out.jsonl'
    caption_many([folder], model, out, **QUIET)
    before = out.read_bytes()
    other = tmp_path / 'other'
    babbler(1).save_pretrained(other)
    for options, says in (
        (dict(run=how(generation=GenerationConfig(num_beams=2))), 'num_beams: 3 then, 2 now'),
        (dict(tokens=True), 'tokens: False then, True now'),
        (dict(model=other), 'model: '),
    ):
        with pytest.raises(ValueError, match=says):
            caption_many(**dict(inputs=[folder], model=model, out=out) | QUIET | options)
    shutil.copytree(model, tmp_path / 'moved')
    caption_many([folder], tmp_path / 'moved', out, **QUIET)  # the same model in another place
    Path(f'{out}.run.json').unlink()
    with pytest.raises(ValueError, match='no out.jsonl.run.json'):
        caption_many([folder], model, out, **QUIET)
    assert out.read_bytes() == before


@pytest.mark.parametrize('note', ['[]', '5', 'null', '', '{"model": "0', '[' * 100_000, '\xff'])
def test_a_note_that_is_damaged(note, folder, model, tmp_path):
    out = tmp_path / 'out.jsonl'
    caption_many([folder], model, out, **QUIET)
    before = out.read_bytes()
    Path(f'{out}.run.json').write_bytes(note.encode('latin-1'))
    with pytest.raises(ValueError, match='out.jsonl.run.json: damaged, .* give another file'):
        caption_many([folder], model, out, **QUIET)
    assert out.read_bytes() == before and Path(f'{out}.run.json').read_bytes() == note.encode('latin-1')


def test_notes_of_others_are_left_alone(folder, model, tmp_path):
    out, note = tmp_path / 'out.jsonl', tmp_path / 'out.jsonl.run.json'
    note.write_text('{"my": "notes"}')
    with pytest.raises(ValueError, match='pvtblip did not write it'):
        caption_many([folder], model, out, **QUIET)
    assert note.read_text() == '{"my": "notes"}'
    (tmp_path / 'list.jsonl.run.json.txt').write_text('')
    with pytest.raises(ValueError, match='is read by this command'):
        caption_many([note, folder], model, out, **QUIET)
    note.unlink()
    for one in (folder / '00.jpg', model / 'config.json'):
        with pytest.raises(ValueError, match='is read by this command'):
            caption_many([folder / '00.jpg'], model, one, **QUIET)
    caption_many([folder], model, out, **QUIET)
    facts = json.loads(note.read_text())
    assert facts.pop('written_by') == 'pvtblip'
    note.write_text(json.dumps(facts))  # an earlier version's note: the same run all the same
    assert caption_many([folder], model, out, **QUIET) == 0


def test_a_line_that_is_none_is_named(folder, model, tmp_path):
    out = tmp_path / 'out.jsonl'
    caption_many([folder], model, out, **QUIET)
    lines = out.read_bytes().splitlines(keepends=True)
    for wrong in (
        b'\0' * 40,
        b'[]',
        b'{"image": 3}',
        b'{"caption": "a ring"}',
        b'{"image": "\xff"}',
        b'',
        b'[' * 100_000,
    ):
        out.write_bytes(b''.join(lines[:2]) + wrong + b'\n')
        with pytest.raises(ValueError, match='out.jsonl:3: not a line'):
            caption_many([folder], model, out, **QUIET)
        assert out.read_bytes().endswith(wrong + b'\n')


def test_a_file_that_another_process_writes_is_refused(folder, model, tmp_path):
    out = tmp_path / 'out.jsonl'
    script = (
        f"from pvtblip.files import only_writer\nwith only_writer({str(out)!r}): print('held', "
        'flush=True); input()'
    )
    holder = subprocess.Popen([sys.executable, '-c', script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b'held\n'
    done = run(folder, '--model', model, '--jsonl', out)
    assert (
        done.returncode == 1
        and done.stderr.decode().strip()
        == f'error: {out}: another process is writing it; wait for it, or give another place'
    )
    holder.kill()
    holder.wait()
    with only_writer(out, patience=0):
        pass  # the lock dies with its holder


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=40), st.sampled_from([0, 70_000, 140_000]))
def test_cut_half_line(tmp_path_factory, content, more):
    file = tmp_path_factory.getbasetemp() / 'half.jsonl'
    content = content[:20] + b'x' * more + content[20:]
    file.write_bytes(content)
    whole = content[: content.rfind(b'\n') + 1]
    assert cut_half_line(file) == len(content) - len(whole) and file.read_bytes() == whole


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
def test_a_full_disk_is_named():
    writer = LineWriter('/dev/full', seconds=1e9)
    with pytest.raises(OSError, match='/dev/full: No space left.*make room'):
        writer.__enter__().append([b'{}\n'])


# the end of a process ---------------------------------------------------------------------------------------
# ----------------------

# a batch every 0.15 s: time to be killed in
SLOW = (
    'import time, sys\nfrom pvtblip import pipeline\nfrom pvtblip.cli import main\nsaid = '
    'pipeline.caption_results\n'
    'def results(*arguments): time.sleep(0.15); return said(*arguments)\npipeline.caption_results = '
    'results\nmain()'
)


def start(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, '-c', SLOW, 'caption', *map(str, arguments)], stderr=subprocess.PIPE, **options
    )


def wait_for_lines(process, file, number):
    deadline = time.time() + 120
    while process.poll() is None and (not file.exists() or file.read_bytes().count(b'\n') < number):
        assert time.time() < deadline
        time.sleep(0.02)


def test_killed_and_continued_is_the_same_as_unbroken(folder, model, tmp_path):
    arguments = [folder, '--model', model, '--batch-size', 3, '--workers', 1, '--jsonl']
    assert caption_many([folder], model, tmp_path / 'whole.jsonl', **QUIET | dict(run=how(batch_size=3))) == 0
    out = tmp_path / 'killed.jsonl'
    chance = random.Random(0)
    for number in (3, 9, 15):
        process = start(*arguments, out)
        wait_for_lines(process, out, number)
        time.sleep(chance.random() * 0.2)
        process.kill()
        process.wait()
        with open(out, 'ab') as stream:
            stream.write(b'{"image": "ha')  # what a power cut leaves
    assert 15 <= out.read_bytes().count(b'\n') < 24
    done = run(*arguments, out)
    assert done.returncode == 0 and b'half a line was cut off (13 bytes' in done.stderr, done.stderr
    assert out.read_bytes() == (tmp_path / 'whole.jsonl').read_bytes()


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_after_the_batch(folder, model, tmp_path, number):
    out = tmp_path / 'out.jsonl'
    arguments = [folder, '--model', model, '--batch-size', 4, '--workers', 1, '--jsonl', out]
    process = start(*arguments, start_new_session=True)
    wait_for_lines(process, out, 4)
    os.killpg(process.pid, number)  # the reading process gets it, too, as in a terminal
    _, error = process.communicate(timeout=60)
    lines = out.read_bytes()
    assert (
        process.returncode == 128 + number
        and f'stopped by {number.name}'.encode() in error
        and b'Traceback' not in error
    ), error
    assert lines.endswith(b'\n') and 4 <= lines.count(b'\n') < 24 and lines.count(b'\n') % 4 == 0
    assert (
        run(*arguments).returncode == 0
        and len({entry['image'] for entry in entries(out)}) == len(entries(out)) == 24
    )


# several processes ------------------------------------------------------------------------------------------
# ----------------------


def test_two_processes_share_the_work(folder, model, tmp_path):
    place = shutil.copytree(folder, tmp_path / 'photos')
    (place / '05.jpg').write_bytes(b'')
    arguments = [
        'caption',
        str(place),
        '--model',
        str(model),
        '--batch-size',
        '4',
        '--workers',
        '0',
        '--jsonl',
    ]

    def together(out, *more):
        command = [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--standalone',
            '--nproc_per_node',
            '2',
            '-m',
            'pvtblip',
            *arguments,
            str(out),
            *more,
        ]
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, 'ACCELERATE_USE_CPU': 'true', 'OMP_NUM_THREADS': '1'},
        )

    assert run(*arguments[1:], tmp_path / 'one.jsonl').returncode == 1
    both = together(tmp_path / 'two.jsonl')
    assert (
        both.returncode == 1
        and '24 photos, ' in both.stderr
        and both.stderr.count(' a second; 1 failed') == 1
    ), both.stderr
    assert (tmp_path / 'one.jsonl').read_bytes() == (tmp_path / 'two.jsonl').read_bytes()  # in the same order
    assert sorted(file.name for file in tmp_path.glob('two.jsonl*')) == ['two.jsonl', 'two.jsonl.run.json']
    # draws hang on seed and name, whichever process makes them
    draws = '--set', 'do_sample=true', '--seed', '3'
    assert (
        run(*arguments[1:], tmp_path / 'drawn.jsonl', *draws).returncode == 1
        and together(tmp_path / 'drawn-by-two.jsonl', *draws).returncode == 1
    )
    assert (
        (tmp_path / 'drawn.jsonl').read_bytes()
        == (tmp_path / 'drawn-by-two.jsonl').read_bytes()
        != (tmp_path / 'one.jsonl').read_bytes()
    )
    # three processes were killed: the parts hold some lines, the file one of them already, one part ends in
    # half a line; two go on
    lines = (tmp_path / 'one.jsonl').read_bytes().splitlines(keepends=True)
    (tmp_path / 'three.jsonl').write_bytes(lines[0])
    shutil.copy(tmp_path / 'one.jsonl.run.json', tmp_path / 'three.jsonl.run.json')
    for i in range(3):
        (tmp_path / f'three.jsonl.part-000{i}-of-0003').write_bytes(
            b''.join(lines[4 * i : 4 * i + 3 - i]) + b'{"im' * (i == 1)
        )
    assert together(tmp_path / 'three.jsonl').returncode == 1
    assert sorted((tmp_path / 'three.jsonl').read_bytes().splitlines(keepends=True)) == sorted(
        lines
    )  # none twice, none lost
    assert sorted(file.name for file in tmp_path.glob('three.jsonl*')) == [
        'three.jsonl',
        'three.jsonl.run.json',
    ]
    assert (
        run(*arguments[1:], tmp_path / 'three.jsonl').returncode == 1
        and len(entries(tmp_path / 'three.jsonl')) == 24
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 30), st.integers(1, 4), st.integers(1, 5), st.data())
def test_parts_are_gathered_in_order_and_a_kill_meanwhile_does_no_harm(
    tmp_path_factory, count, number, batch, data
):
    file = tmp_path_factory.mktemp('parts') / 'out.jsonl'
    lines = [json_line(dict(image=f'{i}.jpg', caption='a ring')) for i in range(count)]
    groups = [lines[i : i + batch] for i in range(0, count, batch)]

    def write_parts():
        for i in range(number):
            Path(f'{file}.part-{i:04}-of-{number:04}').write_bytes(
                b''.join(line for group in groups[i::number] for line in group)
            )

    file.write_bytes(b'')
    write_parts()
    gather_parts(file, batch)
    assert file.read_bytes() == b''.join(lines) and not list(file.parent.glob('*.part-*'))
    file.write_bytes(b''.join(lines[: data.draw(st.integers(0, count))]))  # as a kill in the middle leaves it
    write_parts()
    gather_parts(file, batch)
    assert file.read_bytes() == b''.join(lines)


def test_what_several_processes_cannot_do(folder, model, tmp_path, monkeypatch):
    monkeypatch.setattr(
        'pvtblip.pipeline._processes',
        lambda: type('Team', (), dict(num_processes=2, process_index=0, device='cpu'))(),
    )
    with pytest.raises(ValueError, match='standard input cannot be shared'):
        caption_many(['-'], model, tmp_path / 'out.jsonl', **QUIET)
    with pytest.raises(ValueError, match='--jsonl'):
        caption_files([folder], model)


# memory and imports -----------------------------------------------------------------------------------------
# ----------------------


def test_photos_are_asked_for_a_few_batches_ahead(folder, captioner):
    asked = []

    def stream():
        for i in range(10_000):
            asked.append(i)
            yield folder / f'{i % 24:02}.jpg'

    for num_workers, most in ((0, 8), (1, 8 + 2 * 4 + 4)):
        asked.clear()
        batches = caption_batches(stream(), captioner, GenerationConfig().check(captioner), 4, num_workers)
        next(batches)
        next(batches)
        assert len(asked) <= most
        batches.close()


def test_captioning_imports_what_it_needs(folder, model):
    script = (
        'import sys; from pvtblip.pipeline import caption_files; caption_files(sys.argv[1:2], '
        'sys.argv[2], out=lambda line: None)\n'
        "heavy = {'accelerate', 'torchvision', 'matplotlib', 'timm', 'datasets', 'webdataset', 'pandas', "
        "'pycocoevalcap', 'sympy'}\n"
        'print(sorted(heavy & set(sys.modules)))'
    )
    assert (
        subprocess.run(
            [sys.executable, '-c', script, folder / '00.jpg', model],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        == '[]'
    )


def test_default_workers_and_fingerprint(captioner, monkeypatch):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: set(range(16)), raising=False)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '4')
    assert default_workers() == 3
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '16')
    assert default_workers() == 1
    before = fingerprint(captioner)
    other = babbler()
    assert fingerprint(other) == before
    with torch.no_grad():
        other.decoder.cls['predictions'].bias[5] += 1e-3
    assert fingerprint(other) != before
    assert count_photos(check_inputs(['-'])) is None and CaptionedBatch(
        [1, 2], [None, 'x'], None, None
    ).read == [1]
