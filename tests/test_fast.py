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
from pvtblip.fast import FoldedConv2d, PackedLinear, fingerprint, fold_norms, load_model, model_files, pack
from pvtblip.generation import generate, generate_caption, output_layer
from pvtblip.pipeline import attention_drawer, caption_files
from pvtblip.pvt_encoder import EncoderConfig, ImageEncoder, weights_in

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
        layer.half().float()  # another copy, where FBGEMM is at hand
        assert_close(PackedLinear(layer.weight, layer.bias)(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    'shape', [(64,), (0, 64), (2, 0, 64), (2, 3, 64), (5, 100, 64), (3, 1, 2, 64)], ids=str
)
def test_any_shape_and_any_numbers_with_weights_of_half(shape):
    layer = torch.nn.Linear(64, 11).half().float()
    packed = PackedLinear(layer.weight, layer.bias)
    with torch.inference_mode():
        for x in (torch.randn(shape), 1e6 * torch.randn(shape), torch.full(shape, math.nan)):
            assert_close(packed(x), layer(x), rtol=1e-4, atol=1e-5, equal_nan=True)
        x = torch.randn(64, 7).T  # not in the order of memory
        assert_close(packed(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('value', [7e4, 1e-8, 1 + 2**-12, math.inf, math.nan])
def test_what_half_does_not_hold_is_computed_in_full(value):
    layer = torch.nn.Linear(8, 4).half().float()
    layer.weight.data[0, 0] = value
    x = torch.ones(2, 8)
    with torch.inference_mode():
        packed = PackedLinear(layer.weight, layer.bias)
        assert_close(packed(x), layer(x), equal_nan=True)
    assert packed.halves is None


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
    assert not [module for module in pack(with_eyes(eyes()).train()).modules() if module.training]
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


# --- the eyes: batch norms folded into convolutions

# of every kind of convolution and norm that timm has: with and without padding as in TensorFlow, norms before
# convolutions, norms in parallel, norms without a convolution, none at all; and the activations of each
EYES = [
    ('tf_efficientnet_lite0', dict(), True),
    ('efficientnet_b0', dict(), True),  # SiLU, squeeze and excite
    ('mobilenetv2_100', dict(), True),
    ('mobilenetv3_small_100', dict(), True),  # hard swish
    ('resnet18', dict(), True),
    ('resnetv2_50', dict(), False),  # its norms come first
    ('resnet10t', dict(norm_layer='batchnorm2d'), True),
    ('densenet121', dict(), True),
    ('regnetx_002', dict(), True),
    ('repvgg_a0', dict(), True),
    ('ghostnet_050', dict(), True),
    ('mobileone_s0', dict(), True),
    ('hrnet_w18_small', dict(), True),
    ('dla34', dict(), True),
    ('convnext_atto', dict(), False),
    ('pvt_v2_b0', dict(), False),
    ('vit_tiny_patch16_224', dict(), False),
]


def eyes(name='tf_efficientnet_lite0', size=64, **backbone):
    "An image encoder whose batch norms do something, as after a training."
    stages = (5,) if name.startswith('vit') else (1, 3)
    torch.manual_seed(0)
    encoder = ImageEncoder(
        EncoderConfig(name=name, image_size=size, stages=stages, backbone_kwargs=backbone), 64
    )
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                module.weight.data.uniform_(0.5, 1.5)
                module.bias.data.normal_(0, 0.3)
    return encoder.eval()


def with_eyes(encoder):
    "A captioner that sees with these."
    model = Captioner(CaptionerConfig.tiny()).eval()
    model.encoder = encoder
    return model


@pytest.mark.parametrize('name, backbone, folds', EYES, ids=[name for name, _, _ in EYES])
def test_folded_eyes_see_what_timm_sees(name, backbone, folds):
    plain = eyes(name, **backbone)
    model = with_eyes(copy.deepcopy(plain))
    fold_norms(model)
    folded = model.encoder
    kinds = [type(module) for module in folded.modules()]
    if folds:
        assert kinds.count(FoldedConv2d) >= 10
    assert folded.state_dict().keys() == plain.state_dict().keys()
    sizes = [(64, 64)]
    if not name.startswith('vit'):
        sizes.append((64, 96))
    if 'efficientnet' in name or 'mobilenet' in name:
        sizes.append((97, 131))
    for size in sizes:
        pixels = torch.randn(2, 3, *size)
        with torch.inference_mode():
            expected = plain.features(pixels)
            for found, one in zip(folded.features(pixels), expected, strict=True):
                assert_close(found, one, rtol=1e-3, atol=1e-4 * one.abs().max().item())


def test_a_layer_that_is_used_twice_and_a_norm_elsewhere_stay():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Conv2d(3, 3, 1)
            self.first_norm = torch.nn.BatchNorm2d(3)
            self.shared = torch.nn.Conv2d(3, 3, 1)
            self.norm_a = torch.nn.BatchNorm2d(3)
            self.norm_b = torch.nn.BatchNorm2d(3)
            self.last = torch.nn.Conv2d(3, 3, 1)
            self.far_norm = torch.nn.BatchNorm2d(3)

        def forward(self, x):
            x = self.first_norm(self.first(x))
            x = self.norm_b(self.shared(self.norm_a(self.shared(x))))
            return self.far_norm(self.last(x).relu())

    plain = eyes('resnet18')
    plain.backbone.model.conv1 = torch.nn.Sequential(Block(), plain.backbone.model.conv1)
    model = with_eyes(copy.deepcopy(plain.eval()))
    fold_norms(model)
    block = model.encoder.backbone.model.conv1[0]
    folded = [name for name, module in block.named_children() if type(module) is FoldedConv2d]
    assert folded == ['first']
    pixels = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert_close(model.encoder(pixels), plain(pixels), rtol=1e-3, atol=1e-4)


def test_folded_eyes_are_saved_loaded_copied_and_converted():
    plain, other = eyes(), eyes()
    for weight in other.parameters():
        weight.data += 0.02 * torch.randn_like(weight)
    model = with_eyes(copy.deepcopy(plain))
    before = fingerprint(model)
    fold_norms(model)
    fold_norms(model)  # once more changes nothing
    assert fingerprint(model) == before
    pixels = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert_close(copy.deepcopy(model).encoder(pixels), plain(pixels), rtol=1e-3, atol=1e-4)
        # what was folded is folded anew
        model.encoder.load_state_dict(other.state_dict())
        assert_close(model.encoder(pixels), other(pixels), rtol=1e-3, atol=1e-4)
        for kind in (torch.bfloat16, torch.float64):
            tokens = model.encoder.to(kind)(pixels.to(kind))
            assert tokens.dtype == kind
            assert_close(tokens.float(), other(pixels), rtol=0.1, atol=0.3)


def test_folded_eyes_have_a_gradient_for_pixels_and_none_for_weights():
    plain = eyes()
    model = with_eyes(copy.deepcopy(plain))
    fold_norms(model)
    pixels = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        model.encoder(pixels)  # folded here first
    gradients = []
    for encoder in (plain, model.encoder):
        x = pixels.clone().requires_grad_()
        encoder(x).square().sum().backward()
        gradients.append(x.grad)
    assert_close(*gradients, rtol=1e-2, atol=1e-3 * gradients[0].abs().max().item())
    assert not [name for name, w in model.encoder.backbone.named_parameters() if w.requires_grad]
    with torch.inference_mode(), torch.autocast('cpu', torch.bfloat16):
        assert model.encoder(pixels).dtype == torch.bfloat16
