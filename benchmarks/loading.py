"""How many photos a second does pvtblip load, compared with `ImageFolder`'s way?

    python benchmarks/loading.py [--quick] [--photos DIR] [--captions FILE] [--json FILE]

ImageFolder's way: open with PIL, convert("RGB"), then torchvision's Resize, CenterCrop, ToTensor,
Normalize. Ours: `image_transform`, from the same
files; and `PhotoCache` with the same normalisation. All end in a (3, size, size) float32 tensor. One
process, one thread, in turn, several rounds;
a ratio is the median over the rounds of (ImageFolder's time / our time). Before it is timed, the cache
must give our pixels exactly, and ours must be
within 1.5 steps of 255, on average, of PIL's full decode and bicubic resize; else the script ends with an error.

The photos are made here: slopes, edges, texture of all scales (1/f) and grain, saved with quality 90.
How much a reduced decode saves depends on the bytes of the file,
since all of them must be read bit by bit in any case. So the large photos come smooth and grained, and
the table shows their megabytes.
--captions FILE adds what the rules of `pvtblip.loading` do to a caption file of yours: flips refused,
crops and colours left alone, padding.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from pvtblip.data import read_captions
from pvtblip.training import SeededBatchSampler
from pvtblip.loading import (
    LengthBatchSampler,
    PhotoCache,
    caption_lengths,
    speaks_of_colour,
    speaks_of_place,
    swap_sides,
)
from pvtblip.pvt_encoder import EncoderConfig, image_transform, load_image, load_pixels, normalise_pixels
from pvtblip.tokenizer import CaptionTokenizer

TOLERANCE = 1.5  # mean steps of 255
SETS = [  # name, width, height, grain in steps of 255, photos
    ('web', 500, 375, 4, 24),
    ('smooth', 4000, 3000, 1, 3),
    ('grained', 4000, 3000, 4, 3),
]


def photo(width, height, grain, rng):
    "Slopes, discs with sharp edges, texture of all scales, grain."
    pixels = np.zeros((height, width, 3), np.float32)
    for side in (4, 8, 16, 32, 64, 128, 256):
        noise = Image.fromarray(
            rng.integers(0, 256, (max(2, side * height // width), side, 3), dtype=np.uint8)
        )
        pixels += (
            (np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), np.float32) - 128)
            * 3
            / side**0.7
        )
    y, x = np.mgrid[:height, :width].astype(np.float32) / height
    for _ in range(8):
        inside = (x - rng.uniform(0, width / height)) ** 2 + (y - rng.uniform()) ** 2 < rng.uniform(
            0.02, 0.3
        ) ** 2
        pixels[inside] = 0.4 * pixels[inside] + rng.uniform(-90, 90, 3).astype(np.float32)
    pixels += 128 + rng.normal(0, grain, (height, width, 1)).astype(np.float32)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def make_sets(folder, quick):
    "name -> files"
    sets = {}
    rng = np.random.default_rng(0)
    for name, width, height, grain, count in SETS:
        sets[name] = [folder / f'{name}{i}.jpg' for i in range(max(2, count // 4) if quick else count)]
        for file in sets[name]:
            photo(width, height, grain, rng).save(file, quality=90)
    return sets


def image_folder(config):
    "ImageFolder's loader and the usual transform."
    transform = transforms.Compose(
        [
            transforms.Resize(config.image_size),
            transforms.CenterCrop(config.image_size),
            transforms.ToTensor(),
            transforms.Normalize(config.mean, config.std),
        ]
    )

    def load(path):
        with open(path, 'rb') as file:
            return transform(Image.open(file).convert('RGB'))

    return load


def check(files, size, cache):
    "Mean difference from the full decode, in steps of 255."
    steps = []
    for file in files:
        full = np.asarray(load_image(file).resize((size, size), Image.Resampling.BICUBIC), int)
        ours = load_pixels(file, size)
        if not torch.equal(cache(file), ours):
            sys.exit(f'{file}: the cache has other pixels')
        steps.append(np.abs(full - ours.permute(1, 2, 0).numpy()).mean())
    if max(steps) > TOLERANCE:
        sys.exit(f'{files[0].parent}: {max(steps):.2f} steps from the full decode, {TOLERANCE} are allowed')
    return statistics.mean(steps)


def timed(load, files):
    start = time.perf_counter()
    for file in files:
        load(file)
    return time.perf_counter() - start


def measure(name, files, size, rounds, folder):
    "One row of the table."
    config = EncoderConfig(image_size=size)
    cache = PhotoCache(files, size, folder)
    normalise = normalise_pixels(config)
    difference = check(files, size, cache)
    ways = dict(
        plain=image_folder(config), ours=image_transform(config), cached=lambda file: normalise(cache(file))
    )
    for load in ways.values():
        timed(load, files[:1])  # warm-up; all files are in the system's cache from here on
    times = []
    for i in range(rounds):
        order = list(ways) if i % 2 == 0 else list(reversed(ways))
        times.append({way: timed(ways[way], files) for way in order})
    rate = {way: round(len(files) / statistics.median(t[way] for t in times), 1) for way in ways}
    ratio = {
        way: round(statistics.median(t['plain'] / t[way] for t in times), 2) for way in ('ours', 'cached')
    }
    width, height = Image.open(files[0]).size
    return dict(
        photos=name,
        width=width,
        height=height,
        megabytes=round(statistics.mean(file.stat().st_size for file in files) / 1e6, 2),
        size=size,
        photos_per_second=rate,
        ratio=ratio,
        mean_difference=round(float(difference), 2),
    )


def survey(path):
    "What the rules do to a caption file."
    records = read_captions(path)
    captions = [caption for record in records for caption in record.captions]
    swapped = [swap_sides(caption) for caption in captions]
    share = lambda flags: f'{sum(flags):,} of {len(records):,} photos'
    print(
        f'{len(captions):,} captions: '
        f'{sum(new not in (None, old) for new, old in zip(swapped, captions)):,} rewritten by a flip, '
        f'{sum(new is None for new in swapped):,} refuse it'
    )
    print(
        'flip refused: '
        + share([any(swap_sides(caption) is None for caption in record.captions) for record in records])
    )
    print(
        'no crop (a caption names a place): '
        + share([speaks_of_place(record.captions) for record in records])
    )
    print(
        'no colour jitter (a caption names a colour): '
        + share([speaks_of_colour(record.captions) for record in records])
    )
    lengths = caption_lengths(records, CaptionTokenizer())
    for name, sampler in (
        ('shuffled', SeededBatchSampler(len(records), 32)),
        ('like lengths', LengthBatchSampler(lengths, 32)),
    ):
        positions = [
            max(lengths[i] for _, i in sampler.batch(step)) for step in range(sampler.batches_per_epoch)
        ]
        print(f'token positions of a row in batches of 32 photos, {name}: {statistics.mean(positions):.1f}')


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--quick', action='store_true', help='fewer photos, 3 rounds: half a minute')
    parser.add_argument('--photos', type=Path, metavar='DIR', help='JPEGs of your own instead of made ones')
    parser.add_argument('--captions', metavar='FILE', help='also say what the rules do to this caption file')
    parser.add_argument('--json', metavar='FILE', help='write the rows here too')
    parser.add_argument('--rounds', type=int, help='timed rounds (default 9; 3 with --quick)')
    args = parser.parse_args()
    torch.set_num_threads(1)
    rounds = args.rounds or (3 if args.quick else 9)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        sets = (
            {
                'yours': sorted(
                    file for file in args.photos.iterdir() if file.suffix.lower() in ('.jpg', '.jpeg')
                )
            }
            if args.photos
            else make_sets(folder, args.quick)
        )
        if not all(sets.values()):
            sys.exit(f'{args.photos}: no JPEGs; give a folder that holds some')
        print(
            f"one process, one thread, torch {torch.__version__}; ratio: ImageFolder's time / ours, "
            f'median of {rounds}'
        )
        print(
            f'{"photos":>8}{"pixels":>12}{"MB":>6}{"to px":>7}{"ImageFolder/s":>15}{"ours/s":>9}'
            f'{"cached/s":>10}{"ratio ours":>12}{"cached":>8}{"difference":>12}'
        )
        for name, files in sets.items():
            for size in (224, 384):
                row = measure(name, files, size, rounds, folder / 'cache')
                rows.append(row)
                rate, ratio = row['photos_per_second'], row['ratio']
                print(
                    f'{name:>8}{row["width"]:>7}x{row["height"]:<4}{row["megabytes"]:>6.2f}{size:>7}'
                    f'{rate["plain"]:>15.1f}{rate["ours"]:>9.1f}{rate["cached"]:>10.1f}'
                    f'{ratio["ours"]:>12.2f}{ratio["cached"]:>8.2f}{row["mean_difference"]:>12.2f}',
                    flush=True,
                )
    if args.captions:
        survey(args.captions)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))


if __name__ == '__main__':
    main()
