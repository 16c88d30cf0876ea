"""What does each bug of `08_six_bugs` cost: alone, the six together, and none?

    python benchmarks/bugs.py [--quick] [--seeds N] [--steps N] [--minutes M] [--json FILE]

One budget for all: the same language model, the same drawings, the same number of steps. A row is a bug
(or all six) and a seed. The results lie in FILE (default: bugs.json beside this script), row by row, so
a run that was stopped goes on where it was; with --minutes it stops by itself. --quick: one seed, 60
steps, within ten minutes, and nothing is kept unless --json says where. The table at the end is that of
the notebook.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault('HF_HUB_OFFLINE', '1')

import torch

from pvtblip.bugs import SPECIMENS, TABLE, ablation_table, language_model, measure, small_captioner, teach
from pvtblip.files import write_json
from rows import stored_rows


def row(names, seed):
    return f'{"+".join(names) or "none"}|{seed}'


def plain(found):
    "As JSON can say it: an infinite or undefined loss is text."
    number = lambda value: value if value == value and abs(value) < 1e9 else str(value)
    return {key: number(value) if isinstance(value, float) else value for key, value in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--quick', action='store_true', help='one seed, 60 steps')
    parser.add_argument('--seeds', type=int, help='default: 3')
    parser.add_argument('--steps', type=int, help='default: 300')
    parser.add_argument('--minutes', type=float, default=float('inf'), help='begin no row after so many')
    parser.add_argument('--json', type=Path, help='where results lie and go')
    options = parser.parse_args()
    seeds = options.seeds or (1 if options.quick else 3)
    steps = options.steps or (60 if options.quick else 300)
    file = options.json or (None if options.quick else Path(__file__).with_name('bugs.json'))
    torch.set_num_threads(1)
    begin = time.perf_counter()

    # What is there already?
    settings = dict(steps=steps, language_steps=max(1, steps // 3), scenes=100, num_beams=3)
    stored = stored_rows(file, settings)
    results = stored['results']

    # Row by row, a seed at a time: its sound captioner serves the faults of use
    with tempfile.TemporaryDirectory() as place:
        language = None
        for seed in range(seeds):
            sound = None
            for names in TABLE:
                if row(names, seed) in results or time.perf_counter() - begin > 60 * options.minutes:
                    continue
                start = time.perf_counter()
                language = language or language_model(place, settings['language_steps'])
                if sound is None and not any(SPECIMENS[name].when == 'training' for name in names):
                    sound = small_captioner(seed, language)
                    teach(sound, steps, seed)
                found = measure(names, seed, language, steps, sound)
                results[row(names, seed)] = plain(found)
                print(
                    f'{row(names, seed)}: true {found["true"]:.2f} ({time.perf_counter() - start:.0f} s)',
                    flush=True,
                )
                if file:
                    write_json(file, stored)
    print(ablation_table(results))


if __name__ == '__main__':
    main()
