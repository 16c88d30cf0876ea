"The captioner of the demo: its loss by hand, and what is saved of it."

import matplotlib.pyplot as plt
import pytest, torch
import torch.nn.functional as F

from pvtblip.decoder import Captioner
from pvtblip.demo import (
    KIND_WORDS,
    PLACE_WORDS,
    DemoCaptioner,
    demo_config,
    demo_scenes,
    demo_table,
    save_demo_pictures,
)
from pvtblip.shapes import RELATIONS
from pvtblip.training import Collate

pytestmark = pytest.mark.usefixtures('one_seed')


@pytest.fixture(scope='module')
def batch():
    config = demo_config()
    scenes = demo_scenes(config)
    model = DemoCaptioner(config, place_weight=3.0, kind_weight=2.0)
    found = Collate(model.tokenizer)([scenes[i] for i in range(6)])
    return model, [found[name] for name in ('pixel_values', 'input_ids', 'labels')]


def test_words_of_place_and_kind_count_more(batch):
    model, inputs = batch
    words = {relation.split()[0] for relation in RELATIONS}
    assert words <= set(PLACE_WORDS) and 'of' not in PLACE_WORDS
    output = model(*inputs)
    said = model.tokenizer.tokenizer.convert_ids_to_tokens(model.output_ids[output.labels].tolist())
    assert {'star', 'stars', 'crosses'} <= set(KIND_WORDS)
    each = torch.tensor([3.0 if word in PLACE_WORDS else 2.0 if word in KIND_WORDS else 1.0 for word in said])
    assert set(each.tolist()) == {1, 2, 3}
    by_hand = (each * F.cross_entropy(output.logits, output.labels, reduction='none')).sum() / each.sum()
    torch.testing.assert_close(output.loss, by_hand)
    plain = Captioner.forward(model, *inputs).loss
    model.word_weights.fill_(1.0)
    torch.testing.assert_close(model(*inputs).loss, plain)


def test_what_is_saved_is_a_captioner(batch, tmp_path):
    model, (pixel_values, *_) = batch
    model.save_pretrained(tmp_path / 'model')
    loaded = Captioner.from_pretrained(tmp_path / 'model')
    assert type(loaded) is Captioner
    torch.testing.assert_close(loaded.encode_image(pixel_values), model.eval().encode_image(pixel_values))


def test_the_table_by_hand():
    def found(**shares):
        return dict(unseen_scenes=shares, unseen_pairs=shares)

    lines = demo_table(
        {
            'two': {'0': found(all=0.5, kind=0.25), '1': found(all=0.5, kind=0.75)},
            'half': {'0': found(all=0.25), '1': dict(stopped='no number')},
            'gone': {'0': dict(stopped='no number')},
        }
    ).splitlines()
    assert lines[0].split()[-6:] == ['all', 'kind', 'colour', 'size', 'count', 'relation']
    assert lines[1] == 'two' and lines[2].split() == 'unseen scenes 50 50 (25–75) – – – –'.split()
    assert lines[4] == 'half, 1 of 2 trainings stopped' and lines[5].split()[2:] == ['25', *5 * '–']
    assert lines[7] == 'gone, 1 of 1 trainings stopped' and lines[8].split()[2:] == list(6 * '–')


def test_its_pictures_leave_matplotlib_as_it_was(tmp_path):
    # a backend of one's own, and a figure that is still open
    before = plt.get_backend()
    plt.switch_backend('svg')
    try:
        plt.figure()
        figures = plt.get_fignums()
        history = [dict(step=step, loss=1.0, learning_rate=0.1, eval_loss=1.0) for step in (1, 2)]
        save_demo_pictures(DemoCaptioner(demo_config()).eval(), history, tmp_path)
        assert plt.get_backend() == 'svg'
        assert plt.get_fignums() == figures
    finally:
        plt.switch_backend(before)
    assert {file.name for file in tmp_path.iterdir()} == {'captions.png', 'training.png', 'scene.png'}
