"""Damaged files and settings of every kind: what comes back is a result or one clear error.

`pytest tests/test_fuzz.py` tries a few hundred cases in seconds, `--slow` ten thousand. A case is a
function of its
number, so a failure names the number that shows it again.
"""

import io
import json
import random
import shutil
import tarfile
import tempfile
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import pytest
from PIL import Image
from transformers import BertTokenizer

from pvtblip.confidence import confidences_and_scores, load_confidence
from pvtblip.data import read_captions
from pvtblip.decoder import Captioner, CaptionerConfig, DecoderConfig
from pvtblip.evaluation import read_hypotheses, read_references
from pvtblip.files import is_ours, read_json, read_toml
from pvtblip.generation import GenerationConfig
from pvtblip.photo_training import PhotoRun
from pvtblip.config import change_config, read_config, to_toml
from pvtblip.pvt_encoder import EncoderConfig, load_image
from pvtblip.sources import ShardDataset, ShardReading
from pvtblip.data_check import check_data
from pvtblip.tokenizer import CaptionTokenizer

CLEAN = (ValueError, OSError)  # FileNotFoundError is an OSError

# ---------------------------------------------------------------- mutators

TEXTS = (
    '',
    ' ',
    'null',
    '[]',
    '{}',
    '5',
    '"',
    '\r',
    '\x0b',
    '\u2028',
    '\ufeff',
    '\x00',
    '\x1b[2J',
    '\ud83d',
    '犬',
    '9' * 5000,
    '[' * 3000,
)
VALUES = (
    None,
    True,
    False,
    0,
    -1,
    1,
    7,
    2**31,
    2**63,
    10**30,
    0.5,
    -0.0,
    1e308,
    float('inf'),
    float('nan'),
    '',
    'x',
    '12',
    'x' * 5000,
    # fmt: skip
    [],
    [0],
    [[0]],
    [None],
    {},
    {'': 0},
    {'a': {'b': []}},
    [[[[[]]]]],
    '\ud83d',
    '\x1b]0;x\x07',
    '../../x',
    'pipe:touch x',
    'hf-hub:x/y',
)


def damaged_bytes(content, chance):
    "A file after one accident: cut, bytes flipped, a piece repeated, removed or exchanged for an odd text."
    content = bytearray(content)
    kind, start = chance.randrange(6), chance.randrange(len(content) + 1)
    end = min(len(content), start + chance.choice((1, 2, 8, 60, 1000)))
    if kind == 0:
        del content[start:]
    if kind == 1:
        for _ in range(chance.choice((1, 3, 20))):
            content[chance.randrange(len(content))] = chance.randrange(256)
    if kind == 2:
        content[start:start] = content[start:end] * chance.choice((1, 2, 50))
    if kind == 3:
        del content[start:end]
    if kind in (4, 5):
        content[start:end] = chance.choice(TEXTS).encode('utf-8', 'surrogatepass')
    return bytes(content)


def damaged_value(value, chance):
    "A JSON value with one part exchanged, removed, doubled or renamed."
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        changed = dict(value)
        kind = chance.randrange(8)
        if kind == 0:
            del changed[key]
        elif kind == 1:
            changed[key + chance.choice(('s', ' ', '\x1b', 'é'))] = changed.pop(key)
        else:
            changed[key] = damaged_value(value[key], chance)
        return changed
    if isinstance(value, list) and value and chance.random() < 0.7:
        place = chance.randrange(len(value))
        return [*value[:place], damaged_value(value[place], chance), *value[place + 1 :]]
    return chance.choice(VALUES)


def clean(case, *names):
    """Run a case: its result, or None after an error that is of the right kind, short, and names one of the
    names.
    """
    try:
        return case()
    except CLEAN as error:
        text = str(error)
        assert len(text.splitlines()) <= 2 and len(text) <= 600, text
        assert text and (not names or any(name in text for name in names)), f'{text!r} names none of {names}'


# ---------------------------------------------------------------- kinds of input: each gives a function of a
# chance


@lru_cache
def caption_files():
    "One sound file of every notation that is read: {name: content}"
    captions = {f'{i}.jpg': [f'a dog number {i}', 'two cats, and "one" ball', "it's red"] for i in range(3)}
    images = [dict(id=i, file_name=file) for i, file in enumerate(captions)]
    notes = [
        dict(image_id=i, id=9, caption=text) for i, texts in enumerate(captions.values()) for text in texts
    ]
    karpathy = [dict(filename=file, filepath='val', split='val', imgid=i, sentences=[dict(raw=text) for text in texts])
                for i, (file, texts) in enumerate(captions.items())]  # fmt: skip
    lines = [dict(file_name=file, caption=text) for file, texts in captions.items() for text in texts]
    pairs = [(file, text) for file, texts in captions.items() for text in texts]
    return {
        'map.json': json.dumps(captions, indent=1),
        'coco.json': json.dumps(dict(info={}, images=images, annotations=notes)),
        'karpathy.json': json.dumps(dict(images=karpathy, dataset='x')),
        'list.json': json.dumps(lines),
        'results.json': json.dumps(
            [dict(image_id=i, caption=texts[0]) for i, texts in enumerate(captions.values())]
        ),
        'said.jsonl': '\n'.join(
            json.dumps(dict(image=file, caption=texts[0], score=-1.0)) for file, texts in captions.items()
        ),
        'lines.jsonl': '\n'.join(map(json.dumps, lines)),
        'table.csv': 'image,caption\n'
        + '\n'.join(f'{file},"{text.replace(chr(34), chr(34) * 2)}"' for file, text in pairs),
        'table.tsv': 'file\tcaption\n' + '\n'.join(f'{file}\t{text}' for file, text in pairs),
        'cells.csv': 'image,captions\n'
        + '\n'.join(f'{file},"{texts!r}"'.replace('"one"', 'one') for file, texts in captions.items()),
        'flickr.token': '\n'.join(f'{file}#{i % 3}\t{text}' for i, (file, text) in enumerate(pairs)),
        'results.csv': 'image_name| comment_number| comment\n'
        + '\n'.join(f'{file}| {i % 3}| {text}' for i, (file, text) in enumerate(pairs)),
    }


def caption_case(chance, place):
    "A damaged caption file, read for training and for scores."
    name, content = chance.choice(list(caption_files().items()))
    file = place / name
    if name.endswith('.json') and chance.random() < 0.5:
        file.write_bytes(json.dumps(damaged_value(json.loads(content), chance)).encode())
    else:
        file.write_bytes(damaged_bytes(content.encode(), chance))
    for read in (read_captions, read_references, read_hypotheses):
        clean(lambda read=read: read(file), name)


@lru_cache
def photos():
    "{name: content} of sound photos, one with EXIF."
    image = Image.linear_gradient('L').resize((40, 30)).convert('RGB')
    found = {}
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, 'a dog'
    for name, options in (
        ('a.jpg', dict(exif=exif.tobytes())),
        ('b.png', {}),
        ('c.webp', {}),
        ('d.gif', {}),
        ('e.bmp', {}),
    ):
        stream = io.BytesIO()
        image.save(stream, {'jpg': 'JPEG'}.get(name[2:], name[2:].upper()), **options)
        found[name] = stream.getvalue()
    return found


def photo_case(chance, place):
    "A damaged photo, loaded."
    name, content = chance.choice(list(photos().items()))
    (place / name).write_bytes(damaged_bytes(content, chance))
    clean(lambda: load_image(place / name), name)


def shard_case(chance, place):
    "A damaged shard, read and looked at."
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode='w') as tar:
        for i in range(3):
            members = {
                f'{i}.jpg': photos()['a.jpg'],
                f'{i}.json': json.dumps(dict(caption=['a dog', 'a cat'])).encode(),
                f'{i}.txt': b'a dog',
            }
            for name, content in members.items():
                content = damaged_bytes(content, chance) if chance.random() < 0.2 else content
                header = tarfile.TarInfo(name)
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
    shard = place / 'shard.tar'
    shard.write_bytes(
        damaged_bytes(stream.getvalue(), chance) if chance.random() < 0.5 else stream.getvalue()
    )
    reading = ShardReading(2, passes=1, captions_per_image=2)
    read = ShardDataset([str(shard)], lambda photo: photo, reading, process_index=0, num_processes=1)
    clean(lambda: list(read), 'shard.tar')
    clean(lambda: check_data(str(shard), None, tokenizer(), progress=False), 'shard.tar')


@lru_cache
def tokenizer():
    return CaptionTokenizer()


@lru_cache
def model_folder():
    "The files of a sound model of few words: {name: content}"
    with tempfile.TemporaryDirectory() as folder:
        words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'a', 'picture', 'of', 'dog', 'cat']
        own = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
        sizes = DecoderConfig.tiny(
            vocab_size=len(own),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        )
        Captioner(CaptionerConfig.tiny(decoder=sizes), own).save_pretrained(Path(folder) / 'model')
        return {file.name: file.read_bytes() for file in (Path(folder) / 'model').iterdir()}


def model_case(chance, place):
    "A model folder with one file damaged, missing or exchanged."
    folder = place / 'model'
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in model_folder().items():
        (folder / name).write_bytes(content)
    name = chance.choice([name for name in model_folder() for _ in range(6 if name == 'config.json' else 1)])
    kind = chance.random()
    if kind < 0.1:
        (folder / name).unlink()
    elif kind < 0.7 and name.endswith('.json'):
        (folder / name).write_text(json.dumps(damaged_value(json.loads(model_folder()[name]), chance)))
    else:
        (folder / name).write_bytes(damaged_bytes(model_folder()[name], chance))
    clean(lambda: Captioner.from_pretrained(folder), 'model')


def setting_case(chance, place):
    "A setting of a run or of generation with an odd value, from Python and from TOML and JSON files."
    names = list(_leaves(asdict(PhotoRun())))
    name, value = chance.choice(names), chance.choice(VALUES)
    clean(lambda: change_config(PhotoRun(), {name: value}), name.rpartition('.')[2])
    option = chance.choice(list(asdict(GenerationConfig())))
    clean(lambda: GenerationConfig(**{option: value}).check(small_captioner()))
    sound = to_toml(PhotoRun())
    (place / 'run.toml').write_bytes(damaged_bytes(sound.encode(), chance))
    clean(lambda: read_config(PhotoRun, place / 'run.toml'), 'run.toml')
    (place / 'run.json').write_text(json.dumps(damaged_value(asdict(PhotoRun()), chance)))
    clean(lambda: read_config(PhotoRun, place / 'run.json'), 'run.json')


def _leaves(tree, above=''):
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f'{above}{name}.')
        else:
            yield above + name


@lru_cache
def small_captioner():
    return Captioner(CaptionerConfig.tiny(encoder=EncoderConfig.tiny(image_size=32))).eval()


def report_case(chance, place):
    "Damaged reports and notes: what calibrate, resume and the mark of our own files read."
    ids = [str(i) for i in range(30)]
    report = dict(
        corpus={'CIDEr': 0.5},
        images={name: {'CIDEr': 0.1 * i} for i, name in enumerate(ids)},
        captions={name: 'a dog' for name in ids},
        confidences={name: -0.1 * i for i, name in enumerate(ids)},
        model='ab',
    )
    (place / 'report.json').write_text(json.dumps(damaged_value(report, chance)))
    clean(lambda: confidences_and_scores(place / 'report.json'), 'report.json')
    saved = dict(
        library='pvtblip', metric='CIDEr', least=0.5, slope=1.0, intercept=0.0, kept=[[0.5, 0.9]], model='ab'
    )
    (place / 'confidence.json').write_text(json.dumps(damaged_value(saved, chance)))
    clean(lambda: load_confidence(place), 'confidence.json')
    for read, name in ((read_json, 'report.json'), (read_toml, 'report.json')):
        (place / name).write_bytes(damaged_bytes((place / name).read_bytes() or b'{}', chance))
        clean(lambda read=read, name=name: read(place / name), name)
        is_ours(place / name)


KINDS = dict(
    captions=(caption_case, 60, 3000),
    photos=(photo_case, 60, 3000),
    shards=(shard_case, 12, 400),
    # fmt: skip
    models=(model_case, 60, 1600),
    settings=(setting_case, 60, 1000),
    reports=(report_case, 60, 1000),
)


@pytest.mark.parametrize('kind', KINDS)
def test_a_result_or_a_clear_error(kind, tmp_path, request):
    case, few, many = KINDS[kind]
    for number in range(many if request.config.getoption('--slow') else few):
        try:
            case(random.Random(f'{kind} {number}'), tmp_path)
        except Exception as error:
            raise AssertionError(
                f'{kind}, case {number}: {type(error).__name__}: {str(error)[:500]}'
            ) from error
