"""How many photos a second does `pvtblip caption` do, where does its time go, and how long does the
first caption take from a cold start?

    python benchmarks/pipeline.py [--quick] [--images DIR] [--model DIR] [--json FILE]

The model, where none is given: PVT v2-b0 at 224 px and a 6-layer decoder of width 384 that may say all
30,522 tokens; random weights, so its captions run on
to the full 20 positions: no captioner of this size does more work. Three beams. The photos, where none
are given: 1,000 JPEGs of 500 x 375, made here in a temporary folder.

- cold: the command as a new process, one photo, from its start to its exit; beside it, what importing
  torch alone takes, and torch, timm and transformers. Median of 5. The files are in the system's cache.
- warm: one photo at a time in one process, from the file to the caption. Median.
- stations: milliseconds a photo for decode, encode and generate, each alone, in batches of 16.
- folder: `pvtblip caption DIR --jsonl OUT` as a new process, without and with processes that decode
  ahead; photos a second by the whole time, and by the command's own
  figure, which leaves the start out. Both must write the same captions, one for each photo, else the
  script ends with an error.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pvtblip.decoder import Captioner, CaptionerConfig, DecoderConfig
from pvtblip.generation import encode_in_pieces, generate, process_image
from pvtblip.pipeline import default_workers, list_photos
from pvtblip.fast import load_model
from pvtblip.files import keep_memory
from pvtblip.pvt_encoder import EncoderConfig

BATCH = 16
# what a captioner with a backbone of timm needs of others; timm imports torchvision and torch's compiler
LIBRARIES = 'import torch, timm; from transformers import AutoTokenizer, BertTokenizerFast'


def make_model(folder):
    torch.manual_seed(0)
    decoder = DecoderConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    model = Captioner(
        CaptionerConfig(
            encoder=EncoderConfig(name='pvt_v2_b0', image_size=224), decoder=decoder, max_length=20
        )
    )
    for weight in model.decoder.parameters():
        weight.data += 0.03 * torch.randn_like(weight)  # further apart than at the start: captions differ
    model.decoder.cls['predictions'].bias.data[model.tokenizer.sep_token_id] -= 1e4  # no caption ends early
    model.save_pretrained(folder)
    return folder


def make_photos(folder, number):
    "Texture of several scales with grain, as JPEGs of about 60 kB."
    folder.mkdir()
    for i in range(number):
        rng = np.random.default_rng(i)
        layers = [
            np.asarray(
                Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).resize(
                    (500, 375), Image.Resampling.BICUBIC
                ),
                np.float32,
            )
            for side in (4, 16, 64)
        ]
        pixels = sum(layers) / 3 + rng.normal(0, 4, (375, 500, 1))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f'{i:06}.jpg', quality=90)
    return folder


def seconds(*command):
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return time.perf_counter() - start, done


def cold(photo, model, rounds=5):
    "Seconds from nothing to a caption."
    caption = [seconds('-m', 'pvtblip', 'caption', photo, '--model', model)[0] for _ in range(rounds)]
    imports = {
        code: statistics.median(seconds('-c', code)[0] for _ in range(rounds))
        for code in ('import torch', LIBRARIES)
    }
    return dict(
        cold_seconds=statistics.median(caption),
        slowest=max(caption),
        import_torch=imports['import torch'],
        import_libraries=imports[LIBRARIES],
    )


def stations(files, model):
    "Milliseconds a photo of each station, alone, and of one photo at a time."

    def clock(function, items):
        function(items[0])  # the first call packs weights
        times = []
        for item in items:
            start = time.perf_counter()
            function(item)
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)

    groups = [files[i : i + BATCH] for i in range(0, len(files) // BATCH * BATCH, BATCH)]
    decoded = [process_image(group, model) for group in groups]
    encoded = [model.encode_image(pixels) for pixels in decoded]
    found = dict(
        decode=clock(lambda group: process_image(group, model), groups) / BATCH,
        encode=clock(lambda pixels: encode_in_pieces(model, pixels), decoded) / BATCH,
        generate=clock(lambda tokens: generate(model, image_tokens=tokens, num_beams=3), encoded) / BATCH,
    )
    return found, clock(lambda file: generate(model, process_image(file, model), num_beams=3), files[:40])


def folder_run(images, model, out, workers):
    "Photos a second, whole and without the start; the captions."
    whole, done = seconds(
        '-m',
        'pvtblip',
        'caption',
        images,
        '--model',
        model,
        '--jsonl',
        out,
        '--workers',
        workers,
        '--batch-size',
        BATCH,
    )
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    own = float(re.search(r'([\d.]+) a second; \d+ failed', done.stderr)[1])
    return dict(
        workers=workers,
        photos=len(lines),
        seconds=whole,
        per_second=len(lines) / whole,
        per_second_without_start=own,
    ), [line['caption'] for line in lines]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--quick', action='store_true', help='100 photos instead of 1,000')
    parser.add_argument('--images', type=Path, metavar='DIR', help='photos of your own; all must be readable')
    parser.add_argument('--model', metavar='DIR', help='a model of your own')
    parser.add_argument('--json', metavar='FILE', help='write the figures here too')
    args = parser.parse_args()
    os.environ.setdefault('HF_HUB_OFFLINE', '1')
    keep_memory()  # as the command does
    with tempfile.TemporaryDirectory() as place, torch.inference_mode():
        place = Path(place)
        folder = args.model or make_model(place / 'model')
        images = args.images or make_photos(place / 'photos', 100 if args.quick else 1000)
        files = [photo.name for photo in list_photos([str(images)])]
        if len(files) < BATCH:
            sys.exit(f'{images}: {len(files)} photos; give {BATCH} or more')
        report = dict(
            cores=default_workers() + 1,
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            **cold(files[0], folder),
        )
        print(
            f'{report["cores"]} cores, torch {report["torch"]}\ncold start: '
            f'{report["cold_seconds"]:.2f} s to the first caption (slowest of 5: '
            f'{report["slowest"]:.2f} s); '
            f'importing torch alone {report["import_torch"]:.2f} s, torch, timm and transformers '
            f'{report["import_libraries"]:.2f} s',
            flush=True,
        )
        model = load_model(folder)
        found, warm = stations(files[:160], model)
        report |= dict(warm_ms=warm, stations_ms=found)
        print(
            f'warm, one photo at a time: {warm:.1f} ms a '
            f'photo\n\n{"station":12}{"ms a photo":>12}{"share":>8}'
        )
        for name, cost in found.items():
            print(f'{name:12}{cost:12.2f}{cost / sum(found.values()):8.0%}')
        print(f'\n{"folder":12}{"photos":>8}{"seconds":>10}{"a second":>10}{"without start":>15}', flush=True)
        report['folder'], captions = [], []
        for workers in dict.fromkeys((0, 1, default_workers())):
            row, said = folder_run(images, folder, place / f'out{workers}.jsonl', workers)
            report['folder'].append(row)
            captions.append(said)
            print(
                f'{workers} '
                f'workers{"":3}{row["photos"]:8}{row["seconds"]:10.1f}{row["per_second"]:10.1f}'
                f'{row["per_second_without_start"]:15.1f}',
                flush=True,
            )
        if any(said != captions[0] for said in captions) or len(captions[0]) != len(files):
            sys.exit('the runs did not write the same captions, one for each photo')
        if args.json:
            Path(args.json).write_text(json.dumps(report, indent=1))


if __name__ == '__main__':
    main()
