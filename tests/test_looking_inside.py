"""Looking inside: all stage mixes, photos of any form, properties over random weights, and transformers'
eager attention.
"""

from dataclasses import asdict

import pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from transformers import BertConfig, BertLMHeadModel

from pvtblip.decoder import (
    AttentionWeights,
    Captioner,
    CaptionerConfig,
    DecoderConfig,
    attention_weights,
    photo_map,
)
from pvtblip.truth import in_box, pointing_game
from pvtblip.generation import generate, process_image
from pvtblip.looking_inside import (
    all_choices,
    head_shares,
    lay_map,
    plot_attention,
    plot_heads,
    plot_pointing,
    plot_word_maps,
    rollout,
    select_attention,
    word_maps,
    word_shares,
)
from pvtblip.pvt_encoder import EncoderConfig, ImageEncoder, image_transform, token_places
from pvtblip.shapes import make_scene

close = lambda a, b: torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
PVT = dict(depths=[1] * 4, embed_dims=[8] * 4, num_heads=[1] * 4, sr_ratios=[4, 2, 1, 1], mlp_ratios=[2] * 4)


def eye_of(*stages, size=128):
    return ImageEncoder(EncoderConfig(image_size=size, stages=stages, backbone_kwargs=PVT), 8).eval()


pytestmark = pytest.mark.usefixtures('one_seed')


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return Captioner(CaptionerConfig.tiny(decoder=DecoderConfig.tiny(initializer_range=0.2))).eval()


def random_weights(B=2, layers=3, H=2, T=6, S=5):
    scores = torch.randn(B, layers, H, T, T).masked_fill(
        ~torch.ones(T, T, dtype=torch.bool).tril(), -torch.inf
    )
    return AttentionWeights(scores.softmax(-1), torch.randn(B, layers, H, T, S).softmax(-1))


def test_weights_equal_transformers_eager_attention(model):
    theirs = BertLMHeadModel(
        BertConfig(
            **asdict(model.config.decoder),
            is_decoder=True,
            add_cross_attention=True,
            attn_implementation='eager',
        )
    ).eval()
    theirs.load_state_dict(model.decoder.state_dict(), strict=False)
    theirs.tie_weights()
    ids = model.tokenizer(['a red star left of a ring', 'a moon'])['input_ids']
    with torch.inference_mode():
        image_tokens = model.encode_image(torch.randn(2, 3, 64, 64))
        expected = theirs(input_ids=ids, encoder_hidden_states=image_tokens, output_attentions=True)
    found = attention_weights(model, ids, image_tokens)
    assert expected.attentions[0].std() > 0.01  # heads that look at everything alike would prove nothing
    close(found.attentions, torch.stack(expected.attentions, 1))
    close(found.cross_attentions, torch.stack(expected.cross_attentions, 1))


def test_refuses_training_mode():
    model = Captioner(CaptionerConfig.tiny()).train()
    with pytest.raises(ValueError, match='model.eval'):
        attention_weights(model, torch.tensor([[101]]), torch.zeros(1, 4, 64))


# --- places
def dot(height, width, y, x):
    ys, xs = (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width
    photo = torch.zeros(height, width, dtype=torch.uint8)
    photo[((ys - y).abs() < 0.04)[:, None] & ((xs - x).abs() < 0.04)] = 255
    return Image.fromarray(photo.numpy()).convert('RGB')


def middle(bright):
    "Row and column of the middle of what is bright, in pixels."
    return [
        index.float().mean().item() + 0.5
        for index in (bright > (bright.max() + bright.min()) / 2).nonzero().T
    ]


def attention_on(eye, photo, stage):
    "All attention on the token of a stage nearest to the dot in what the model sees."
    y, x = middle(image_transform(eye.config)(photo).sum(0))
    one = [torch.zeros(grid) for grid in eye.grids()]
    rows, columns = token_places(eye, (eye.config.image_size,) * 2)[stage]
    one[stage][(rows - y).abs().argmin(), (columns - x).abs().argmin()] = 1
    return torch.cat([part.flatten() for part in one])


def off(seen, y, x):
    "How far the first brightest pixel is from a place, in shares of the sides beyond a pixel of the photo."
    row, column = (seen >= seen.max() * (1 - 1e-6)).nonzero()[0].tolist()
    return max(
        abs((row + 0.5) / seen.shape[0] - y) - 1 / seen.shape[0],
        abs((column + 0.5) / seen.shape[1] - x) - 1 / seen.shape[1],
    )


MIXES = [(3,), (0,), (1, 2), (0, 3), (0, 1, 2, 3)]


@pytest.mark.parametrize('stages', MIXES)
@pytest.mark.parametrize('size', [(128, 128), (90, 300), (250, 60)])
def test_peak_falls_on_what_the_token_sees(stages, size):
    eye = eye_of(*stages)
    for y, x in ((0.25, 0.5), (0.5, 0.75), (0.75, 0.25)):
        for stage in range(len(stages)):
            assert off(photo_map(attention_on(eye, dot(*size, y, x), stage), eye, size), y, x) <= 1 / 128


@pytest.mark.parametrize('stages', [(3,), (1, 2)])
def test_cells_fail_the_same_check(stages):
    eye = eye_of(*stages)
    photo = dot(128, 128, 0.5, 0.25)
    grids = eye.grids()
    cells = attention_on(eye, photo, 0).split([h * w for h, w in grids])
    enlarged = [
        torch.nn.functional.interpolate(part.view(1, 1, *grid), size=(128, 128), mode='bilinear')
        for part, grid in zip(cells, grids)
    ]
    assert off(sum(enlarged)[0, 0], 0.5, 0.25) > 1 / 128


@pytest.mark.parametrize('stages', MIXES)
def test_places_are_the_middles_of_the_receptive_fields(stages):
    eye = eye_of(*stages, size=256)
    places = token_places(eye, (256, 256))
    embeds = [eye.backbone.patch_embed, *(stage.downsample for stage in eye.backbone.stages[1:])]
    for (rows, columns), stage in zip(places, stages):
        image = x = torch.zeros(1, 1, 256, 256, requires_grad=True)
        for conv in (embed.proj for embed in embeds[: stage + 1]):
            x = torch.nn.functional.conv2d(
                x, torch.ones(1, 1, *conv.kernel_size), stride=conv.stride, padding=conv.padding
            )
        i, j = x.shape[2] // 2, x.shape[3] // 2 - 1
        x[0, 0, i, j].backward()
        seen = image.grad[0, 0].nonzero().float()
        assert (seen.amin(0) + seen.amax(0)).div(2).add(0.5).tolist() == [rows[i].item(), columns[j].item()]


def test_places_of_a_vit_are_cells():
    eye = ImageEncoder(
        EncoderConfig('vit_tiny_patch16_224', image_size=64, stages=(-1,), backbone_kwargs=dict(depth=2)), 8
    ).eval()
    ((rows, columns),) = token_places(eye, (64, 64))
    assert rows.tolist() == columns.tolist() == [8, 24, 40, 56]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(MIXES), st.integers(1, 90), st.integers(1, 90))
def test_uniform_attention_is_flat_on_any_photo(stages, height, width):
    eye = eye_of(*stages, size=64)
    S = sum(h * w for h, w in eye.grids())
    close(
        photo_map(torch.full((S,), 1 / S), eye, (height, width)) * height * width, torch.ones(height, width)
    )


def test_map_is_linear_and_no_token_is_lost_on_a_tiny_photo():
    eye = eye_of(0, 2, size=64)
    a, b = torch.rand(2, 3, sum(h * w for h, w in eye.grids()))
    close(photo_map(a + 2 * b, eye, (33, 21)), photo_map(a, eye, (33, 21)) + 2 * photo_map(b, eye, (33, 21)))
    assert (photo_map(torch.eye(a.shape[-1]), eye, (3, 2)).sum((1, 2)) > 0.2).all()


def test_map_of_another_image_size_is_named():
    eye = eye_of(1, size=64)
    with pytest.raises(ValueError, match=r'128 weights for the 64 tokens .* image_size that the model saw'):
        photo_map(torch.zeros(128), eye, (9, 9))
    assert photo_map(torch.zeros(128), eye, (9, 9), (64, 128)).shape == (9, 9)


def test_photo_on_its_side_is_explained_upright(model, tmp_path):
    image = Image.new('RGB', (60, 30), 'red')
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / 'side.jpg', exif=exif)
    words, maps = word_maps(model, tmp_path / 'side.jpg', 'a red ring')
    assert words == ['a', 'red', 'ring'] and maps.shape == (3, 60, 30)


# --- rollout
@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.floats(0, 1), st.integers(0, 99))
def test_rollout_rows_sum_to_1_and_never_look_ahead(layers, T, keep, seed):
    torch.manual_seed(seed)
    weights = random_weights(layers=layers, T=T)
    words, image = rollout(weights, keep)
    assert words.shape == (2, T, T) and image.shape == (2, T, 5)
    close(words.sum(-1) + image.sum(-1), torch.ones(2, T))
    assert not words.triu(1).any() and (words >= 0).all() and (image >= 0).all()
    cut = rollout(
        AttentionWeights(weights.attentions[..., :-1, :-1], weights.cross_attentions[..., :-1, :]), keep
    )
    close(words[:, :-1, :-1], cut[0])
    close(image[:, :-1], cut[1])


def test_rollout_is_the_product_over_the_joint_sequence():
    "Abnar and Zuidema's rule: multiply (A + 1)/2 of every sub-layer over words and image tokens together."
    weights = random_weights(B=1)
    T = 6
    S = 5
    product = torch.eye(11)
    for layer in range(3):
        for part, start in ((weights.attentions, 0), (weights.cross_attentions, T)):
            step = torch.eye(T + S)
            step[:T] *= 0.5
            step[:T, start : start + part.shape[-1]] += 0.5 * part[0, layer].mean(0)
            product = step @ product
    words, image = rollout(weights)
    close(torch.cat((words, image), -1)[0], product[:T])


def test_rollout_keeps_all_or_nothing():
    weights = random_weights()
    assert rollout(weights, 1)[1].count_nonzero() == 0
    close(rollout(weights, 0)[1], weights.cross_attentions[:, -1].mean(1))
    with pytest.raises(ValueError, match='keep is -1'):
        rollout(weights, -1)


# --- choices
def test_selection():
    weights = random_weights()
    close(select_attention(weights, layer=1), weights.cross_attentions[:, 1].mean(1))
    close(select_attention(weights, head=1), weights.cross_attentions[:, :, 1].mean(1))
    with pytest.raises(ValueError, match='layer 3 does not exist: they go from 0 to 2'):
        select_attention(weights, 3)


def test_word_maps_are_the_rows_that_chose_the_words(model):
    photo = Image.fromarray(make_scene(0, 0).image)
    words, maps = word_maps(model, photo, 'a red ring', layer=1, head=2)
    ids = model.tokenizer(['a red ring'])['input_ids']
    with torch.inference_mode():
        image_tokens = model.encode_image(image_transform(model.config.encoder)(photo)[None])
    rows = attention_weights(model, ids, image_tokens).cross_attentions[0, 1, 2]
    close(maps, photo_map(rows[model.tokenizer.prompt_length - 1 :][:3], model.encoder, (64, 64)))
    for options in (dict(layer=9), dict(head=4), dict(layer=0, over_layers=True)):
        with pytest.raises(ValueError):
            word_maps(model, photo, 'a red ring', **options)


def test_word_maps_explain_what_is_said(model):
    photo = Image.fromarray(make_scene(0, 0).image)
    said = generate(model, image_transform(model.config.encoder)(photo)[None], num_beams=3).sequences[0, 0]
    words, maps = word_maps(model, photo, over_layers=True)
    sep = model.tokenizer.sep_token_id
    assert words == model.tokenizer.tokenizer.convert_ids_to_tokens(
        [i for i in said[model.tokenizer.prompt_length :].tolist() if i not in (0, sep)]
    )
    assert len(maps) == len(words) and maps.isfinite().all()


# --- shares and pointing
def test_every_word_of_a_long_caption_has_its_map(model):
    "Twelve words are drawn unless more are asked for."
    photo = Image.fromarray(make_scene(0, 0).image)
    ids = model.tokenizer(['red ' * 20])['input_ids']
    pixels = process_image(photo, model)
    for asked, drawn in (({}, 12), (dict(max_words=ids.shape[1]), 20)):
        figure = plot_attention(model, [photo], ids, pixels, **asked)
        assert sum(text.get_text() == 'red' for ax in figure.axes for text in ax.texts) == drawn


def test_head_shares_of_attention_put_by_hand(model):
    scenes = [make_scene(0, i, max_objects=1) for i in range(6)]
    tokens = model.tokenizer(
        [' '.join((s.objects[0].size, s.objects[0].colour, s.objects[0].kind)) for s in scenes]
    )['input_ids']
    words = [model.tokenizer.tokenizer.convert_ids_to_tokens(row) for row in tokens.tolist()]
    across = torch.zeros(6, 1, 2, tokens.shape[1], model.encoder.num_tokens)
    rows, columns = token_places(model.encoder, (64, 64))[0]
    for i, scene in enumerate(scenes):
        x0, y0, x1, y1 = (64 * side for side in scene.objects[0].box)
        inside = (((rows >= y0) & (rows < y1))[:, None] & ((columns >= x0) & (columns < x1))).flatten()
        if not inside.any():
            inside[0] = True  # a small shape may lie between the tokens
        across[i, 0, 0] = inside / inside.sum()
        across[i, 0, 1] = ~inside / (~inside).sum()
    shares = head_shares(
        AttentionWeights(torch.zeros(6, 1, 2, 1, 1), across), words, scenes, model.encoder, (64, 64)
    )
    for about in ('size', 'colour', 'kind'):
        assert shares[about][0, 0] > 0.5 and shares[about][0, 1] == 0
    assert 0 < shares['chance'] < 0.3
    with pytest.raises(ValueError, match='no caption names the size'):
        head_shares(
            AttentionWeights(torch.zeros(6, 1, 2, 1, 1), across), [['a']] * 6, scenes, model.encoder, (64, 64)
        )


def test_word_shares():
    back = torch.zeros(1, 1, 3, 7, 7)
    back[0, 0, 0] = torch.eye(7)
    back[0, 0, 1, 1:] = torch.eye(7)[:-1]
    back[0, 0, 2, :, 0] = 1
    shares = word_shares(AttentionWeights(back, torch.zeros(1, 1, 3, 7, 1)), 3, [6])
    assert [shares[name][0].tolist() for name in ('itself', 'word before', 'prompt')] == [
        [1, 0, 0],
        [0, 1, 0],
        [0, 0, 1],
    ]


def drawings(model, n):
    scenes = [make_scene(0, i, max_objects=1) for i in range(n)]
    return scenes, process_image([Image.fromarray(scene.image) for scene in scenes], model)


def test_pointing_game_of_every_choice(model):
    scenes, pixels = drawings(model, 12)
    tokens = model.tokenizer([scene.captions[0] for scene in scenes])['input_ids']
    with torch.inference_mode():
        weights = attention_weights(model, tokens, model.encode_image(pixels))
    table = pointing_game(model, scenes, pixels, all_choices(weights))
    assert len(table) == 4 + 2 * (1 + 4) and table['words'] == 12
    assert all(0 <= share <= 1 for name, share in table.items() if name != 'words')
    assert table['mean'] == pointing_game(model, scenes, pixels)['mean']
    close(all_choices(weights)['layer 1 head 2'](weights), weights.cross_attentions[:, 1, 2])


def test_pointing_game_knows_attention_that_was_put_there(model):
    "On the middle of the named shape all hit that can; on the opposite side few do."
    scenes, pixels = drawings(model, 12)
    ((rows, columns),) = token_places(model.encoder, (64, 64))

    def on_the_shape(weights):
        chosen = torch.zeros(len(scenes), weights.attentions.shape[-1], model.encoder.num_tokens)
        for one, scene in zip(chosen, scenes):
            x0, y0, x1, y1 = scene.objects[0].box
            row, column = (rows - 32 * (y0 + y1)).abs().argmin(), (columns - 32 * (x0 + x1)).abs().argmin()
            one[:, row * len(columns) + column] = 1
        return chosen

    def beside(weights):
        return on_the_shape(weights).flip(-1)

    table = pointing_game(model, scenes, pixels, dict(on=on_the_shape, off=beside))
    # a small shape may lie between the tokens
    fits = [bool(in_box(scene.objects[0].box, rows / 64, columns / 64).any()) for scene in scenes]
    assert table['on'] >= sum(fits) / len(fits) > 0.5 and table['off'] < 0.5


def test_one_drawing_for_one_photo_and_for_a_batch(model):
    import matplotlib

    matplotlib.use('agg')
    scenes, pixels = drawings(model, 3)
    photos = [Image.fromarray(scene.image) for scene in scenes]
    assert len(plot_pointing(*[dict(mean=0.5, chance=0.1, words=3)] * 2).axes) == 1
    assert len(plot_heads(model, photos[0], 'a red ring', 'ring').axes) == 8
    words, maps = word_maps(model, photos[0], 'a red ring')
    figure = plot_word_maps([(photos[0], words, maps)])
    assert [text.get_text() for ax in figure.axes for text in ax.texts] == words
    assert torch.equal(torch.as_tensor(figure.axes[2].images[1].get_array()), maps[1])
    sequences = model.tokenizer(['a red ring', 'a moon', ''])['input_ids']
    batch = plot_attention(model, photos, sequences, pixels)
    assert len(batch.axes) == 3 * 6  # room for the captions
    assert torch.equal(torch.as_tensor(batch.axes[2].images[1].get_array()), maps[1])
    shown = [text.get_text() for ax in batch.axes for text in ax.texts]
    assert shown == ['a red ring', 'a', 'red', 'ring', 'a moon', 'a', 'moon', '']
    with pytest.raises(ValueError, match="'moon' is none of the tokens a, red, ring"):
        plot_heads(model, photos[0], 'a red ring', 'moon')


def test_a_photo_is_seen_through_its_map():
    "Clear where nobody looked, never opaque, the same of a map of zeros."
    from matplotlib.figure import Figure

    photo = Image.new('RGB', (3, 2), 'white')
    for seen, most in ((torch.tensor([[0.0, 0.1, 0.2], [0.4, 0.0, 0.0]]), 0.4), (torch.zeros(2, 3), 0.0)):
        ax = Figure().add_subplot()
        lay_map(ax, photo, seen, most)
        below, over = ax.images
        assert below.get_array().min() == 255
        alpha = torch.as_tensor(over.get_alpha())
        assert (alpha[seen == 0] == 0).all() and alpha.max() <= 0.75
        if most:
            torch.testing.assert_close(alpha[0].float(), torch.tensor([0.0, 0.3, 0.6]))
            assert alpha[1, 0] == 0.75
