"""Loading: what is changed in photos and captions stays true, chance can be repeated, and the cache is whole
or not there.
"""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from pvtblip.data import CaptionDataset, Record
from pvtblip.pvt_encoder import BrokenImage
from pvtblip.training import Collate, SeededBatchSampler
from pvtblip.loading import (
    AugmentationConfig,
    AugmentedDataset,
    LengthBatchSampler,
    PhotoCache,
    caption_lengths,
    pixel_loader,
    speaks_of_colour,
    speaks_of_place,
    swap_sides,
)
from pvtblip.pvt_encoder import EncoderConfig, image_transform, load_image, load_pixels
from pvtblip.shapes import ShapesDataset, check_caption, make_scene
from pvtblip.tokenizer import CaptionTokenizer

ENCODER = EncoderConfig.tiny(image_size=48)
STRONG = AugmentationConfig(flip=0.5, crop_scale=0.4, colour_jitter=0.4, hue=0.1, regardless_of_captions=True)


def photo(size, seed=0, grain=4):
    scene = Image.fromarray(make_scene(0, seed, image_size=256).image).resize(size, Image.Resampling.BICUBIC)
    noise = np.random.default_rng(seed).normal(0, grain, (size[1], size[0], 1))
    return Image.fromarray((np.asarray(scene, int) + noise).clip(0, 255).astype(np.uint8))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / 'photos').mkdir()
    for i in range(8):
        photo((160, 120), i).save(tmp_path / f'photos/{i}.jpg', quality=90)
    return tmp_path / 'photos'


def records(count=8):
    return [Record(f'{i}.jpg', make_scene(0, i).captions, i + 1) for i in range(count)]


def files(folder):
    return sorted(folder.glob('*.jpg'))


# --- captions
# -------------------------------------------------------------------------------------------------------


def test_swapped_captions_are_true_of_mirrored_scenes():
    sided = 0
    for i in range(1000):
        scene = make_scene(2, i)
        mirror = replace(
            scene,
            objects=tuple(
                replace(o, box=(1 - o.box[2], o.box[1], 1 - o.box[0], o.box[3])) for o in scene.objects
            ),
        )
        for caption in scene.captions:
            swapped = swap_sides(caption)
            assert check_caption(swapped, mirror).fully_true, caption
            if swapped != caption:
                sided += 1
                assert not check_caption(caption, mirror).fully_true  # and the flip alone would have lied
    assert sided > 1000


@given(st.text(max_size=60))
def test_swapping_twice_is_nothing(caption):
    swapped = swap_sides(caption)
    assert swapped is None or swap_sides(swapped) == caption


@pytest.mark.parametrize(
    'caption',
    [
        'left',
        'he left',
        'a trail left by a jet',
        'Human rights',
        'she is right',
        'the right time',
        'jersey number 5',
        'a sign that says hi',
        'the “left” one',
    ],
)
def test_unsafe_captions_are_refused(caption):
    if caption == 'Human rights':
        assert swap_sides(caption) == caption  # another word
    else:
        assert swap_sides(caption) is None


def test_place_and_colour():
    assert speaks_of_place(['dogs', 'A cat in the CORNER']) and not speaks_of_place(['a leftover cornered'])
    assert speaks_of_colour(['dogs', 'A Red-haired man']) and not speaks_of_colour(
        ['a bored tankful of lightning']
    )


# --- augmentation
# ---------------------------------------------------------------------------------------------------


def augmented(folder, augmentation, seed=0, load=None):
    return AugmentedDataset(
        CaptionDataset(records(), folder, load or pixel_loader(ENCODER, augmentation), seed=seed),
        ENCODER,
        augmentation,
        seed,
    )


def same(one, other):
    assert one['captions'] == other['captions'] and torch.equal(one['pixel_values'], other['pixel_values'])


def test_an_item_follows_from_seed_epoch_and_index(folder):
    first, again = augmented(folder, STRONG), augmented(folder, STRONG)
    addresses = [(epoch, index) for epoch in range(3) for index in range(8)]
    items = {address: first[address] for address in addresses}
    torch.manual_seed(99)
    for address in reversed(addresses):
        same(items[address], again[address])
    pixels = [items[epoch, 2]['pixel_values'] for epoch in range(3)] + [
        augmented(folder, STRONG, seed=1)[0, 2]['pixel_values']
    ]
    assert all(not torch.equal(pixels[i], pixels[j]) for i in range(4) for j in range(i))


def test_workers_and_resume_see_the_same_pixels(folder):
    data = augmented(folder, STRONG)
    collate = Collate(CaptionTokenizer())

    def batches(workers, start):
        sampler = SeededBatchSampler(8, 4, start_batch=start, num_batches=5 - start)
        return list(
            DataLoader(
                data,
                batch_sampler=sampler,
                collate_fn=collate,
                num_workers=workers,
                persistent_workers=bool(workers),
            )
        )

    unbroken = batches(0, 0)
    for workers, start in ((2, 0), (0, 3), (1, 2)):
        for got, expected in zip(batches(workers, start), unbroken[start:], strict=True):
            assert torch.equal(got['pixel_values'], expected['pixel_values']) and torch.equal(
                got['input_ids'], expected['input_ids']
            )


def test_the_random_state_of_the_process_is_left_alone(folder):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    augmented(folder, STRONG)[0, 1]
    assert torch.equal(torch.rand(3), expected)


def test_off_is_the_evaluation_transform(folder):
    for augmentation in (None, AugmentationConfig()):
        assert torch.equal(
            augmented(folder, augmentation)[4, 3]['pixel_values'], image_transform(ENCODER)(folder / '3.jpg')
        )


def test_flips_move_pixels_and_words_together(folder):
    always, never = augmented(folder, AugmentationConfig(flip=1)), augmented(folder, None)
    for i in range(8):
        mirrored, plain = always[0, i], never[0, i]
        assert torch.equal(mirrored['pixel_values'], plain['pixel_values'].flip(-1))
        assert mirrored['captions'] == [swap_sides(caption) for caption in plain['captions']]


def test_what_a_caption_forbids_is_not_done(folder):
    def item(captions, **changes):
        data = CaptionDataset([Record('0.jpg', captions, 1)], folder, load_pixels_96)
        return AugmentedDataset(data, ENCODER, AugmentationConfig(**changes))[0]['pixel_values']

    plain = item(('a dog',))
    assert torch.equal(item(('a dog', 'she has left the house'), flip=1), plain)
    assert torch.equal(item(('a dog in the corner',), crop_scale=0.1), plain) and not torch.equal(
        item(('a red dog',), crop_scale=0.1), plain
    )
    assert torch.equal(item(('a red dog',), colour_jitter=0.9, hue=0.5), plain) and not torch.equal(
        item(('a dog in the corner',), colour_jitter=0.9), plain
    )
    assert not torch.equal(
        item(('a red dog in the corner',), crop_scale=0.1, hue=0.5, regardless_of_captions=True), plain
    )


def load_pixels_96(path):
    return load_pixels(path, 96)


def test_it_wraps_the_shapes_world_too():
    world = ShapesDataset(pixel_loader(ENCODER), length=20)
    data = AugmentedDataset(world, ENCODER, AugmentationConfig(flip=1))
    assert len(data) == 20 and data.captions_per_image == 5
    for i in range(20):
        assert data[1, i]['captions'] == [swap_sides(caption) for caption in world[1, i]['captions']]


def test_broken_photos_pass_through(folder):
    (folder / '3.jpg').write_bytes(b'')
    (folder / '4.jpg').unlink()
    items = [augmented(folder, STRONG)[0, i] for i in range(8)]
    assert [i for i, item in enumerate(items) if isinstance(item, BrokenImage)] == [3, 4]


def test_the_config_becomes_json_and_refuses_what_cannot_work():
    assert AugmentationConfig(**json.loads(json.dumps(asdict(STRONG)))) == STRONG
    assert AugmentationConfig() == AugmentationConfig(
        flip=0, crop_scale=1, colour_jitter=0, hue=0, regardless_of_captions=False
    )
    for name, value in (
        ('flip', 1.1),
        ('crop_scale', 0),
        ('colour_jitter', -0.1),
        ('hue', 0.6),
        ('flip', float('nan')),
    ):
        with pytest.raises(ValueError, match=f'{name} is'):
            AugmentationConfig(**{name: value})


def test_float_pixels_are_refused(folder):
    with pytest.raises(TypeError, match='pixel_loader'):
        augmented(folder, STRONG, load=image_transform(ENCODER))[0]


# --- decoding at reduced scale
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize('size', [(500, 375), (375, 500), (1001, 763), (640, 480), (4000, 3000)])
@pytest.mark.parametrize('side', [64, 96, 224])
def test_reduced_decode_is_close_to_the_full_one(size, side, tmp_path):
    photo(size, seed=3).save(tmp_path / 'a.jpg', quality=90)
    image = load_image(tmp_path / 'a.jpg')
    full = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC), int)
    ours = load_pixels(tmp_path / 'a.jpg', side).permute(1, 2, 0).numpy()
    steps = np.abs(full - ours)
    assert steps.mean() < 1 and np.percentile(steps, 99) <= 5, (steps.mean(), np.percentile(steps, 99))
    reduced = Image.open(tmp_path / 'a.jpg')
    reduced.draft(None, (int(1.5 * side),) * 2)
    if reduced.size == size:
        assert steps.max() <= 2  # nothing reduced: the same decode, resized by torch


@pytest.mark.parametrize('mode', ['L', 'RGB', 'CMYK'])
@pytest.mark.parametrize('orientation', [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize('size', [(120, 90), (800, 600)])  # decoded whole, and at a quarter
def test_exif_rotation_and_modes_are_kept(mode, orientation, size, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo(size, seed=1, grain=1).convert(mode).save(tmp_path / 'a.jpg', exif=exif, quality=95)
    full = np.asarray(load_image(tmp_path / 'a.jpg').resize((64, 64), Image.Resampling.BICUBIC), int)
    assert np.abs(full - load_pixels(tmp_path / 'a.jpg', 64).permute(1, 2, 0).numpy()).mean() < 2


@pytest.mark.parametrize('suffix', ['png', 'gif', 'webp', 'tif', 'bmp'])
def test_other_formats_are_decoded_whole(suffix, tmp_path):
    photo((300, 200)).save(tmp_path / f'a.{suffix}')
    full = np.asarray(load_image(tmp_path / f'a.{suffix}').resize((48, 48), Image.Resampling.BICUBIC), int)
    assert np.abs(full - load_pixels(tmp_path / f'a.{suffix}', 48).permute(1, 2, 0).numpy()).max() <= 2


def test_mangled_jpegs_give_pixels_or_a_value_error(tmp_path, capfd):
    path = tmp_path / 'a.jpg'
    rng = np.random.default_rng(0)
    refused = 0
    photo((300, 200)).save(path)
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    for i in range(120):
        mangled = whole.copy()
        mangled[rng.integers(0, len(whole), 8)] = rng.integers(0, 256, 8)
        path.write_bytes(mangled[: rng.integers(1, len(whole) + 1)].tobytes())
        try:
            assert load_pixels(path, (32, 180)[i % 2]).shape[0] == 3
        except ValueError as error:
            refused += str(path) in str(error)
    assert refused > 60


# --- the cache
# ------------------------------------------------------------------------------------------------------


def test_the_cache_gives_what_is_decoded(folder, tmp_path):
    cache = PhotoCache(files(folder), 48, tmp_path / 'cache')
    for file in files(folder):
        assert torch.equal(cache(file), load_pixels(file, 48))
    copy = pickle.loads(pickle.dumps(cache))
    assert len(pickle.dumps(cache)) < 5000 and torch.equal(copy(files(folder)[3]), cache(files(folder)[3]))
    same(augmented(folder, None, load=cache)[1, 2], augmented(folder, None)[1, 2])


def test_the_second_opening_decodes_nothing(folder, tmp_path, monkeypatch):
    PhotoCache(files(folder), 48, tmp_path / 'cache')
    monkeypatch.setattr('pvtblip.loading.load_pixels', lambda *a: pytest.fail('decoded again'))
    PhotoCache(list(reversed(files(folder))), 48, tmp_path / 'cache')  # nor does the order matter


@pytest.mark.parametrize('change', ['content', 'time', 'gone', 'size', 'one more'])
def test_another_source_is_another_cache(change, folder, tmp_path):
    old = PhotoCache(files(folder), 48, tmp_path / 'cache')
    names = files(folder)
    size = 48
    first = folder / '0.jpg'
    if change == 'content':
        photo((160, 120), 77).save(first, quality=90)
    if change == 'time':
        os.utime(first, ns=(1, 1))
    if change == 'gone':
        first.unlink()
    if change == 'size':
        size = 32
    if change == 'one more':
        photo((160, 120), 9).save(folder / '9.jpg')
        names = files(folder)
    new = PhotoCache(names, size, tmp_path / 'cache')
    assert new.folder != old.folder and torch.equal(new(names[-1]), load_pixels(names[-1], size))
    if change == 'content':
        assert torch.equal(new(first), load_pixels(first, 48)) and not torch.equal(new(first), old(first))
    if change == 'gone':
        assert 'no such image file' in new.broken[str(first)]


def test_broken_photos_are_remembered(folder, tmp_path):
    (folder / '2.jpg').write_bytes((folder / '0.jpg').read_bytes()[:700])
    (folder / '5.jpg').write_text('not a photo')
    cache = PhotoCache(files(folder), 48, tmp_path / 'cache')
    assert sorted(cache.broken) == [str(folder / '2.jpg'), str(folder / '5.jpg')]
    with pytest.raises(ValueError, match='5.jpg: not an image'):
        cache(folder / '5.jpg')
    items = [augmented(folder, None, load=cache)[0, i] for i in range(8)]
    assert [item.file for item in items if isinstance(item, BrokenImage)] == ['2.jpg', '5.jpg']
    with pytest.raises(KeyError, match='is not in the cache'):
        cache(folder / 'other.jpg')
    with pytest.raises(ValueError, match='not one of 1 photos'):
        PhotoCache([folder / '5.jpg'], 48, tmp_path / 'cache')


BUILD = """
import sys, time
import pvtblip.loading as loading
slow = float(sys.argv[3])
load = loading.load_pixels
def load_slowly(file, size):
    with open(sys.argv[4], "a") as log: log.write(file + "\\n")
    time.sleep(slow)
    return load(file, size)
loading.load_pixels = load_slowly
from pathlib import Path
files = sorted(Path(sys.argv[1]).glob("*.jpg"))
cache = loading.PhotoCache(files, 48, sys.argv[2], num_threads=1)
print(sum(int(cache(file).sum()) for file in files))
"""


def builder(folder, cache, log, slow=0.05):
    return subprocess.Popen(
        [sys.executable, '-c', BUILD, folder, cache, str(slow), log],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_several_processes_build_it_once(folder, tmp_path):
    running = [builder(folder, tmp_path / 'cache', tmp_path / 'log') for _ in range(3)]
    outputs = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], outputs
    expected = sum(int(load_pixels(file, 48).sum()) for file in files(folder))
    assert {int(out) for out, _ in outputs} == {expected}
    assert len((tmp_path / 'log').read_text().splitlines()) == 8  # each photo decoded once among the three


def test_a_killed_builder_leaves_nothing_that_is_read(folder, tmp_path):
    process = builder(folder, tmp_path / 'cache', tmp_path / 'log', slow=0.3)
    while process.poll() is None and not (
        (tmp_path / 'log').exists() and len((tmp_path / 'log').read_text().splitlines()) >= 3
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert [path.suffix for path in (tmp_path / 'cache').iterdir() if path.is_dir()] == ['.tmp']
    cache = PhotoCache(files(folder), 48, tmp_path / 'cache')
    for file in files(folder):
        assert torch.equal(cache(file), load_pixels(file, 48))
    assert [path for path in (tmp_path / 'cache').iterdir() if path.is_dir()] == [cache.folder]


def test_what_killed_builders_of_other_caches_left_goes_and_what_is_being_built_stays(folder, tmp_path):
    (tmp_path / 'cache').mkdir()
    for name in ('dead', 'alive'):
        (tmp_path / 'cache' / f'.photos-{name}.tmp').mkdir()
    with FileLock(tmp_path / 'cache' / 'photos-alive.lock'):
        cache = PhotoCache(files(folder), 48, tmp_path / 'cache')
    left = {path.name for path in (tmp_path / 'cache').iterdir() if path.is_dir()}
    assert left == {cache.folder.name, '.photos-alive.tmp'}


def test_a_damaged_note_of_a_cache_is_named(folder, tmp_path):
    cache = PhotoCache(files(folder), 48, tmp_path / 'cache')
    for text in ('{', '[]', '[' * 100_000):
        (cache.folder / 'broken.json').write_text(text)
        with pytest.raises(ValueError, match='broken.json'):
            PhotoCache(files(folder), 48, tmp_path / 'cache')


def test_too_small_a_disk_is_said_before_the_work(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000)
    )
    monkeypatch.setattr('pvtblip.loading.load_pixels', lambda *a: pytest.fail('work began'))
    with pytest.raises(OSError, match=r'photos-\w+: cannot be written .*it needs .*free some space'):
        PhotoCache(files(folder), 48, tmp_path / 'cache')
    assert not [path for path in (tmp_path / 'cache').iterdir() if path.is_dir()]


def test_a_disk_that_fills_up_leaves_nothing(folder, tmp_path):
    # 8 photos need 55,296 bytes
    script = 'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n' + BUILD
    done = subprocess.run(
        [sys.executable, '-c', script, folder, tmp_path / 'cache', '0', tmp_path / 'log'],
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 1 and ': cannot be written (' in done.stderr and 'free some space' in done.stderr
    )
    assert not [path for path in (tmp_path / 'cache').iterdir() if path.is_dir()]


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write everywhere')
def test_a_read_only_folder_is_named(folder, tmp_path):
    (tmp_path / 'cache').mkdir(mode=0o500)
    with pytest.raises(OSError, match='cache'):
        PhotoCache(files(folder), 48, tmp_path / 'cache')


# --- batches of like length
# -----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=120),
    st.integers(1, 9),
    st.integers(1, 8),
    st.integers(1, 4),
    st.booleans(),
    st.integers(0, 3),
)
def test_every_photo_comes_once_an_epoch(lengths, batch_size, window, together, drop_last, epoch):
    if drop_last and len(lengths) < batch_size:
        return
    make = lambda **where: LengthBatchSampler(
        lengths, batch_size, 1, drop_last, window=window, together=together, **where
    )
    sampler = make()
    first = epoch * sampler.batches_per_epoch
    batches = [sampler.batch(first + i) for i in range(sampler.batches_per_epoch)]
    seen = [index for batch in batches for _, index in batch]
    assert (
        len(set(seen))
        == len(seen)
        == (len(lengths) // batch_size * batch_size if drop_last else len(lengths))
    )
    assert {len(batch) for batch in batches[:-1]} <= {batch_size}
    assert list(make(start_batch=first, num_batches=len(batches))) == batches


def test_padding_falls_and_the_order_stays_random():
    texts = [Record(str(i), make_scene(0, i).captions, i) for i in range(640)]
    lengths = caption_lengths(texts, CaptionTokenizer())
    assert lengths[5] == CaptionTokenizer()(list(texts[5].captions))['attention_mask'].sum(1).max()

    def positions(sampler):
        return sum(
            max(lengths[i] for _, i in sampler.batch(step)) for step in range(sampler.batches_per_epoch)
        )

    plain = SeededBatchSampler(640, 16)
    grouped = LengthBatchSampler(lengths, 16)
    assert positions(grouped) < 0.85 * positions(plain)
    longest = [max(lengths[i] for _, i in grouped.batch(step)) for step in range(40)]
    assert longest != sorted(longest) and grouped.order(0) != grouped.order(1)
    pairs = LengthBatchSampler(lengths, 16, together=4)
    spreads = [
        max(longest) - min(longest)
        for longest in (
            [max(lengths[i] for _, i in pairs.batch(4 * group + k)) for k in range(4)] for group in range(10)
        )
    ]
    assert sum(spreads) / len(spreads) < (max(lengths) - min(lengths)) / 3
