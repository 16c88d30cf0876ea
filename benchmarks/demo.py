"""What makes the demo learn "left of"? Each part of its recipe left out once, on scenes of their own.

    python benchmarks/demo.py [--rows NAME ...] [--seeds N ...] [--steps N] [--scenes N] [--json FILE]

A row is one training from nothing for each seed (six to ten minutes on two cores, one on a GPU). Results lie in
FILE (default: demo.json beside this script), training by training, so a run that was stopped goes on where it was.
The table gives the true share of all statements and of each kind, for unseen scenes and for colour-kind pairs that
training never shows: the mean of the seeds, the least and the most.
"""

import argparse
import os
from dataclasses import replace
from itertools import product
from pathlib import Path

os.environ.setdefault('HF_HUB_OFFLINE', '1')

import torch

from pvtblip.demo import DemoCaptioner, demo_config, demo_scenes, demo_table, demo_training, score_scenes
from pvtblip.fast import best_device
from pvtblip.files import write_json
from pvtblip.training import train
from rows import stored_rows

ROWS = {
    'as it is': {},
    'words of place count once': dict(captioner=dict(place_weight=1.0)),
    'words of kind count once': dict(captioner=dict(kind_weight=1.0)),
    'image tokens as they come': dict(captioner=dict(token_scale=1.0)),
    'rate 3e-3': dict(training=dict(learning_rate=3e-3)),
    'position codes of up to 16 waves': dict(encoder=dict(position_waves=16.0)),
    'two captions a drawing': dict(scenes=dict(captions_per_image=2)),
}
# {what is changed: {whose settings: their values}}, and all of it at once
ROWS['none of these'] = {
    whose: {name: value for row in ROWS.values() for name, value in row.get(whose, {}).items()}
    for whose in ('captioner', 'training', 'encoder', 'scenes')
}
SEED = 1000  # of the scenes that are asked about; the demo's own figures use 0


def run(changes, seed, steps, scenes):
    "Train with these changes, then count true statements."
    torch.manual_seed(seed)
    config = demo_config()
    config = replace(config, encoder=replace(config.encoder, **changes.get('encoder', {})))
    model = DemoCaptioner(config, **changes.get('captioner', {})).to(best_device())
    dataset = demo_scenes(config, seed, **changes.get('scenes', {}))
    train(model, dataset, demo_training(steps, seed, **changes.get('training', {})))
    model.eval()
    scores = {split: score_scenes(model, split, scenes, SEED) for split in ('unseen_scenes', 'unseen_pairs')}
    return {
        split: dict(all=score['statements_true'], **score['true_by_kind']) for split, score in scores.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--rows', nargs='+', choices=list(ROWS), default=list(ROWS), metavar='NAME')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2], help='of weights and drawings')
    parser.add_argument('--steps', type=int, default=1700)
    parser.add_argument('--scenes', type=int, default=600)
    parser.add_argument('--json', type=Path, default=Path(__file__).with_name('demo.json'))
    options = parser.parse_args()

    # What is there already?
    settings = dict(steps=options.steps, scenes=options.scenes)
    file = options.json
    stored = stored_rows(file, settings)

    # Row by row
    for name, seed in product(options.rows, options.seeds):
        row = stored['results'].setdefault(name, {})
        if str(seed) not in row:
            try:
                row[str(seed)] = run(ROWS[name], seed, options.steps, options.scenes)
            except FloatingPointError as error:  # part of the result: what is left out was there for a reason
                row[str(seed)] = dict(stopped=str(error).partition(';')[0])
            write_json(file, stored)
    print(demo_table(stored['results']))


if __name__ == '__main__':
    main()
