"""What does each of the six bugs of `08_six_bugs` cost on photos? One seed, one small budget.

    python benchmarks/bugs_photos.py --photos DIR --dev DIR --text-model BERT --encoder-weights FILE --work DIR
        [--rows ROW ...] [--steps N] [--limit N] [--json FILE]

--photos and --dev hold Flickr8k as a folder `images` and a file `captions.json`. The captioner is that of the
recipe's first stage (`19_photo_recipe`): EfficientNet-Lite2, left as it is, and a BERT that can read. It sees
16 photos a step with two captions each, without crops, so that each photo is encoded once. Models and kept maps
lie in --work; results in FILE (default: bugs_photos.json beside this script), row by row: a run that was stopped
goes on where it was. A row that a part refuses to run has the refusal instead of scores.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault('HF_HUB_OFFLINE', '1')

import torch

from pvtblip.bugs import SIX, SPECIMENS, bug, photos_table, title_of
from pvtblip.files import write_json
from pvtblip.pvt_encoder import ImageEncoder
from pvtblip.photo_training import DataConfig, PhotoRun, captioner_config, train_on_photos
from pvtblip.scoring import EvaluationRun, evaluate_photos
from pvtblip.training import TrainingConfig
from rows import stored_rows

# on one device a forgotten device costs nothing, as the table of the drawings shows
ROWS = [(), *((name,) for name in SIX if name != 'mixed_devices'), SIX]


def first_stage(options, cache):
    "The recipe's first stage, for few steps."
    captioner = captioner_config(
        encoder='tf_efficientnet_lite2',
        encoder_weights=str(options.encoder_weights),
        encoder_mean=(0.5, 0.5, 0.5),
        encoder_std=(0.5, 0.5, 0.5),
        encoder_stages=(-1,),
        encoder_image_size=260,
        text_model=str(options.text_model),
        label_smoothing=0.1,
        word_dropout=0.1,
    )
    data = DataConfig(
        captions=str(options.photos / 'captions.json'),
        images=str(options.photos / 'images'),
        cache=str(cache),
        encode_once=True,
        captions_per_image=2,
    )
    training = TrainingConfig(
        max_steps=options.steps,
        batch_size=16,
        learning_rate=5e-4,
        eval_steps=options.steps,
        save_steps=options.steps,
        dataloader_num_workers=0,
    )
    return PhotoRun(
        text_model=str(options.text_model),
        freeze_encoder=True,
        epochs=0,
        data=data,
        captioner=captioner,
        training=training,
    )


def run(names, options):
    "Train with the faults of training, or take the sound model, and score it with all of them."
    in_training = [name for name in names if SPECIMENS[name].when == 'training']
    title = '+'.join(in_training) or 'none'
    model = options.work / title
    if not (model / 'model.safetensors').is_file():
        # what a fault of the eyes makes of a photo is not kept for the others
        eyes = [
            name for name in in_training if any(part[0] is ImageEncoder for part in SPECIMENS[name].overrides)
        ]
        maps = options.work / ' of '.join(['maps', *eyes])
        with bug(*in_training):
            train_on_photos(first_stage(options, maps), model, resume=model.is_dir())
    try:
        with bug(*names):
            report = evaluate_photos(
                model,
                options.dev / 'images',
                options.dev / 'captions.json',
                EvaluationRun(limit=options.limit),
            )
    except ValueError as error:
        return dict(refused=str(error).splitlines()[0])
    return dict(
        loss=report['shuffled_gap']['real'],
        gap=report['shuffled_gap']['gap'],
        CIDEr=report['corpus']['CIDEr'],
        interval=report['intervals']['CIDEr'],
        distinct=report['diversity']['unique_share'],
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name in ('photos', 'dev', 'text-model', 'encoder-weights', 'work'):
        parser.add_argument(f'--{name}', type=Path, required=True)
    parser.add_argument('--steps', type=int, default=300)
    parser.add_argument('--rows', nargs='+', help='titles of rows; default: all', metavar='ROW')
    parser.add_argument('--limit', type=int, default=250, help='dev photos')
    parser.add_argument('--json', type=Path, default=Path(__file__).with_name('bugs_photos.json'))
    options = parser.parse_args()
    torch.manual_seed(0)

    # What is there already?
    settings = dict(steps=options.steps, limit=options.limit)
    file = options.json
    stored = stored_rows(file, settings)

    # Row by row
    for names in ROWS:
        title = title_of(names).strip('`')
        if title not in stored['results'] and title in (options.rows or [title]):
            stored['results'][title] = run(names, options)
            write_json(file, stored)
    print(photos_table(stored['results']))


if __name__ == '__main__':
    main()
