"""A captioner as two graphs: the same words as the model's for every search, and one line for what cannot be
written, is not whole or is not installed.
"""

import json, shutil, sys

import pytest, torch
from PIL import Image

from pvtblip import onnx_export
from pvtblip.decoder import Captioner, CaptionerConfig, DecoderConfig
from pvtblip.fast import load_model
from pvtblip.generation import GenerationConfig, generate, generate_caption, stream_caption
from pvtblip.onnx_export import EncoderGraph, OnnxCaptioner, StepGraph, export_onnx
from pvtblip.pvt_encoder import EncoderConfig
from pvtblip.shapes import make_scene
from test_cli import pvtblip, refused

SMALL = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
SEARCHES = {
    'greedy': dict(),
    'beams': dict(num_beams=3, num_return_sequences=3),
    'groups': dict(num_beams=4, num_beam_groups=2, diversity_penalty=0.5),
    'rules': dict(num_beams=2, no_repeat_ngram_size=2, repetition_penalty=1.3, min_length=8),
    'draws': dict(do_sample=True, num_return_sequences=3, top_p=0.9),
}


def shaken(config):
    "A captioner of random weights whose captions differ from photo to photo, and end at different words."
    torch.manual_seed(0)
    model = Captioner(config).eval().requires_grad_(False)
    for weight in model.decoder.parameters():
        weight += 0.1 * torch.randn_like(weight)
    return model


def photos(model, number):
    side = model.config.encoder.image_size
    return torch.rand(number, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope='module')
def installed():
    for name in ('onnx', 'onnxscript', 'onnxruntime'):
        pytest.importorskip(name, reason='graphs need onnx, onnxscript and onnxruntime')


@pytest.fixture(scope='module')
def model():
    return shaken(CaptionerConfig.tiny(max_length=12, output_vocabulary=list(range(1000, 9000, 7))))


@pytest.fixture(scope='module')
def folder(installed, model, tmp_path_factory):
    "Graphs of the captioner as `load_model` gives it: packed layers are none that a graph knows."
    place = tmp_path_factory.mktemp('onnx')
    model.save_pretrained(place / 'model')
    export_onnx(load_model(place / 'model', 'cpu'), place / 'graphs', log=lambda line: None)
    return place / 'graphs'


@pytest.fixture(scope='module')
def graphs(folder):
    return OnnxCaptioner(folder)


# the graphs as modules, which need nothing


@torch.no_grad()
@pytest.mark.parametrize('captions', [1, 3])
def test_two_steps_are_one_longer_step(model, captions):
    "A past of any length, new tokens of any number."
    image = EncoderGraph(model)(photos(model, 2))
    step = StepGraph(model)
    empty = [torch.zeros(2, captions, 4, 0, 16) for _ in image]
    ids = torch.randint(1000, 9000, (2, captions, 7), generator=torch.Generator().manual_seed(2))
    whole, past = step(ids, empty, image)
    assert whole.shape == (2, captions, len(model.output_ids))
    shorter = step(ids[..., :4], empty, image)[1]
    parts, longer = step(ids[..., 4:], shorter, image)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(longer, past)


def test_every_search_asks_a_captioner_for_its_next_tokens(model, monkeypatch):
    "The seam: what `next_token` gives is all that a search knows."
    asked = []
    own = Captioner.next_token
    monkeypatch.setattr(
        Captioner, 'next_token', lambda self, image_tokens: asked.append(1) or own(self, image_tokens)
    )
    for options in SEARCHES.values():
        generate(model, photos(model, 1), **options)
    assert len(asked) == len(SEARCHES)


# what they say


@pytest.mark.parametrize('search', SEARCHES)
def test_every_search_says_the_same(model, graphs, search):
    options = SEARCHES[search]
    draws = lambda: torch.Generator().manual_seed(3) if options.get('do_sample') else None
    ours, theirs = (generate(one, photos(model, 3), generator=draws(), **options) for one in (model, graphs))
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    torch.testing.assert_close(theirs.token_logprobs, ours.token_logprobs, rtol=0, atol=1e-3)


def test_captions_streams_and_words_that_must_be_said(model, graphs, tmp_path):
    Image.fromarray(make_scene(0, 5, image_size=96).image).save(tmp_path / 'a.png')
    said = lambda one, **options: generate_caption(one, [tmp_path / 'a.png'] * 2, **options)
    assert said(graphs) == said(model)
    word = model.tokenizer.decode([int(model.output_ids[500])])
    forced = said(graphs, force_words=[word])
    assert forced == said(model, force_words=[word]) and all(word in caption for caption in forced)
    streams = [''.join(stream_caption(one, tmp_path / 'a.png')) for one in (model, graphs)]
    assert streams[0] == streams[1]


def same_captions(config, folder, number=2, **options):
    model = shaken(config)
    export_onnx(model, folder, log=lambda line: None)
    ours, theirs = (generate(one, photos(model, number), **options) for one in (model, OnnxCaptioner(folder)))
    assert ours.sequences.tolist() == theirs.sequences.tolist()


@pytest.mark.slow
def test_the_smallest_pvt_with_all_words(installed, tmp_path):
    config = CaptionerConfig(decoder=DecoderConfig(**SMALL), max_length=12)
    same_captions(config, tmp_path / 'graphs', num_beams=3)


@pytest.mark.slow
def test_a_backbone_of_timm_with_few_words(installed, tmp_path):
    encoder = EncoderConfig(name='tf_efficientnet_lite2', image_size=260, stages=(4,))
    words = list(range(1000, 9000, 7))
    config = CaptionerConfig(
        encoder=encoder, decoder=DecoderConfig(**SMALL), output_vocabulary=words, max_length=12
    )
    same_captions(config, tmp_path / 'graphs', num_beams=3)


def test_a_stranger_can_read_what_goes_in_and_comes_out(graphs, model):
    shapes = lambda ends: {one.name: one.shape for one in ends}
    encoder, step = (graphs.graphs[name] for name in ('encoder.onnx', 'step.onnx'))
    words = len(model.output_ids)
    assert shapes(encoder.get_inputs()) == {'pixel_values': ['images', 3, 64, 64]}
    found = shapes(step.get_inputs())
    assert len(found) == 1 + 4 * 2 and found['new_ids'] == ['images', 'captions', 'new']
    assert found['past.1.value'] == ['images', 'captions', 4, 'past', 16]
    assert found['image.1.value'] == ['images', 4, model.encoder.num_tokens, 16]
    assert shapes(step.get_outputs())['logits'] == ['images', 'captions', words]


# the folder


def test_the_folder_is_enough_wherever_it_is(model, folder, tmp_path):
    shutil.copytree(folder, tmp_path / 'elsewhere')
    names = {file.name for file in folder.iterdir()}
    assert {'encoder.onnx', 'encoder.onnx.data', 'step.onnx', 'step.onnx.data', 'config.json'} < names
    assert 'model.safetensors' not in names and {file.name for file in folder.parent.iterdir()} == {
        'graphs',
        'model',
    }
    moved = generate(OnnxCaptioner(tmp_path / 'elsewhere'), photos(model, 1))
    assert moved.sequences.tolist() == generate(model, photos(model, 1)).sequences.tolist()


@pytest.mark.parametrize(
    'name', ['encoder.onnx', 'step.onnx', 'encoder.onnx.data', 'step.onnx.data', 'config.json']
)
def test_a_file_that_is_missing_or_cut_is_named(folder, tmp_path, name):
    copy = tmp_path / 'copy'
    shutil.copytree(folder, copy)
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError) as error:
        OnnxCaptioner(copy)
    assert name.removesuffix('.data') in str(error.value) and '\n' not in str(error.value)
    (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=f'{name}: no such file'):
        OnnxCaptioner(copy)


@pytest.mark.parametrize(
    'change',
    [
        lambda config: config.update(output_vocabulary=[1000, 2000]),
        lambda config: config['encoder'].update(image_size=128),
        lambda config: config['decoder'].update(num_hidden_layers=3),
        lambda config: config['decoder'].update(num_attention_heads=8),
    ],
)
def test_graphs_of_another_model_are_refused(folder, tmp_path, change):
    copy = tmp_path / 'copy'
    shutil.copytree(folder, copy)
    config = json.loads((copy / 'config.json').read_text())
    change(config)
    (copy / 'config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError, match='of different models; export them together'):
        OnnxCaptioner(copy)


@pytest.fixture
def written(folder, monkeypatch):
    "As if the exporter had run: it takes half a minute."

    def write(example, file, opset, name):
        for part in (file.name, f'{file.name}.data'):
            shutil.copy(folder / part, file.parent)

    monkeypatch.setattr(onnx_export, '_write_graph', write)


def test_the_command_says_what_it_wrote(written, folder, tmp_path, capsys):
    model = folder.parent / 'model'
    code, out, err = pvtblip(capsys, 'export', '--model', model, '--onnx', tmp_path / 'new')
    assert code == 0 and out.startswith(f'{tmp_path / "new"}: two graphs; logits of up to'), err
    assert {file.name for file in (tmp_path / 'new').iterdir()} == {file.name for file in folder.iterdir()}
    for given in (tmp_path / 'new', model):
        refused(capsys, 'export', '--model', model, '--onnx', given, says=[given, 'give a new folder'])
    code, _, err = pvtblip(capsys, 'export', '--model', model, '--onnx', tmp_path / 'other', '--opset', 9)
    assert code == 2 and not (tmp_path / 'other').exists(), err


def test_nothing_is_left_where_it_fails(installed, model, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, '_encoder_example', lambda model: (EncoderGraph(model), (), (), [], []))
    with pytest.raises(ValueError, match='encoder.onnx: pvt_v2_b0 cannot be written as a graph') as error:
        export_onnx(model, tmp_path / 'new')
    assert '\n' not in str(error.value) and list(tmp_path.iterdir()) == []


def test_graphs_that_say_something_else_are_not_written(written, model, folder, tmp_path):
    other = Captioner(model.config)  # other weights, and the graphs of `model`
    with pytest.raises(ValueError, match="logits would differ from the model's"):
        export_onnx(other, tmp_path / 'new')
    assert list(tmp_path.iterdir()) == []


# what is refused in a sentence


def test_without_the_extra_one_line_says_what_to_install(capsys, model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / 'model')
    for name in ('onnx', 'onnxscript', 'onnxruntime'):
        with monkeypatch.context() as patch:
            for other in ('onnx', 'onnxscript', 'onnxruntime'):
                patch.setitem(sys.modules, other, None if other == name else sys)
            code, _, err = pvtblip(
                capsys, 'export', '--model', tmp_path / 'model', '--onnx', tmp_path / 'graphs'
            )
        assert code == 1
        assert err == f"error: captioners as graphs need {name}; pip install 'pvtblip[onnx]'\n"
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(ModuleNotFoundError, match='need onnxruntime; pip install'):
        OnnxCaptioner(tmp_path / 'model')


@pytest.mark.parametrize('opset', [9, 17, 99, '18', True, None])
def test_an_opset_that_is_not_known(model, tmp_path, opset):
    with pytest.raises(ValueError, match='opset is .* a whole number from 18 to'):
        export_onnx(model, tmp_path / 'graphs', opset=opset)


def test_what_no_graph_can_be_made_of(capsys, monkeypatch, tmp_path):
    for name in ('onnx', 'onnxscript', 'onnxruntime'):
        monkeypatch.setitem(sys.modules, name, sys)  # all are said before the exporter begins
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        half = Captioner(CaptionerConfig.tiny()).to(dtype)
        with pytest.raises(ValueError, match='computes in .*, its graphs would in float32'):
            export_onnx(half, tmp_path / 'graphs')
    encoder = EncoderConfig(
        name='vit_tiny_patch16_224',
        image_size=64,
        stages=(0,),
        backbone_kwargs=dict(dynamic_img_size=True, depth=1, embed_dim=48, num_heads=3),
    )
    model = Captioner(CaptionerConfig.tiny(encoder=encoder))
    with pytest.raises(ValueError, match='dynamic_img_size, and a graph sees photos of one size'):
        export_onnx(model, tmp_path / 'graphs')
    refused(
        capsys,
        'export',
        '--model',
        tmp_path / 'none',
        '--onnx',
        tmp_path / 'graphs',
        says=['none', 'no model'],
    )
    assert list(tmp_path.iterdir()) == []


def test_what_graphs_cannot_say(graphs, model):
    with pytest.raises(ValueError, match='a graph does not tell where it looked'):
        generate(graphs, photos(model, 1), output_attentions=True)
    with pytest.raises(ValueError, match=r'this graph sees photos of \(3, 64, 64\)'):
        generate(graphs, torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match='num_beams is 600; it must be a whole number from 1 to 572'):
        GenerationConfig(num_beams=600).check(graphs)
