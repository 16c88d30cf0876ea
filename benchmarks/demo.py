"""What makes the demo learn "left of"? Each part of its recipe left out once, on scenes of their own.

    python benchmarks/demo.py [--rows NAME ...] [--steps N] [--scenes N] [--json FILE]

A row is one training from nothing (some five minutes on two cores). Results lie in FILE (default: demo.json
beside this script), row by row, so a run that was stopped goes on where it was. The table gives the true share of
all statements and of each kind, for unseen scenes and for colour-kind pairs that training never shows.
"""

import argparse
import os
from dataclasses import replace
from pathlib import Path

os.environ.setdefault('HF_HUB_OFFLINE', '1')

import torch

from pvtblip.demo import DemoCaptioner, demo_config, demo_scenes, demo_training, score_scenes
from pvtblip.fast import best_device
from pvtblip.files import read_json, write_json
from pvtblip.training import train

# what is changed: the rate, the settings of the captioner, waves of the position codes, captions a drawing
ROWS = {
    'as it is': {},
    'words of place count once': dict(captioner=dict(place_weight=1.0)),
    'image tokens as they come': dict(captioner=dict(token_scale=1.0)),
    'rate 3e-3': dict(rate=3e-3),
    'position codes of up to 16 waves': dict(waves=16.0),
    'two captions a drawing': dict(captions=2),
    'none of these': dict(
        captioner=dict(place_weight=1.0, token_scale=1.0), rate=3e-3, waves=16.0, captions=2
    ),
}
KINDS = ('kind', 'colour', 'size', 'count', 'relation')
SEED = 1000  # of the scenes that are asked about; the demo's own figures use 0


def run(changes, steps, scenes):
    "Train with these changes, then count true statements."
    torch.manual_seed(0)
    config = demo_config()
    if 'waves' in changes:
        config = replace(config, encoder=replace(config.encoder, position_waves=changes['waves']))
    model = DemoCaptioner(config, **changes.get('captioner', {})).to(best_device())
    dataset = demo_scenes(config, captions_per_image=changes.get('captions', 4))
    train(model, dataset, demo_training(steps, learning_rate=changes.get('rate', 2e-3)))
    model.eval()
    found = {split: score_scenes(model, split, scenes, SEED) for split in ('unseen_scenes', 'unseen_pairs')}
    return {
        split: dict(all=score['statements_true'], **score['true_by_kind']) for split, score in found.items()
    }


def table(results):
    "Unseen scenes before the bar, unseen pairs behind it, in per cent."
    lines = [f'{"":34}  {"all":>11}  ' + '  '.join(f'{kind:>11}' for kind in KINDS)]
    for name, found in results.items():
        shares = [
            ' | '.join(
                f'{100 * found[split][key]:4.0f}' if key in found[split] else '   –' for split in found
            )
            for key in ('all', *KINDS)
        ]
        lines.append(f'{name:34}  ' + '  '.join(f'{share:>11}' for share in shares))
    return '\n'.join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--rows', nargs='+', choices=list(ROWS), default=list(ROWS), metavar='NAME')
    parser.add_argument('--steps', type=int, default=1700)
    parser.add_argument('--scenes', type=int, default=600)
    parser.add_argument('--json', type=Path, default=Path(__file__).with_name('demo.json'))
    options = parser.parse_args()
    settings = dict(steps=options.steps, scenes=options.scenes)
    for name in options.rows:
        # another process may have added its rows
        stored = (
            read_json(options.json, dict) if options.json.is_file() else dict(settings=settings, results={})
        )
        if stored['settings'] != settings:
            raise SystemExit(f'{options.json} was made with {stored["settings"]}; choose another file')
        if name in stored['results']:
            continue
        found = run(ROWS[name], options.steps, options.scenes)
        if options.json.is_file():
            stored = read_json(options.json, dict)
        stored['results'][name] = found
        write_json(options.json, stored)
        print(table({name: found}), flush=True)
    print(table(read_json(options.json, dict)['results']))


if __name__ == '__main__':
    main()
