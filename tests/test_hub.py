"A captioner as people know models who have never heard of pvtblip: Auto classes, pipelines, remote code, a model card."

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BertTokenizerFast,
    pipeline,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import pvtblip.decoder
import pvtblip.hub
from pvtblip.decoder import Captioner, CaptionerConfig
from pvtblip.fast import fingerprint
from pvtblip.generation import generate_caption
from pvtblip.hub import (
    Card,
    PvtBlipConfig,
    PvtBlipForImageTextToText,
    PvtBlipProcessor,
    model_card,
    push_to_hub,
    save_for_hub,
    save_with_code,
)
from pvtblip.pvt_encoder import EncoderConfig
from pvtblip.shapes import make_scene

PHOTOS = [Image.fromarray(make_scene(0, index).image) for index in range(3)]
WORDS = list(range(2000, 2200))
# Swin keeps buffers that are not saved, as the words that may be said are
SWIN = EncoderConfig(
    'swin_tiny_patch4_window7_224',
    image_size=64,
    stages=(1,),
    backbone_kwargs=dict(depths=[1, 1], num_heads=[2, 2], embed_dim=16, window_size=4, img_size=64),
)
KINDS = {
    'plain': dict(),
    'own words': dict(output_vocabulary=WORDS),
    'timm': dict(encoder=SWIN, output_vocabulary=WORDS),
}


def babbler(seed=0, **changes):
    "A small captioner whose captions differ from photo to photo and end at different places."
    torch.manual_seed(seed)
    model = Captioner(CaptionerConfig.tiny(**changes)).eval()
    with torch.no_grad():
        for weight in model.decoder.parameters():
            weight += 0.1 * torch.randn_like(weight)
        model.decoder.cls['predictions'].bias[model.tokenizer.sep_token_id] += 3
    return model


@pytest.fixture(scope='module', params=KINDS)
def kind(request, tmp_path_factory):
    "(captioner, folder that it was saved in)"
    model = babbler(**KINDS[request.param])
    folder = tmp_path_factory.mktemp('hub') / 'model'
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope='module')
def own(tmp_path_factory):
    model = babbler(output_vocabulary=WORDS)
    folder = tmp_path_factory.mktemp('own') / 'model'
    model.save_pretrained(folder)
    return model, folder


def auto(folder, **options):
    model = AutoModelForImageTextToText.from_pretrained(folder, **options)
    return model, AutoProcessor.from_pretrained(folder)


def say(folder, images, text=None, **options):
    model, processor = auto(folder)
    return processor.batch_decode(model.generate(**processor(images, text), **options))


# --- the field's four lines ---


def test_every_auto_class_finds_its_own(kind):
    captioner, folder = kind
    config = AutoConfig.from_pretrained(folder)
    assert isinstance(config, PvtBlipConfig) and config.settings() == captioner.config
    model, processor = auto(folder)
    assert isinstance(model, PvtBlipForImageTextToText) and isinstance(processor, PvtBlipProcessor)
    assert isinstance(AutoTokenizer.from_pretrained(folder), BertTokenizerFast)
    assert not model.training and not model.captioner.training


def test_our_own_loader_needs_no_hub_and_says_nothing(own, monkeypatch):
    monkeypatch.delitem(CONFIG_MAPPING._extra_content, 'pvtblip')  # as before `import pvtblip.hub`
    with pytest.raises(ValueError, match='pvtblip'):
        AutoConfig.from_pretrained(own[1])
    said = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, 'emit', said.append)
    logging.getLogger('transformers').addHandler(handler)
    try:
        Captioner.from_pretrained(own[1])
    finally:
        logging.getLogger('transformers').removeHandler(handler)
    assert not said


def test_every_number_is_loaded_those_that_are_not_saved_too(kind):
    captioner, folder = kind
    loaded = auto(folder)[0].captioner
    for expected, found in (
        (captioner.named_parameters(), loaded.named_parameters()),
        (captioner.named_buffers(), loaded.named_buffers()),
    ):
        expected, found = dict(expected), dict(found)
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_pipeline_says_what_we_say(kind):
    captioner, folder = kind
    expected = generate_caption(captioner, PHOTOS)
    assert len(set(expected)) > 1
    pipe = pipeline('image-text-to-text', model=str(folder))
    assert [one['generated_text'] for one in pipe(images=PHOTOS, text=[''] * 3)] == expected
    assert pipe(PHOTOS[0], text='')[0]['generated_text'] == expected[0]
    one_by_one = pipe((dict(images=photo, text='') for photo in PHOTOS), batch_size=2)
    assert [one['generated_text'] for (one,) in one_by_one] == expected


def test_a_prefix_in_the_pipeline(own):
    captioner, folder = own
    word = 'two'
    pipe = pipeline('image-text-to-text', model=str(folder))
    expected = generate_caption(captioner, PHOTOS[0], prefix=word)
    assert expected.startswith(word) and pipe(PHOTOS[0], text=word)[0]['generated_text'] == expected
    new = pipe(PHOTOS[0], text=word, return_full_text=False)[0]['generated_text']
    assert (word + new) == expected


def test_rows_that_begin_otherwise_in_one_batch(own):
    captioner, folder = own
    words = [captioner.tokenizer.decode(ids) for ids in ([], [2048], [2048, 2158])]
    expected = [generate_caption(captioner, photo, prefix=words[i]) for i, photo in enumerate(PHOTOS)]
    assert say(folder, PHOTOS, words) == expected
    model, processor = auto(folder)
    batch = processor(PHOTOS, words)
    prompt = captioner.tokenizer.prompt_length
    assert batch['attention_mask'].sum(1).tolist() == [prompt, prompt + 1, prompt + 2]
    out = model.generate(**batch)
    assert torch.equal(out[:, : prompt + 2], batch['input_ids'])  # what comes behind it is new


def test_several_sequences_in_our_order(own):
    captioner, folder = own
    expected = generate_caption(captioner, PHOTOS, num_return_sequences=3)
    said = say(folder, PHOTOS, num_return_sequences=3)
    assert [said[i : i + 3] for i in (0, 3, 6)] == expected
    pipe = pipeline('image-text-to-text', model=str(folder))
    found = pipe(PHOTOS[0], text='', generate_kwargs=dict(num_return_sequences=3))
    assert [one['generated_text'] for one in found] == expected[0]


def test_scores_as_transformers_hands_them_over(own):
    captioner, folder = own
    model, processor = auto(folder)
    batch = processor(PHOTOS)
    found = model.generate(**batch, return_dict_in_generate=True, num_return_sequences=2)
    expected = pvtblip.generation.generate(
        captioner, batch['pixel_values'], num_beams=3, num_return_sequences=2
    )
    torch.testing.assert_close(found.sequences_scores, expected.scores.flatten())
    assert torch.equal(found.sequences, expected.sequences.flatten(0, 1))


def test_the_settings_of_the_folder(own, tmp_path):
    captioner, _ = own
    captioner.save_pretrained(tmp_path)
    greedy = generate_caption(captioner, PHOTOS, num_beams=1)
    assert say(tmp_path, PHOTOS) == generate_caption(captioner, PHOTOS) != greedy
    (tmp_path / 'generation_config.json').write_text('{"num_beams": 1}')
    assert say(tmp_path, PHOTOS) == greedy
    assert say(tmp_path, PHOTOS, num_beams=3) == generate_caption(captioner, PHOTOS)
    theirs = transformers.GenerationConfig(num_beams=2, max_new_tokens=4)
    expected = generate_caption(captioner, PHOTOS, num_beams=2, max_length=9)
    assert say(tmp_path, PHOTOS, generation_config=theirs) == expected


def test_lengths(own):
    captioner, folder = own
    model, processor = auto(folder)
    batch = processor(PHOTOS)
    assert captioner.config.max_length == 40
    long = dict(min_length=60, max_length=60, num_beams=1)
    assert model.generate(**batch, **long).shape[1] == 60  # whoever asks for it gets it
    short = model.generate(**batch, max_new_tokens=3, min_new_tokens=3)
    assert short.shape[1] == batch['input_ids'].shape[1] + 3
    assert (
        model.generate(**batch, max_new_tokens=256, min_new_tokens=35).shape[1] == 40
    )  # where training ended


def test_drawing_needs_no_beams(own):
    captioner, folder = own
    model, processor = auto(folder)
    batch = processor(PHOTOS)
    torch.manual_seed(3)
    expected = generate_caption(captioner, PHOTOS, do_sample=True, temperature=2.0)
    torch.manual_seed(3)
    assert processor.batch_decode(model.generate(**batch, do_sample=True, temperature=2.0)) == expected


@pytest.mark.parametrize(
    'options, words',
    [
        (dict(penalty_alpha=0.6), 'penalty_alpha=0.6'),
        (dict(streamer='s'), 'streamer'),
        (dict(num_beams=0), 'num_beams is 0'),
        (dict(num_return_sequences=5), 'num_return_sequences is 5'),
        (dict(eos_token_id=7), 'eos_token_id is 7'),
        (dict(output_attentions=True), 'output_attentions'),
    ],
)
def test_a_setting_that_we_do_not_have_is_said(own, options, words):
    model, processor = auto(own[1])
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        model.generate(**processor(PHOTOS), **options)
    assert '\n' not in str(error.value) and len(str(error.value)) < 250


def test_rows_that_are_not_the_processors(own):
    model, processor = auto(own[1])
    batch = processor(PHOTOS)
    for ids, words in (
        (torch.tensor([[101, 2010, 102]] * 3), "begin with the model's prompt"),
        (batch['input_ids'][:2], '2 rows'),
        (torch.nn.functional.pad(batch['input_ids'], (0, 1), value=102), 'cannot begin with'),
    ):
        with pytest.raises(ValueError, match=words):
            model.generate(batch['pixel_values'], ids)
    with pytest.raises(ValueError, match='pixel_values are missing'):
        model.generate(input_ids=batch['input_ids'])


# --- photos ---


def test_the_pixels_are_ours(own, tmp_path):
    captioner, folder = own
    noise = np.random.default_rng(0).integers(0, 256, (90, 130, 4), dtype=np.uint8)
    Image.fromarray(noise, 'RGBA').save(tmp_path / 'see-through.png')
    processor = AutoProcessor.from_pretrained(folder)
    given = [tmp_path / 'see-through.png', str(tmp_path / 'see-through.png'), Image.fromarray(noise)]
    expected = pvtblip.generation.process_image(given, captioner)
    assert torch.equal(processor(given)['pixel_values'], expected)
    assert torch.equal(processor([[given[0]], given[1:]])['pixel_values'], expected)
    opaque = processor([noise[..., :3], Image.fromarray(noise[..., :3])])['pixel_values']
    assert torch.equal(opaque[0], opaque[1]) and not torch.equal(opaque[0], expected[0])
    assert torch.equal(processor(PHOTOS[0], 'two')['input_ids'][0, -1:], torch.tensor([2048]))


@pytest.mark.parametrize(
    'call, words',
    [
        (dict(images=[]), '0 images'),
        (dict(text='a dog'), '0 images'),
        (dict(images=PHOTOS, text=['a']), '1 texts for 3 images'),
        (dict(images=torch.rand(3, 64, 64)), 'an image is Tensor'),
        (dict(images=PHOTOS[0], return_tensors='np'), 'return_tensors'),
        (dict(images=PHOTOS[0], videos=['a']), 'videos'),
        (dict(images='nowhere.jpg'), 'nowhere.jpg: no such image file'),
    ],
)
def test_what_is_no_photo_is_said(own, call, words):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(words)) as error:
        AutoProcessor.from_pretrained(own[1])(**call)
    assert '\n' not in str(error.value)


# --- types and places ---


def test_types(own, tmp_path):
    captioner, folder = own
    for dtype, expected in ((None, torch.float32), ('auto', torch.float32), ('bfloat16', torch.bfloat16)):
        assert AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).dtype == expected
    half = PvtBlipForImageTextToText.from_pretrained(folder, torch_dtype=torch.bfloat16)
    processor = AutoProcessor.from_pretrained(folder)
    out = half.generate(**processor(PHOTOS))
    assert len(processor.batch_decode(out)) == 3
    half.save_pretrained(tmp_path)
    assert PvtBlipForImageTextToText.from_pretrained(tmp_path, dtype='auto').dtype == torch.bfloat16
    assert PvtBlipForImageTextToText.from_pretrained(tmp_path).dtype == torch.float32


def test_places(own):
    for place in ('cpu', 'auto', {'': 'cpu'}, torch.device('cpu')):
        model = AutoModelForImageTextToText.from_pretrained(own[1], device_map=place)
        assert len(model.hf_device_map) == 1 and model.device == torch.device(model.hf_device_map[''])


@pytest.mark.parametrize(
    'options, words',
    [
        (dict(dtype=torch.int8), 'dtype is'),
        (dict(dtype='float8_e4m3fn'), 'dtype is'),
        (dict(device_map={'captioner.encoder': 0, 'captioner.decoder': 'cpu'}), 'stays in one piece'),
        (dict(device_map='disk'), 'stays in one piece'),
        (dict(device_map='meta'), 'stays in one piece'),
        (dict(load_in_8bit=True), 'load_in_8bit=True'),
        (dict(use_safetensors=False), 'use_safetensors'),
        (dict(subfolder='inside'), 'subfolder'),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(own, options, words):
    with pytest.raises(ValueError, match=words) as error:
        PvtBlipForImageTextToText.from_pretrained(own[1], **options)
    assert '\n' not in str(error.value) and len(str(error.value)) < 250


# --- folders, there and back ---


def test_what_transformers_saves_is_ours_again(kind, tmp_path):
    captioner, folder = kind
    model, processor = auto(folder)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    AutoConfig.from_pretrained(folder).save_pretrained(tmp_path)  # it writes what it adds to every config
    saved = json.loads((tmp_path / 'config.json').read_text())
    assert 'transformers_version' in saved and saved['model_type'] == 'pvtblip'
    assert json.loads((tmp_path / 'generation_config.json').read_text())['num_beams'] == 3
    again = Captioner.from_pretrained(tmp_path)
    assert again.config == captioner.config and fingerprint(again) == fingerprint(captioner)
    assert say(tmp_path, PHOTOS) == generate_caption(captioner, PHOTOS)


def test_weights_that_were_gathered(own, tmp_path):
    model, _ = auto(own[1])
    doubled = {name: 2 * weight for name, weight in model.state_dict().items()}
    model.save_pretrained(tmp_path / 'other', is_main_process=False)
    assert not (tmp_path / 'other').exists()
    model.save_pretrained(tmp_path / 'gathered', state_dict=doubled)
    found = Captioner.from_pretrained(tmp_path / 'gathered').state_dict()
    assert all(torch.equal(found[name.removeprefix('captioner.')], doubled[name]) for name in doubled)


def test_a_folder_of_before(own, tmp_path):
    captioner, _ = own
    captioner.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / 'config.json').read_text())
    for name in ('model_type', 'architectures'):
        del saved[name]
    (tmp_path / 'config.json').write_text(json.dumps(saved))
    expected = generate_caption(captioner, PHOTOS)
    assert generate_caption(Captioner.from_pretrained(tmp_path), PHOTOS) == expected
    model = PvtBlipForImageTextToText.from_pretrained(tmp_path)
    processor = PvtBlipProcessor.from_pretrained(tmp_path)
    assert processor.batch_decode(model.generate(**processor(PHOTOS))) == expected
    Captioner.from_pretrained(tmp_path).save_pretrained(tmp_path)  # from here on the Auto classes know it
    assert say(tmp_path, PHOTOS) == expected


def test_a_foreign_setting_is_still_refused(own, tmp_path):
    own[0].save_pretrained(tmp_path)
    saved = json.loads((tmp_path / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps(saved | dict(colour='red')))
    for load in (Captioner.from_pretrained, AutoModelForImageTextToText.from_pretrained):
        with pytest.raises(ValueError, match='no setting is called .colour.'):
            load(tmp_path)


def test_a_processor_alone(own, tmp_path):
    captioner, folder = own
    AutoProcessor.from_pretrained(folder).save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(processor, PvtBlipProcessor) and processor.captions.prompt == captioner.config.prompt
    expected = AutoProcessor.from_pretrained(folder)(PHOTOS, 'two')
    found = processor(PHOTOS, 'two')
    assert all(torch.equal(found[name], expected[name]) for name in processor.model_input_names)


def test_settings_changed_at_loading(own):
    captioner, folder = own
    config = AutoConfig.from_pretrained(folder)
    config.word_dropout, config.caption_length = 0.5, 12
    model = AutoModelForImageTextToText.from_pretrained(folder, config=config)
    assert model.captioner.config.word_dropout == 0.5 and model.captioner.config.max_length == 12
    assert fingerprint(captioner) == fingerprint(Captioner.from_pretrained(folder))
    config.decoder['num_hidden_layers'] = 1
    with pytest.raises(ValueError, match='other weights'):
        AutoModelForImageTextToText.from_pretrained(folder, config=config)


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(OSError, match='no model at'):
        PvtBlipForImageTextToText.from_pretrained(tmp_path / 'nowhere')
    with pytest.raises(FileNotFoundError, match='processor_config.json: no such file'):
        PvtBlipProcessor.from_pretrained(tmp_path)


# --- learning ---


def test_the_loss_is_ours_and_the_logits_know_the_words(own):
    captioner, folder = own
    model, processor = auto(folder)
    rows = captioner.tokenizer(['two', 'two first', 'one'])
    pixel_values = processor(PHOTOS)['pixel_values']
    loss = model(pixel_values, **rows).loss
    torch.testing.assert_close(loss, captioner(pixel_values, rows['input_ids'], rows['labels']).loss)
    loss.backward()
    assert all(weight.grad is not None for weight in model.captioner.encoder.parameters())
    logits = model(**processor(PHOTOS)).logits
    assert logits.shape == (3, captioner.tokenizer.prompt_length, 30522)
    assert set((logits > -torch.inf).any(0).any(0).nonzero()[:, 0].tolist()) == {102, *WORDS}


# --- code that travels along ---

ALONE = """
import sys
class Nothing:  # pvtblip is not installed here
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'pvtblip':
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Nothing())
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, pipeline
folder, photo, out = sys.argv[1:]
try:
    AutoConfig.from_pretrained(folder, trust_remote_code=False)
    print('loaded without trust')
except ValueError:
    print('refused')
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
print(processor.batch_decode(model.generate(**processor(photo)))[0])
pipe = pipeline('image-text-to-text', model=folder, trust_remote_code=True)
print(pipe(photo, text='')[0]['generated_text'])
model.save_pretrained(out)
processor.save_pretrained(out)
assert not [name for name in sys.modules if name.split('.')[0] == 'pvtblip']
"""


@pytest.mark.parametrize('name', ['own words', 'timm'])
def test_where_pvtblip_is_not_installed(name, tmp_path):
    captioner = babbler(**KINDS[name])
    save_with_code(captioner, tmp_path / 'model')
    PHOTOS[0].save(tmp_path / 'photo.png')
    (tmp_path / 'alone.py').write_text(ALONE)
    environment = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
    environment |= dict(HF_HOME=str(tmp_path / 'home'), HF_HUB_OFFLINE='1')

    def run(folder, out):
        done = subprocess.run(
            [sys.executable, 'alone.py', folder, 'photo.png', out],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0 and 'transformers]' not in done.stderr, done.stderr
        return done.stdout.splitlines()

    expected = generate_caption(captioner, PHOTOS[0])
    assert run('model', 'again') == ['refused', expected, expected]
    # what was saved there is whole: for us, and once more for people without us
    assert generate_caption(Captioner.from_pretrained(tmp_path / 'again'), PHOTOS[0]) == expected
    code = {file.name: file.read_text() for file in (tmp_path / 'model').glob('*.py')}
    assert code and code == {file.name: file.read_text() for file in (tmp_path / 'again').glob('*.py')}
    assert json.loads((tmp_path / 'again/config.json').read_text())['auto_map']


def test_code_in_a_folder_is_never_ours_to_run(own, tmp_path):
    captioner, _ = own
    save_with_code(captioner, tmp_path / 'model')
    for file in (tmp_path / 'model').glob('*.py'):
        file.write_text(f'open({str(tmp_path / "ran")!r}, "w")\nraise SystemExit')
    Captioner.from_pretrained(tmp_path / 'model')
    auto(tmp_path / 'model')
    # installed classes are used even where trust was given
    AutoModelForImageTextToText.from_pretrained(tmp_path / 'model', trust_remote_code=True)
    AutoProcessor.from_pretrained(tmp_path / 'model', trust_remote_code=True)
    assert not (tmp_path / 'ran').exists()


# --- the card ---


def reported(tmp_path, **changes):
    report = dict(
        corpus=dict(CIDEr=0.7213, METEOR=0.231),
        intervals=dict(CIDEr=[0.61, 0.83], METEOR=[0.21, 0.25]),
        images={'a.jpg': {}, 'b.jpg': {}},
    )
    (tmp_path / 'report.json').write_text(json.dumps(report | changes))
    return tmp_path / 'report.json'


def test_a_filled_card(own, tmp_path):
    captioner, _ = own
    PHOTOS[0].save(tmp_path / 'photos.PNG')
    report = reported(tmp_path, model=fingerprint(captioner))
    card = Card(
        'mit',
        description='Knows shapes.',
        datasets=['me/shapes'],
        report=report,
        picture=tmp_path / 'photos.PNG',
    )
    save_for_hub(captioner, tmp_path / 'shapes', card, with_code=True)
    text = (tmp_path / 'shapes/README.md').read_text()
    data = ModelCard(text).data
    assert (data.pipeline_tag, data.library_name, data.license) == (
        'image-text-to-text',
        'transformers',
        'mit',
    )
    assert data.datasets == ['me/shapes']
    assert [(one.metric_type, one.metric_value) for one in data.eval_results] == [
        ('CIDEr', 0.7213),
        ('METEOR', 0.231),
    ]
    assert '| CIDEr | 0.721 | 0.610 to 0.830 |' in text and 'On 2 held-out photos' in text
    assert 'Knows shapes.' in text and '](picture.png)' in text and 'trust_remote_code=True' in text
    assert (tmp_path / 'shapes/picture.png').read_bytes() == (tmp_path / 'photos.PNG').read_bytes()
    assert say(tmp_path / 'shapes', PHOTOS) == generate_caption(captioner, PHOTOS)


def test_the_code_of_a_card_runs(own, tmp_path):
    captioner, _ = own
    save_for_hub(captioner, tmp_path / 'shapes')
    PHOTOS[0].save(tmp_path / 'photo.jpg', quality=100)
    text = (tmp_path / 'shapes/README.md').read_text()
    assert ModelCard(text).data.eval_results is None and 'trust_remote_code' not in text
    lines = re.search(r'```python\n(.*?)```', text, re.S)[1].replace('pipe(', 'said = pipe(')
    lines = lines.replace("'shapes'", repr(str(tmp_path / 'shapes'))).replace(
        "'photo.jpg'", repr(str(tmp_path / 'photo.jpg'))
    )
    names = {}
    exec(lines, names)
    assert names['said'][0]['generated_text']


@pytest.mark.parametrize(
    'changes, words',
    [
        (dict(corpus=None), 'no report'),
        (dict(intervals=[1]), 'no report'),
        (dict(model='0123456789abcdef'), 'another model'),
    ],
)
def test_a_report_that_is_none(own, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words) as error:
        model_card(own[0], 'me/shapes', Card(report=reported(tmp_path, **changes)))
    assert 'report.json' in str(error.value) and '\n' not in str(error.value)


def test_a_readme_of_yours_stays(own, tmp_path):
    (tmp_path / 'README.md').write_text('# mine')
    with pytest.raises(ValueError, match='README.md: is there already'):
        save_for_hub(own[0], tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ['README.md']


class FakeHub:
    "What `push_to_hub` asks of the hub, with folders for repositories."

    def __init__(self, root):
        self.root = root

    def __call__(self, token=None):
        return self

    def create_repo(self, name, private, exist_ok):
        repo = type('Repo', (), dict(repo_id=name if '/' in name else f'me/{name}'))
        (self.root / repo.repo_id).mkdir(parents=True, exist_ok=exist_ok)
        return repo

    def file_exists(self, repo_id, name):
        return (self.root / repo_id / name).exists()

    def upload_folder(self, repo_id, folder_path, commit_message):
        for file in Path(folder_path).iterdir():
            (self.root / repo_id / file.name).write_bytes(file.read_bytes())
        return commit_message


def test_push_to_hub(own, tmp_path, monkeypatch):
    captioner, folder = own
    hub = FakeHub(tmp_path)
    for module in (pvtblip.decoder, pvtblip.hub):
        monkeypatch.setattr(module, 'HfApi', hub)
    push_to_hub(captioner, 'shapes')
    there = tmp_path / 'me/shapes'
    assert "model='me/shapes'" in (there / 'README.md').read_text() and not list(there.glob('*.py'))
    (there / 'README.md').write_text('# by hand')
    push_to_hub(captioner, 'shapes', with_code=True)
    assert (there / 'README.md').read_text() == '# by hand' and (there / 'hub.py').exists()
    PvtBlipForImageTextToText.from_pretrained(folder).push_to_hub('me/shapes', card=Card(license='mit'))
    assert ModelCard((there / 'README.md').read_text()).data.license == 'mit'
    assert say(there, PHOTOS) == generate_caption(captioner, PHOTOS)
