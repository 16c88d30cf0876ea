"The recipes of CONTRIBUTING.md, run as they stand there."

import re
from unittest.mock import patch

import pytest
import timm
import torch
from house import ROOT
from torch import nn

from pvtblip.bugs import SPECIMENS, Specimen, bug, fails
from pvtblip.data import Row, gather_records
from pvtblip.decoder import Captioner, CaptionerConfig
from pvtblip.generation import Rules, generate
from pvtblip.practice import HeldOutCaptions
from pvtblip.pvt_encoder import EncoderConfig, ImageEncoder, image_transform
from pvtblip.shapes import ShapesDataset
from pvtblip.tokenizer import CaptionTokenizer
from pvtblip.training import Callback, TrainingConfig, train

TEXT = (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8').partition('## Recipes')[2]
RECIPES = dict(re.findall(r'\*\*An? ([\w ]+)\.\*\*.*?```python\n(.*?)```', TEXT, re.S))


@pytest.fixture
def names(tmp_path):
    "What the recipes take as given."
    torch.manual_seed(0)
    model = Captioner(CaptionerConfig.tiny(max_length=8)).eval()
    dataset = ShapesDataset(image_transform(model.config.encoder), length=16)
    (tmp_path / 'captions.org').write_text('* a.png\n- a black square\n- nothing at all\n* b.png\n- a ring\n')

    def speak(model, pixel_values):
        return model.tokenizer.decode_batch(generate(model, pixel_values).sequences[:, 0])

    given = dict(model=model, dataset=dataset, held_out=dataset, speak=speak, folder=tmp_path)
    return globals() | given | dict(pixel_values=torch.stack([dataset[i]['pixel_values'] for i in range(2)]))


def test_there_are_six_and_each_is_short():
    assert len(RECIPES) == 6
    assert all(code.count('\n') < 15 for code in RECIPES.values())


def run(recipe, names):
    exec(compile(RECIPES[recipe], recipe, 'exec'), names)


def test_a_backbone(names):
    run('backbone', names)
    assert names['encoder'](torch.zeros(1, 3, 64, 64)).shape == (1, 16, 128)


def test_a_caption_format(names):
    run('caption format', names)
    assert [(record.file, record.captions) for record in names['records']] == [
        ('a.png', ('a black square', 'nothing at all')),
        ('b.png', ('a ring',)),
    ]


def test_a_metric(names):
    run('metric', names)
    assert names['history'][-1]['mean_words'] >= 0


def test_a_callback(names):
    run('callback', names)
    assert len(names['piece'].norms) == 2 and names['piece'].norms[0] != names['piece'].norms[1]


def test_a_decoding_rule(names):
    model = names['model']
    digits = model.tokenizer.tokenizer.convert_tokens_to_ids(list('0123456789'))
    model.decoder.cls['predictions'].bias.data[digits] += 100  # without the rule it says nothing else
    assert set(digits) & set(generate(model, names['pixel_values']).sequences.flatten().tolist())
    run('decoding rule', names)
    assert not set(digits) & set(names['output'].sequences.flatten().tolist())


def test_a_bug(names):
    with patch.dict(SPECIMENS):
        run('bug', names)
        assert fails('said_twice', names['model']) == ''
        with bug('said_twice'):
            assert "'a ring a ring'" in fails('said_twice', names['model'])
