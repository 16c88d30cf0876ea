"Photos that a frozen backbone looks at once: the same training, and nothing looked at again."

import json
from itertools import product
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from pvtblip.config import change_config
from pvtblip.data import read_captions
from pvtblip.decoder import Captioner
from pvtblip.files import delete
from pvtblip.loading import AugmentedDataset, swap_sides
from pvtblip.photo_training import (
    DataConfig,
    PhotoRun,
    captioner_config,
    encoded_sets,
    photo_sets,
    takes_maps,
    train_on_photos,
)
from pvtblip.pvt_encoder import BrokenImage, EncoderConfig, ImageEncoder
from pvtblip.shapes import make_scene
from pvtblip.training import TrainingConfig

# BatchNorm, and two maps of different sizes
EYES = EncoderConfig('test_efficientnet', image_size=64, stages=(-2, -1))


@pytest.fixture
def run(tmp_path):
    "Sixteen drawn scenes, the fifth one broken, and four steps with frozen eyes."
    (tmp_path / 'photos').mkdir()
    captions = {}
    for i in range(16):
        Image.fromarray(make_scene(0, i).image).save(tmp_path / f'photos/{i:02}.png')
        captions[f'{i:02}.png'] = [f'shape {chr(97 + i)} on the {side}' for side in ('left', 'right')]
    (tmp_path / 'photos/05.png').write_bytes(b'no photo')
    (tmp_path / 'captions.json').write_text(json.dumps(captions))
    return PhotoRun(
        data=DataConfig(
            str(tmp_path / 'captions.json'),
            str(tmp_path / 'photos'),
            cache=str(tmp_path / 'kept'),
            encode_once=True,
        ),
        freeze_encoder=True,
        captioner=replace(captioner_config(tiny=True), encoder=EYES),
        epochs=0,
        training=TrainingConfig(max_steps=4, batch_size=4, logging_steps=1, save_steps=2, eval_steps=4),
    )


def losses(run, out, **options):
    report = train_on_photos(run, out, log=lambda line: None, progress=False, **options)
    assert [Path(file).name for file in report['broken']] == ['05.png']
    return [entry['loss'] for entry in report['history'] if 'loss' in entry]


def sets(run):
    "The data sets of a run, and its captioner in training mode."
    records = read_captions(run.data.captions)
    dataset, held_set = photo_sets(run, records[:12], records[12:], _folder(run), progress=False)
    torch.manual_seed(0)
    return dataset, held_set, Captioner(run.captioner)


def _folder(run):
    return Path(run.data.images)


def test_frozen_eyes_look_once(run, tmp_path, monkeypatch):
    looked_at_each_step = losses(
        change_config(run, {'data.encode_once': False, 'data.cache': None}), tmp_path / 'a'
    )
    assert_close(losses(run, tmp_path / 'b'), looked_at_each_step, atol=2e-3, rtol=0)
    # the next run looks at nothing
    monkeypatch.setattr(ImageEncoder, 'features', lambda *_: pytest.fail('it looked again'))
    assert_close(losses(run, tmp_path / 'c'), looked_at_each_step, atol=2e-3, rtol=0)


def test_a_killed_run_goes_on_with_its_maps(run, tmp_path):
    whole = losses(run, tmp_path / 'run')
    # as if it had been killed between its second and its fourth step
    delete(tmp_path / 'run/states/checkpoint-4')
    delete(tmp_path / 'run/states/best')
    for file in ('model.safetensors', 'config.json', 'vocab.txt', 'tokenizer.json', 'tokenizer_config.json'):
        delete(tmp_path / 'run' / file)
    again = losses(run, tmp_path / 'run', resume=True)
    assert_close(again, whole, atol=1e-6, rtol=0)


def test_maps_are_those_of_the_photo_and_of_its_mirror_image(run):
    run = change_config(run, {'data.augmentation.flip': 0.5})
    dataset, held_set, model = sets(run)
    encoded, encoded_held = encoded_sets(run, model.encoder, dataset, held_set, progress=False)
    assert model.encoder.training and model.encoder.backbone.training  # as it was
    model.eval()
    plain = AugmentedDataset(dataset.dataset, run.captioner.encoder)
    seen = set()
    for index in product(range(3), range(len(dataset))):
        item, photo = encoded[index], plain[index]
        if isinstance(photo, BrokenImage):
            assert isinstance(item, BrokenImage)
            continue
        mirrored = item['captions'] != photo['captions']
        seen.add(mirrored)
        if mirrored:
            assert item['captions'] == [swap_sides(caption) for caption in photo['captions']]
        pixels = photo['pixel_values'].flip(-1) if mirrored else photo['pixel_values']
        with takes_maps(model.encoder):
            tokens = model.encode_image(item['pixel_values'][None])
        assert_close(tokens, model.encode_image(pixels[None]), atol=1e-2, rtol=0)
    assert seen == {False, True}
    # held-out photos are never mirrored
    assert [item['captions'] for item in encoded_held] == [item['captions'] for item in held_set]


def test_other_weights_have_other_maps(run):
    folders = set()
    for seed in range(2):
        dataset, held_set, model = sets(run)
        if seed:
            next(model.encoder.backbone.parameters()).data.add_(1)
        encoded, _ = encoded_sets(run, model.encoder, dataset, held_set, progress=False)
        folders.add(encoded.dataset.load.folder)
    assert len(folders) == 2


@pytest.mark.parametrize(
    'change, message',
    [
        ({'freeze_encoder': False}, 'set freeze_encoder too'),
        ({'data.cache': None}, 'set data.cache'),
        ({'data.augmentation.crop_scale': 0.7}, 'may only be mirrored'),
        ({'data.augmentation.hue': 0.1}, 'may only be mirrored'),
    ],
)
def test_what_does_not_go_with_it(run, change, message):
    with pytest.raises(ValueError, match=message):
        change_config(run, change)


def test_a_map_that_does_not_fit_is_refused(run):
    dataset, held_set, model = sets(run)
    for parameter in model.encoder.backbone.parameters():
        parameter.data.mul_(100)
    with pytest.raises(ValueError, match='does not fit 16 bits'):
        encoded_sets(run, model.encoder, dataset, held_set, progress=False)
    assert not list(_folder(run).parent.glob('kept/maps-*[0-9a-f]/'))
