"""What the notebook cannot show of `pvt_encoder`: every size against timm, odd files, weights from files,
properties.
"""

import copy
import dataclasses
import json
import pickle
import subprocess
import sys
import tracemalloc
import warnings
import zlib
from dataclasses import asdict, fields

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from pvtblip.pvt_encoder import (
    PVT_CONFIGS,
    EncoderConfig,
    ImageEncoder,
    PyramidVisionTransformerV2,
    attend,
    image_transform,
    load_image,
    load_pixels,
    orientation,
    noted_settings,
    sincos_positions,
)

slow = pytest.mark.slow


# --- the same numbers as timm
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'name',
    [
        'pvt_v2_b0',
        'pvt_v2_b1',
        'pvt_v2_b2',
        'pvt_v2_b2_li',
        *(pytest.param(f'pvt_v2_b{i}', marks=slow) for i in (3, 4, 5)),
    ],
)
def test_every_stage_equals_timm(name):
    torch.manual_seed(0)
    theirs = timm.create_model(name).eval()
    for p in theirs.parameters():
        if p.ndim == 1:
            # biases 0 and gains 1 would hide a swap
            torch.nn.init.normal_(p, mean=p.detach().mean().item(), std=0.1)
    ours = PyramidVisionTransformerV2(**PVT_CONFIGS[name]).eval()
    ours.load_state_dict(theirs.state_dict())
    for height, width in ((224, 224), (97, 131)):
        x = torch.randn(1, 3, height, width)
        with torch.no_grad():
            maps = ours(x)
            expected = theirs.forward_intermediates(x, intermediates_only=True)
        assert len(maps) == 4 and [tuple(m.shape[-2:]) for m in maps] == ours.grids(height, width)
        for a, b in zip(maps, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_depthwise_weights_lie_as_the_maps_do():
    "Also when loaded, copied and converted; one photo alone is then computed as in a batch, and not turned round."
    backbone = PyramidVisionTransformerV2().eval()
    theirs = timm.create_model('pvt_v2_b0').eval()
    backbone.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 97, 131)
    for model in (backbone, copy.deepcopy(backbone), copy.deepcopy(backbone).double().float()):
        weights = [m.weight for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.groups > 1]
        assert len(weights) == 8 and all(weight.stride() == (9, 1, 3, 1) for weight in weights)
        with torch.inference_mode():
            expected = theirs.forward_features(x[:1])
            for images in (x[:1], x):
                torch.testing.assert_close(model(images)[-1][:1], expected, rtol=1e-4, atol=1e-5)


def test_gradients_equal_timm():
    torch.manual_seed(0)
    theirs = timm.create_model('pvt_v2_b0', num_classes=0)
    ours = PyramidVisionTransformerV2(**PVT_CONFIGS['pvt_v2_b0'])
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    weight = torch.randn(2, 256, 2, 2)
    (ours(x)[-1] * weight).sum().backward()
    (theirs.forward_features(x) * weight).sum().backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], atol=1e-4, rtol=1e-3)


def test_a_cut_pvt_takes_the_whole_state_dict_and_gives_the_same_stage():
    theirs = timm.create_model('pvt_v2_b0').eval()
    encoder = ImageEncoder(EncoderConfig(stages=(1,)), 64).eval()
    encoder.backbone.load_state_dict(theirs.state_dict())
    assert len(encoder.backbone.stages) == 2
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            encoder.features(x)[0], theirs.forward_intermediates(x, intermediates_only=True)[1]
        )


def test_a_state_dict_with_something_missing_is_refused():
    state = timm.create_model('pvt_v2_b0').state_dict()
    del state['stages.2.norm.weight']
    with pytest.raises(RuntimeError, match='stages.2.norm.weight'):
        PyramidVisionTransformerV2(**PVT_CONFIGS['pvt_v2_b0']).load_state_dict(state)


# --- the PVT itself
# --------------------------------------------------------------------------------------------------


def test_stochastic_depth_is_silent_in_evaluation_and_speaks_in_training():
    torch.manual_seed(0)
    kwargs = EncoderConfig.tiny().backbone_kwargs
    plain = PyramidVisionTransformerV2(**kwargs)
    dropping = PyramidVisionTransformerV2(**kwargs, drop_path_rate=0.9)
    dropping.load_state_dict(plain.state_dict())
    x = torch.randn(4, 3, 64, 64)
    torch.testing.assert_close(plain.eval()(x)[-1], dropping.eval()(x)[-1])
    torch.testing.assert_close(plain.train()(x)[-1], plain.eval()(x)[-1])
    assert not torch.allclose(dropping.train()(x)[-1], plain(x)[-1])


def test_images_of_a_batch_do_not_mix():
    model = PyramidVisionTransformerV2(**EncoderConfig.tiny().backbone_kwargs).eval()
    x = torch.randn(3, 3, 64, 64)
    torch.testing.assert_close(model(x)[-1][1:2], model(x[1:2])[-1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    'kwargs,message',
    [(dict(depths=(2, 2)), 'one entry per stage'), (dict(num_heads=(1, 2, 5, 7)), 'multiple of its heads')],
)
def test_impossible_settings_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        PyramidVisionTransformerV2(**kwargs)


# --- config
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'config',
    [
        EncoderConfig(),
        EncoderConfig.tiny(),
        EncoderConfig.tiny(stages=(0, -1), position='none'),
        EncoderConfig(
            'vit_tiny_patch16_224',
            weights=True,
            normaliser='none',
            backbone_kwargs=dict(drop_path_rate=0.1, depths=(1, 2)),
        ),
    ],
)
def test_config_round_trip_through_json(config):
    assert EncoderConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_pretrained_weights_have_two_names():
    assert EncoderConfig(weights='pretrained') == EncoderConfig(weights=True)
    assert EncoderConfig(weights='pretrained.safetensors').weights == 'pretrained.safetensors'
    assert EncoderConfig().weights is None


def test_configs_do_not_share_their_kwargs():
    first = EncoderConfig.tiny()
    first.backbone_kwargs['depths'].append(9)
    assert (
        EncoderConfig.tiny().backbone_kwargs['depths'] == [1, 1, 1] and EncoderConfig().backbone_kwargs == {}
    )


@pytest.mark.parametrize(
    'wrong', [dict(stages=()), dict(stages=(1, 1)), dict(position='learnt'), dict(normaliser='batchnorm')]
)
def test_config_refuses(wrong):
    with pytest.raises(ValueError):
        EncoderConfig(**wrong)


# --- the encoder
# -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'name,stages,size,shapes',
    [
        (
            'pvt_v2_b0',
            (3, 1),
            64,
            [(8, 8), (2, 2)],
        ),  # read early to late, whatever the order they are named in
        ('pvt_v2_b2_li', (-1,), 64, [(2, 2)]),
        ('vit_tiny_patch16_224', (5, -1), 96, [(6, 6), (6, 6)]),
        ('vit_small_patch14_dinov2', (-1,), 98, [(7, 7)]),
        ('vit_small_patch14_reg4_dinov2', (-1,), 98, [(7, 7)]),  # register tokens are left out
        ('mobilenetv2_100', (1, -1), 96, [(24, 24), (3, 3)]),
        ('mobilenetv3_small_100', (-1,), 96, [(3, 3)]),
        ('resnet18', (-2,), 96, [(6, 6)]),
    ],
)
def test_backbones(name, stages, size, shapes):
    encoder = ImageEncoder(EncoderConfig(name, stages=stages, image_size=size), 64)
    x = torch.randn(2, 3, size, size)
    tokens = encoder(x)
    assert encoder.grids() == shapes and tokens.shape == (2, encoder.num_tokens, 64)
    tokens.square().sum().backward()
    assert [n for n, p in encoder.named_parameters() if p.grad is None] == []
    maps = encoder.eval().features(x)
    assert [tuple(m.shape[-2:]) for m in maps] == shapes and all(m.shape[0] == 2 for m in maps)


def test_tokens_are_row_by_row_with_class_and_register_tokens_left_out():
    encoder = ImageEncoder(
        EncoderConfig('vit_small_patch14_reg4_dinov2', stages=(-1,), image_size=98), 64
    ).eval()
    x = torch.randn(1, 3, 98, 98)
    with torch.no_grad():
        expected = encoder.backbone.model.forward_features(x)[:, encoder.backbone.model.num_prefix_tokens :]
        torch.testing.assert_close(
            encoder.features(x)[0].flatten(2).transpose(1, 2), expected, atol=1e-5, rtol=1e-5
        )


def test_asking_for_grids_changes_nothing():
    encoder = ImageEncoder(EncoderConfig('mobilenetv2_100', stages=(-1,), image_size=64), 64).train()
    before = copy.deepcopy(encoder.state_dict())
    assert encoder.grids((97, 131)) == [(4, 5)] and encoder.training and encoder.backbone.model.training
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_saved_and_loaded_encoder_gives_the_same_tokens():
    config = EncoderConfig.tiny(stages=(0, 2))
    first, second = ImageEncoder(config, 64), ImageEncoder(config, 64)
    second.load_state_dict(first.state_dict())
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(first(x), second(x)) and torch.equal(copy.deepcopy(first)(x), first(x))


def test_bfloat16_autocast_stays_close():
    encoder = ImageEncoder(EncoderConfig.tiny(), 64).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        low = encoder(x)
    with torch.no_grad():
        torch.testing.assert_close(low.float(), encoder(x), atol=0.15, rtol=0.1)


def test_normaliser_handles_features_far_too_small_or_large():
    encoder = ImageEncoder(EncoderConfig.tiny(), 64)
    tokens = torch.randn(1, 16, 128)
    for scale in (1e-4, 1.0, 1e4):
        normalised = encoder.norms[0](scale * tokens)
        torch.testing.assert_close(normalised.std(-1), torch.ones(1, 16), atol=0.02, rtol=0)
    assert torch.equal(ImageEncoder(EncoderConfig.tiny(normaliser='none'), 64).norms[0](tokens), tokens)


@pytest.mark.parametrize('width', (64, 128, 256))
@pytest.mark.parametrize('grid', [(1, 1), (2, 2), (7, 7), (5, 9), (28, 28)])
def test_no_two_places_share_a_position_code(grid, width):
    codes = sincos_positions(grid, width)
    assert codes.shape == (grid[0] * grid[1], width)
    nearest = torch.cdist(codes, codes) + 1e9 * torch.eye(len(codes))
    assert nearest.min() > 0.1


def test_position_codes_have_as_many_waves_as_they_are_told():
    middles = (torch.arange(64) + 0.5) / 64
    for waves in (2.0, 16.0):
        codes = sincos_positions((1, 64), 128, waves=waves)
        finest_of_x = codes[:, 64 + 31]  # behind y's 64 numbers, the last of 32 sines
        torch.testing.assert_close(finest_of_x, (2 * torch.pi * waves * middles).sin(), atol=1e-4, rtol=0)
    encoder = EncoderConfig.tiny(position_waves=2.0)
    with pytest.raises(ValueError, match='position_waves'):
        EncoderConfig.tiny(position_waves=0.0)
    torch.manual_seed(0)
    coarse = ImageEncoder(encoder, 64)
    torch.manual_seed(0)
    fine = ImageEncoder(EncoderConfig.tiny(), 64)
    pixels = torch.rand(1, 3, 64, 64)
    grid = coarse.grids()[0]
    difference = sincos_positions(grid, 64, waves=2.0) - sincos_positions(grid, 64)
    torch.testing.assert_close(coarse(pixels) - fine(pixels), difference[None], atol=1e-5, rtol=0)


def test_a_later_setting_is_noted_where_it_is_not_the_default():
    before = asdict(EncoderConfig.tiny())
    assert before.keys() - noted_settings(before).keys() == {'weights', 'position_waves'}
    changed = noted_settings(asdict(EncoderConfig.tiny(position_waves=2.0)))
    assert changed == noted_settings(before) | dict(position_waves=2.0)
    assert noted_settings(dict(weights='w', image_size=3)) == dict(image_size=3)  # of a guest


# --- weights
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'name,stage', [('pvt_v2_b0', 2), ('mobilenetv3_small_100', -1), ('vit_tiny_patch16_224', -1)]
)
def test_weights_from_a_file(name, stage, tmp_path):
    torch.manual_seed(0)
    theirs = timm.create_model(name, num_classes=7).eval()  # another head than ImageNet's
    save_file(theirs.state_dict(), tmp_path / 'weights.safetensors')
    encoder = ImageEncoder(
        EncoderConfig(name, weights=str(tmp_path / 'weights.safetensors'), stages=(stage,)), 64
    ).eval()
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = theirs.forward_intermediates(x, indices=[stage], norm=True, intermediates_only=True)[0]
    torch.testing.assert_close(encoder.features(x)[0], expected, atol=1e-5, rtol=1e-5)


def test_weights_from_the_hub_take_the_same_path(monkeypatch):
    torch.manual_seed(0)
    real = timm.create_model
    asked = []
    trained = real('pvt_v2_b0').eval()
    monkeypatch.setattr(
        timm,
        'create_model',
        lambda name, pretrained=False, **kwargs: asked.append((name, pretrained)) or trained,
    )
    encoder = ImageEncoder(EncoderConfig('pvt_v2_b0.in1k', weights=True), 64).eval()
    assert asked == [('pvt_v2_b0.in1k', True)]
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(encoder.features(x)[0], trained.forward_features(x), atol=1e-5, rtol=0)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    save_file({'something': torch.zeros(1)}, tmp_path / 'other.safetensors')
    for weights, error, message in (
        (tmp_path / 'other.safetensors', ValueError, 'weights are missing'),
        (tmp_path / 'none.safetensors', FileNotFoundError, 'no such file'),
        (tmp_path / 'pickle.pth', ValueError, 'only .safetensors'),
    ):
        with pytest.raises(error, match=message):
            ImageEncoder(EncoderConfig(weights=str(weights)), 64)


def test_a_name_that_nobody_knows():
    with pytest.raises(ValueError, match='no_such_model: timm cannot make this model'):
        ImageEncoder(EncoderConfig('no_such_model'), 64)


@pytest.mark.parametrize(
    'name',
    [
        'hf-hub:someone/model',
        'hf_hub:someone/model',
        'local-dir:/some/model',
        'timm/resnet18',
        '../resnet18',
        'https://example.org/x',
        '',
        'a b',
    ],
)
def test_a_name_that_is_an_address_or_a_folder_is_refused(name):
    with pytest.raises(ValueError, match='name is .*; it must be a plain name'):
        EncoderConfig(name)


@pytest.mark.parametrize('name', ['resnet18', 'pvt_v2_b0'])
@pytest.mark.parametrize(
    'kwargs',
    [
        dict(checkpoint_path='PICKLE'),
        dict(pretrained=True),
        dict(pretrained_cfg=dict(file='PICKLE')),
        dict(pretrained_cfg_overlay=dict(file='PICKLE')),
        dict(pretrained_cfg='a1_in1k'),
        dict(features_only=True),
        dict(cache_dir='x'),
        dict(scriptable=True),
        dict(model_name='resnet50'),
        dict(feature_cfg={}),
        dict(out_indices=[0]),
        dict(block=dict(checkpoint_path='PICKLE')),
        dict(act_layer='PICKLE'),
        dict(act_layer='https://example.org/x'),
        dict(depth=10**9),
        dict(depths=[1, 10**6]),
        dict(p=float('nan')),
        dict(p=float('inf')),
        dict(p=object()),
        {'checkpoint_path': None},
    ],
)
def test_a_backbone_opens_nothing(name, kwargs, tmp_path, monkeypatch):
    def opened(*args, **kwargs):
        raise AssertionError('a pickle was opened')

    monkeypatch.setattr(torch, 'load', opened)
    torch.save({}, tmp_path / 'pickle.pth')
    place = lambda value: (
        {k: place(v) for k, v in value.items()}
        if isinstance(value, dict)
        else str(tmp_path / 'pickle.pth')
        if value == 'PICKLE'
        else value
    )
    with pytest.raises(ValueError, match='backbone_kwargs') as error:
        EncoderConfig(name, backbone_kwargs=place(kwargs))
    assert '\n' not in str(error.value) and len(str(error.value)) < 250


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(depths=[1.5, 1]), 'backbone_kwargs.depths is'),
        (dict(depths='2222'), 'depths'),
        (dict(embed_dims=[0, 1]), 'embed_dims'),
        (dict(linear='yes'), "linear is 'yes'; it must be true or false"),
        (dict(drop_path_rate=2), 'from 0 to 1'),
        (dict(pad_type='same'), "'pad_type'; pvt_v2_b0 takes depths"),
        (dict(mlp_ratios=[-1]), 'mlp_ratios'),
    ],
)
def test_our_pvt_looks_at_its_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        EncoderConfig(backbone_kwargs=kwargs)


def test_what_timm_objects_to_is_one_sentence():
    for config in (
        EncoderConfig('resnet18', backbone_kwargs=dict(colour='red'), image_size=32),
        EncoderConfig('resnet18', stages=(99,), image_size=32),
    ):
        with pytest.raises(ValueError, match=f'^{config.name}: ') as error:
            ImageEncoder(config, 64)
        assert '\n' not in str(error.value)


WRONG = ('x', 1.5, -1, 10**30, float('nan'), float('inf'), True, None, [], {}, [[]], [None], 'x' * 10**6)


def test_every_field_refuses_what_it_cannot_be():
    """In each field, every value of another type is a ValueError that names it; what passes is of the field's
    type.
    """
    for f in fields(EncoderConfig):
        for value in WRONG:
            try:
                made = getattr(EncoderConfig(**{f.name: value}), f.name)
            except ValueError as error:
                assert f.name in str(error) and '\n' not in str(error) and len(str(error)) < 250, error
            else:
                assert (f.name, value) in [
                    ('name', 'x'),
                    ('position_waves', 1.5),
                    ('weights', 'x'),
                    ('weights', True),
                    ('weights', None),
                    ('backbone_kwargs', {}),
                    ('freeze_batch_norm', True),
                ], (f.name, value, made)


def test_damaged_and_foreign_weights_are_one_value_error(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model('pvt_v2_b0')
    path = tmp_path / 'w.safetensors'
    save_file(model.state_dict(), path)
    whole = path.read_bytes()
    name = next(iter(model.state_dict()))
    header = int.from_bytes(whole[:8], 'little')
    damaged = [
        whole[:9],
        whole[:-1],
        whole[: header // 2],
        b'',
        b'\xff' * 99,
        (2**62).to_bytes(8, 'little') + whole[8:],
        whole[:8] + b'[' * header + whole[8 + header :],
        whole.replace(b'"shape":[32]', b'"shape":[9999999999999999999]', 1),
        whole.replace(b'"F32"', b'"F99"', 1),
    ]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match='w.safetensors: not a whole safetensors file') as error:
            ImageEncoder(EncoderConfig(weights=str(path)), 64)
        assert '\n' not in str(error.value)
    for change, message in (
        (torch.zeros(3), r'is \(3,\), the model asks for'),
        (
            torch.zeros_like(model.state_dict()[name], dtype=torch.int8),
            "is of type I8, the model's is float32",
        ),
    ):
        save_file(model.state_dict() | {name: change}, path)
        with pytest.raises(ValueError, match=f'w.safetensors: weight {name} {message}'):
            ImageEncoder(EncoderConfig(weights=str(path)), 64)


def test_our_own_pvt_does_without_timm():
    code = (
        'import sys; from pvtblip.pvt_encoder import *; ImageEncoder(EncoderConfig.tiny(), 64); assert '
        "'timm' not in sys.modules"
    )
    subprocess.run([sys.executable, '-c', code], check=True)


# --- files
# -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def photo():
    "60 x 40 pixels: red left, blue right, a white stripe on top."
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :30] = 255, 0, 0
    pixels[:, 30:] = 0, 0, 255
    pixels[:8] = 255
    return Image.fromarray(pixels)


def close(image, expected, tolerance=6):
    assert image.mode == 'RGB' and image.size == expected.size
    assert np.abs(np.asarray(image).astype(int) - np.asarray(expected.convert('RGB'))).mean() < tolerance


@pytest.mark.parametrize(
    'mode,name',
    [
        ('RGB', 'a.jpg'),
        ('RGB', 'a.png'),
        ('RGB', 'a.webp'),
        ('RGB', 'a.bmp'),
        ('RGB', 'a.tif'),
        ('RGB', 'a.ppm'),
        ('CMYK', 'a.jpg'),
        ('CMYK', 'a.tif'),
        ('P', 'a.png'),
        ('P', 'a.gif'),
        ('RGBA', 'a.png'),
        ('RGBA', 'a.webp'),
        ('YCbCr', 'a.tif'),
        ('LAB', 'a.tif'),
    ],
)
def test_every_colour_mode_looks_the_same(mode, name, photo, tmp_path):
    photo.convert(mode).save(tmp_path / name)
    close(load_image(tmp_path / name), photo, tolerance=15 if mode == 'LAB' else 6)


@pytest.mark.parametrize('mode', ['L', 'LA', '1'])
def test_grey(mode, photo, tmp_path):
    photo.convert(mode).save(tmp_path / 'a.png')
    close(load_image(tmp_path / 'a.png'), photo.convert('1' if mode == '1' else 'L'), tolerance=1)


def test_sixteen_bit_grey(tmp_path):
    steps = np.linspace(0, 65535, 60).astype(np.uint16)[None].repeat(40, 0)
    Image.fromarray(steps).save(tmp_path / 'a.png')
    Image.fromarray(steps).save(tmp_path / 'a.tif')
    for name in ('a.png', 'a.tif'):
        values = np.asarray(load_image(tmp_path / name))[0, :, 0]
        assert values[0] == 0 and values[-1] == 255 and (np.diff(values.astype(int)) > 0).all()


@pytest.mark.parametrize(
    'orientation,stored',
    [
        (1, lambda i: i),
        (2, lambda i: i.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
        (3, lambda i: i.rotate(180)),
        (6, lambda i: i.rotate(90, expand=True)),
        (8, lambda i: i.rotate(-90, expand=True)),
    ],
)
def test_exif_rotation(orientation, stored, photo, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored(photo).save(tmp_path / 'a.jpg', exif=exif, quality=95)
    close(load_image(tmp_path / 'a.jpg'), photo)


def exif_of(orientation):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, 'camera'
    return exif.tobytes()


@pytest.mark.parametrize(
    'exif',
    [
        b'Exif\0\0garbagegarbage',
        b'Exif\0\0',
        b'Exif\0\0II*\0\xff\xff\xff\x7f',
        b'Exif\0\0MM\0*\0\0\0\x08\xff\xff' + b'\xff' * 12,
        exif_of(6)[:-9] + b'\xff' * 9,
        exif_of(0),
        exif_of(9),
        exif_of(65535),
    ],
)
def test_exif_that_cannot_be_read_turns_nothing(exif, photo, tmp_path):
    photo.save(tmp_path / 'a.jpg', exif=exif, quality=95)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with Image.open(tmp_path / 'a.jpg') as opened:
            lies = orientation(opened)
        assert lies in (1, 6)
        close(load_image(tmp_path / 'a.jpg'), photo if lies == 1 else photo.rotate(-90, expand=True))
        torch.testing.assert_close(
            load_pixels(tmp_path / 'a.jpg', 32).float(),
            load_pixels(load_image(tmp_path / 'a.jpg'), 32).float(),
            atol=2,
            rtol=0,
        )


def test_any_damage_to_exif_leaves_the_photo_readable(photo, tmp_path):
    photo.save(tmp_path / 'a.jpg', exif=exif_of(6))
    whole = (tmp_path / 'a.jpg').read_bytes()
    rng = np.random.default_rng(0)
    start = whole.index(b'Exif') + 6
    for _ in range(200):
        mangled = bytearray(whole)
        for place in rng.integers(start, start + len(exif_of(6)) - 6, 3):
            mangled[place] = rng.choice([0, 255, rng.integers(256)])
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            assert sorted(load_image(bytes(mangled)).size) == [40, 60]


def test_a_photo_is_turned_once(photo, tmp_path):
    for name in ('a.jpg', 'a.png', 'a.webp', 'a.tif'):
        photo.save(tmp_path / name, exif=exif_of(6))
        once = load_image(tmp_path / name)
        assert once.size == (40, 60) and load_image(once).size == once.size and orientation(once) == 1, name


@pytest.mark.parametrize('after', (False, True))
def test_large_notes_in_a_png_are_left_out(after, photo, tmp_path):
    """Texts and colour profiles that unpack to megabytes, before or behind the pixels; the pixels stay
    exactly as they are.
    """
    exif = exif_of(6)
    long = b'\0' * 70_000_000
    photo.save(tmp_path / 'a.png', exif=exif)
    plain = (tmp_path / 'a.png').read_bytes()
    place = plain.index(b'IEND') - 4 if after else plain.index(b'IDAT') - 4
    for kind, content in (
        (b'zTXt', b'Comment\0\0' + zlib.compress(long)),
        (b'iTXt', b'Comment\0\1\0\0\0' + zlib.compress(long)),
        (b'iCCP', b'profile\0\0' + zlib.compress(long)),
    ):
        note = (
            len(content).to_bytes(4, 'big') + kind + content + zlib.crc32(kind + content).to_bytes(4, 'big')
        )
        (tmp_path / 'big.png').write_bytes(plain[:place] + note + plain[place:])
        tracemalloc.start()
        assert load_image(tmp_path / 'big.png').tobytes() == load_image(
            tmp_path / 'a.png'
        ).tobytes() and load_image(tmp_path / 'big.png').size == (40, 60)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
        tracemalloc.stop()
        assert torch.equal(load_pixels(tmp_path / 'big.png', 32), load_pixels(tmp_path / 'a.png', 32))
        (tmp_path / 'half.png').write_bytes((plain[:place] + note + plain[place:])[:-60])
        if not after:
            with pytest.raises(ValueError, match='half.png: damaged'):
                load_image(tmp_path / 'half.png')


def test_large_notes_do_not_hide_a_bomb(tmp_path):
    Image.new('1', (20_000, 20_000)).save(tmp_path / 'bomb.png')
    plain = (tmp_path / 'bomb.png').read_bytes()
    content = b'Comment\0\0' + zlib.compress(b'\0' * 2_000_000)
    note = (
        len(content).to_bytes(4, 'big') + b'zTXt' + content + zlib.crc32(b'zTXt' + content).to_bytes(4, 'big')
    )
    (tmp_path / 'bomb.png').write_bytes(plain[:33] + note + plain[33:])
    with pytest.raises(ValueError, match='bomb.png: more than'):
        load_image(tmp_path / 'bomb.png')


def test_the_content_decides_and_not_the_name(photo, tmp_path):
    for name, kind in (
        ('a.png', 'JPEG'),
        ('a.jfif', 'JPEG'),
        ('a.jpe', 'JPEG'),
        ('a', 'PNG'),
        ('a.jpg', 'WEBP'),
        ('a.heic', 'JPEG'),
    ):
        photo.save(tmp_path / name, format=kind)
        close(load_image(tmp_path / name), photo)


def test_transparency_becomes_white(photo, tmp_path):
    hidden = np.dstack([np.asarray(photo), np.full((40, 60), 255, np.uint8)])
    hidden[:, :30, 3] = 0  # the red half is there, but invisible
    Image.fromarray(hidden).save(tmp_path / 'alpha.png')
    palette = photo.quantize(4)
    palette.save(tmp_path / 'palette.png', transparency=palette.getpixel((0, 39)))
    photo.save(tmp_path / 'key.png', transparency=(255, 0, 0))
    for name in ('alpha.png', 'palette.png', 'key.png'):
        image = load_image(tmp_path / name)
        assert image.getpixel((0, 39)) == (255, 255, 255) and image.getpixel((59, 39)) == (0, 0, 255), name


def test_half_transparency_is_mixed_with_white():
    assert load_image(Image.new('RGBA', (2, 2), (0, 0, 0, 128))).getpixel((0, 0)) == (127, 127, 127)


def test_damaged_files_are_named(photo, tmp_path):
    photo.save(tmp_path / 'whole.jpg')
    whole = (tmp_path / 'whole.jpg').read_bytes()
    photo.save(tmp_path / 'whole.png')
    files = {
        'empty.jpg': (b'', 'empty'),
        'text.jpg': (b'not a picture', 'not an image'),
        'page.png': (b'<html></html>', 'not an image'),
        'half.jpg': (whole[: len(whole) // 2], 'damaged'),
        'half.png': ((tmp_path / 'whole.png').read_bytes()[:90], 'damaged'),
        'drawing.eps': (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', 'not an image'),
        'phone.jpg': (
            b'\0\0\0\x18ftypheic\0\0\0\0mif1heic',
            'HEIC, as iPhones write photos; save it as JPEG',
        ),
        'new.png': (b'\0\0\0\x1cftypavif\0\0\0\0avifmif1', 'AVIF; save it'),
        'new.jpg': (b'\0\0\0\x1cftypmif1\0\0\0\0avifmif1', 'AVIF; save it'),
        'film.jpg': (b'\0\0\0\x18ftypisom\0\0\2\0', 'a video'),
        'pointer.jpg': (b'version https://git-lfs.github.com/spec/v1\n', 'git lfs pull'),
        'error.jpg': (b'\n<!DOCTYPE html>\n<html>', 'a web page'),
        'crlf.png': (
            (tmp_path / 'whole.png').read_bytes().replace(b'\r\n', b'\n', 1),
            'damaged at its beginning; copy',
        ),
        'first.png': ((tmp_path / 'whole.png').read_bytes()[:20], 'damaged'),
        'first.jpg': (whole[:4], 'damaged'),
        'a.zip': (b'PK\3\4', 'an archive'),
    }
    for name, (content, message) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message) as error:
            load_image(tmp_path / name)
        assert name in str(error.value) and '\n' not in str(error.value)
    for missing in (tmp_path / 'none.jpg', tmp_path):
        with pytest.raises(FileNotFoundError, match='no such image file'):
            load_image(missing)


@pytest.mark.parametrize('side', (10_000, 20_000))  # above PIL's limit, and above twice the limit
@pytest.mark.parametrize('as_errors', (False, True))
def test_decompression_bomb(side, as_errors, tmp_path):
    Image.new('1', (side, side)).save(tmp_path / 'bomb.png')
    assert (tmp_path / 'bomb.png').stat().st_size < 100_000
    with warnings.catch_warnings():
        warnings.simplefilter('error' if as_errors else 'ignore', Image.DecompressionBombWarning)
        with pytest.raises(ValueError, match='bomb.png: more than'):
            load_image(tmp_path / 'bomb.png')


def test_pixels_without_a_known_white_are_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / 'float.tif')
    Image.fromarray(np.full((4, 4), 100_000, np.int32)).save(tmp_path / 'long.tif')
    for name in ('float.tif', 'long.tif'):
        with pytest.raises(ValueError, match=f'{name}.*no fixed white'):
            load_image(tmp_path / name)


@pytest.mark.parametrize('suffix', ['jpg', 'png', 'gif', 'webp', 'tif', 'bmp'])
def test_mangled_bytes_give_an_image_or_a_value_error(suffix, photo, tmp_path):
    path = tmp_path / f'a.{suffix}'
    rng = np.random.default_rng(0)
    refused = 0
    photo.save(path)
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    for _ in range(60):
        mangled = whole.copy()
        mangled[rng.integers(0, len(whole), 8)] = rng.integers(0, 256, 8)
        path.write_bytes(mangled[: rng.integers(1, len(whole) + 1)].tobytes())
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # PIL warns of odd metadata before it decides
            try:
                assert load_image(path).mode == 'RGB'
            except ValueError as error:
                refused += str(path) in str(error)
    assert refused > 10


def test_transform(photo, tmp_path):
    config = EncoderConfig.tiny(image_size=32)
    photo.save(tmp_path / 'a.png')
    # it travels to the workers of a DataLoader
    transform = pickle.loads(pickle.dumps(image_transform(config)))
    pixels = transform(tmp_path / 'a.png')
    assert pixels.shape == (3, 32, 32) and torch.equal(pixels, transform(photo))
    expected = np.asarray(photo.resize((32, 32), Image.Resampling.BICUBIC)) / 255
    expected = (expected - config.mean) / config.std
    step = 1 / 255 / min(config.std)  # torch and PIL may round a pixel differently
    torch.testing.assert_close(
        pixels, torch.from_numpy(expected).permute(2, 0, 1).float(), atol=1.01 * step, rtol=0
    )


def test_a_frozen_backbone_keeps_its_running_statistics():
    encoder = ImageEncoder(EncoderConfig('mobilenetv2_100', stages=(-1,), image_size=64), 16)
    before = {k: v.clone() for k, v in encoder.backbone.state_dict().items()}
    encoder.backbone.requires_grad_(False)
    encoder.train()(torch.randn(2, 3, 64, 64)).sum().backward()
    assert encoder.training and not encoder.backbone.training
    assert all(torch.equal(before[k], v) for k, v in encoder.backbone.state_dict().items())
    assert encoder.projections[0].weight.grad is not None
    encoder.backbone.requires_grad_(True)
    assert encoder.train().backbone.training


@pytest.mark.parametrize('freeze', [False, True])
def test_batch_norm_keeps_its_statistics_where_the_config_says_so(freeze):
    """In training it normalises by the batch, and features change before anything was learnt; the weights
    learn either way.
    """
    torch.manual_seed(0)
    config = EncoderConfig('mobilenetv2_100', stages=(-1,), freeze_batch_norm=freeze, image_size=64)
    encoder = ImageEncoder(config, 16)
    x = torch.randn(2, 3, 64, 64)
    encoder(x).square().sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []
    with torch.no_grad():
        judged, trained = encoder.eval().features(x)[0], encoder.train().features(x)[0]
    assert torch.equal(judged, trained) == freeze


@pytest.mark.parametrize(
    'pixels, message',
    [
        (torch.zeros(1, 3, 24, 24), 'too small'),
        (torch.zeros(1, 224, 224, 3), 'pixel_values must be floats'),
        (torch.zeros(3, 224, 224), 'pixel_values must be floats'),
        (torch.zeros(1, 3, 224, 224, dtype=torch.uint8), 'torch.uint8'),
    ],
)
def test_pixels_that_cannot_be_read_are_refused(pixels, message):
    with pytest.raises(ValueError, match=message):
        ImageEncoder(EncoderConfig(), 64)(pixels)


def test_stages_and_widths_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match='stages 0 to 3'):
        ImageEncoder(EncoderConfig(stages=(4,)), 128)
    with pytest.raises(ValueError, match='multiple of 4'):
        ImageEncoder(EncoderConfig(), 130)


@pytest.mark.parametrize('learning', [False, True])
def test_attention_in_bfloat16_is_near_that_in_float32(learning):
    torch.manual_seed(0)
    given = [torch.randn(2, 4, 9, 8, requires_grad=learning) for _ in range(3)]
    whole = attend(*given)
    half = attend(*(part.bfloat16() for part in given))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(whole, torch.nn.functional.scaled_dot_product_attention(*given))
    torch.testing.assert_close(half.float(), whole, atol=0.03, rtol=0.03)


def test_a_config_of_another_class_is_made_of_that_class():
    class Larger(EncoderConfig):
        pass

    assert type(Larger.tiny()) is Larger and Larger.tiny(image_size=32).image_size == 32
