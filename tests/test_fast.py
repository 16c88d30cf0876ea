"The packed captioner says what the plain one says, and is frozen."

import copy
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from matplotlib import get_data_path
from PIL import Image
from torch.testing import assert_close

from pvtblip.decoder import Captioner, CaptionerConfig, boxed_models, checkpoint_folder, model_folder
from pvtblip.confidence import Judge, calibrate, load_confidence
from pvtblip.doctor import load_patient
from pvtblip.fast import PackedLinear, load_model, model_files, pack
from pvtblip.generation import generate, generate_caption, output_layer
from pvtblip.pipeline import attention_drawer, caption_files
from pvtblip.pvt_encoder import weights_in

pytestmark = pytest.mark.usefixtures('one_seed')


def captioner(seed=0, **changes):
    "A small captioner whose captions differ from image to image and end at different places."
    torch.manual_seed(seed)
    model = Captioner(CaptionerConfig.tiny(**changes)).eval()
    for weight in model.decoder.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    model.decoder.cls['predictions'].bias.data[model.tokenizer.sep_token_id] += 3
    return model, torch.randn(4, model.encoder.num_tokens, 64)


STRATEGIES = [
    dict(),
    dict(num_beams=3),
    dict(num_beams=4, num_beam_groups=2, diversity_penalty=0.5),
    dict(no_repeat_ngram_size=2, num_beams=2),
    dict(do_sample=True, top_k=5, num_return_sequences=3),
    dict(num_beams=3, force_words_ids=[[2300]]),
]


@pytest.mark.parametrize('options', STRATEGIES, ids=str)
@pytest.mark.parametrize('words', [None, range(2000, 3000)])
def test_same_tokens(options, words):
    plain, image_tokens = captioner(1)
    plain.set_output_vocabulary(words)
    packed = pack(copy.deepcopy(plain))

    def say(model):
        draws = [torch.Generator().manual_seed(i) for i in range(4)] if options.get('do_sample') else None
        return generate(model, image_tokens=image_tokens, max_length=14, generator=draws, **options)

    expected, found = say(plain), say(packed)
    assert torch.equal(found.sequences, expected.sequences)
    assert_close(found.token_logprobs, expected.token_logprobs, rtol=1e-4, atol=1e-4)


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 70), st.integers(1, 90))
@settings(max_examples=60, deadline=None)
def test_any_size(seed, rows, width, outputs):
    torch.manual_seed(seed)
    layer = torch.nn.Linear(width, outputs)
    x = torch.randn(rows, width)
    with torch.inference_mode():
        assert_close(PackedLinear(layer.weight, layer.bias)(x), layer(x), rtol=1e-4, atol=1e-5)


def test_saved_as_before_and_loaded_again(tmp_path):
    plain, image_tokens = captioner()
    packed = pack(copy.deepcopy(plain))
    assert packed.state_dict().keys() == plain.state_dict().keys()
    packed.save_pretrained(tmp_path)
    again = Captioner.from_pretrained(tmp_path)
    assert torch.equal(
        generate(again, image_tokens=image_tokens).sequences,
        generate(plain, image_tokens=image_tokens).sequences,
    )


@pytest.mark.parametrize('change', ['load', 'half', 'copy', 'words'])
@pytest.mark.parametrize('own', [None, range(2000, 3000)])
def test_what_changes_weights_packs_anew(change, own):
    (plain, image_tokens), (other, _) = captioner(), captioner(5)
    for model in (plain, other):
        model.set_output_vocabulary(own)
    packed = pack(copy.deepcopy(plain))
    if change == 'load':  # the head's layer of its own is not in the file, so it is packed again
        packed.load_state_dict(other.state_dict())
        plain = other
        packed = pack(packed)
    if change == 'half':
        plain = plain.bfloat16()
        packed = packed.bfloat16()
        image_tokens = image_tokens.bfloat16()
    if change == 'copy':
        packed = copy.deepcopy(packed)
    if change == 'words':
        for model in (plain, packed):
            model.set_output_vocabulary(range(5000, 6000))
    expected = generate(plain, image_tokens=image_tokens, max_length=9)
    found = generate(packed, image_tokens=image_tokens, max_length=9)
    if change != 'half':
        assert torch.equal(found.sequences, expected.sequences)
    assert_close(
        found.token_logprobs[:, :, 0],
        expected.token_logprobs[:, :, 0],
        rtol=0.05 if change == 'half' else 1e-4,
        atol=1e-4,
    )


def test_packing_twice_is_packing_once():
    model, image_tokens = captioner()
    once = generate(pack(model), image_tokens=image_tokens).sequences
    assert torch.equal(generate(pack(model), image_tokens=image_tokens).sequences, once)


def test_no_optimizer_finds_its_weights_and_gradients_go_through():
    model, image_tokens = captioner()
    assert not [
        name for name, _ in pack(model).decoder.named_parameters() if 'dense' in name or 'query' in name
    ]
    x = torch.randn(2, 64, requires_grad=True)
    layer = PackedLinear(torch.randn(5, 64), torch.zeros(5))
    layer(x).sum().backward()
    assert_close(x.grad, layer.weight.sum(0).expand(2, -1))


def test_adapters_stay_and_autocast_is_kept():
    class Adapter(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model, image_tokens = captioner()
    model.decoder.layers[0].attention.self.query = Adapter(64, 64)
    expected = generate(model, image_tokens=image_tokens, max_length=9)
    packed = pack(copy.deepcopy(model))
    assert type(packed.decoder.layers[0].attention.self.query) is Adapter
    assert torch.equal(
        generate(packed, image_tokens=image_tokens, max_length=9).sequences, expected.sequences
    )
    layer = PackedLinear(torch.randn(5, 64), torch.zeros(5))
    x = torch.randn(2, 64)
    with torch.inference_mode(), torch.autocast('cpu', torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_the_head_is_used_only_for_the_words_it_was_packed_for():
    model, _ = captioner()
    pack(model)
    assert output_layer(model) is model.packed_output_layer
    model.set_output_vocabulary([3000, 3001])
    assert output_layer(model).weight.shape[0] == 3  # and [SEP]


@pytest.mark.parametrize('name', boxed_models())
def test_a_model_in_the_box(name):
    folder = boxed_models()[name]
    files = {file.name: file.stat().st_size for file in folder.iterdir()}
    assert {'README.md', 'NOTICE', 'model.safetensors'} <= files.keys()
    assert sum(files.values()) <= 64e6
    weights = weights_in(folder / 'model.safetensors')
    assert sum(math.prod(shape) for shape, _ in weights.values()) <= 36e6
    assert {kind for _, kind in weights.values()} <= {'F16', 'I64'}


@pytest.mark.parametrize('name', boxed_models())
def test_a_model_in_the_box_knows_when_it_is_sure(name):
    judge = Judge(boxed_models()[name], 0.8)
    judge.check(load_model(name, 'cpu'))
    surest, *_, least = load_confidence(boxed_models()[name]).kept
    assert surest[0] > judge.threshold > least[0]


def test_the_captioner_of_photos(tmp_path, monkeypatch):
    model = load_model(device='cpu')
    photo = Path(get_data_path()) / 'sample_data/grace_hopper.jpg'
    caption = generate_caption(model, photo)
    assert {'hat'} <= set(caption.split()) and not model.training
    (name, *_) = boxed_models()
    assert generate_caption(load_model(name, 'cpu'), photo) == caption
    # a folder of one's own goes before it
    monkeypatch.chdir(tmp_path)
    captioner()[0].save_pretrained(name)
    assert model_folder(name) == name and model_folder('user/model') == 'user/model'
    monkeypatch.setattr('pvtblip.decoder._BOX', tmp_path / 'empty')
    with pytest.raises(ValueError, match='no model lies there; give a model folder'):
        load_model()


@pytest.mark.parametrize('name', boxed_models())
def test_its_name_stands_for_its_folder_wherever_a_model_is_named(name, tmp_path):
    folder = boxed_models()[name]
    assert model_files(name) == model_files(folder)
    assert checkpoint_folder(name) == folder
    assert Captioner.from_pretrained(name).config == Captioner.from_pretrained(folder).config
    assert load_confidence(name) == load_confidence(folder)
    assert Judge(name, 0.8).threshold == Judge(folder, 0.8).threshold
    assert load_patient(name).limit == load_patient(folder).limit
    with pytest.raises(FileNotFoundError, match='report.json'):
        calibrate(tmp_path / 'report.json', name)


def test_every_word_of_its_caption_is_drawn(tmp_path):
    "A field of 84 pixels a token, and one for the photo."
    photo = Path(get_data_path()) / 'sample_data/grace_hopper.jpg'
    lines = []
    caption_files(
        [str(photo)], model_folder(), look=attention_drawer(tmp_path / 'words.png'), out=lines.append
    )
    words = lines[0].split('\t')[1].split()
    assert Image.open(tmp_path / 'words.png').width >= 84 * (1 + len(words))
