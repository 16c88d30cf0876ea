"""The doctor finds what is wrong in a folder, calls nobody ill who is not, and leaves a captioner as it found it.
That its first finding names each bug of 08_six_bugs is what 09_doctor asserts where it draws them all.
"""

import copy
import json

import pytest
import torch
import symptoms
from house import ROOT
from PIL import ImageEnhance, ImageOps
from safetensors.torch import load_file, save_file

from pvtblip import bugs, generation, training
from pvtblip.bugs import SPECIMENS, bug, photos, small_captioner, teach, unseen, used
from pvtblip.decoder import Captioner, DecoderConfig
from pvtblip.doctor import (
    CHECKS,
    EXPLAINS,
    LESSONS,
    SYMPTOMS,
    Finding,
    adapt,
    describe,
    doctor,
    examine,
    keep_answer,
    load_patient,
    verdict_of,
)
from pvtblip.fast import pack
from pvtblip.pvt_encoder import EncoderConfig, image_transform
from pvtblip.shapes import ShapesDataset
from pvtblip.tokenizer import CaptionTokenizer, load_tokenizer

SCENES = unseen(16)
CAPTIONS = [scene.captions[0] for scene in SCENES]


def batch_of(model, **more):
    return dict(pixel_values=generation.process_image(photos(SCENES), model), captions=CAPTIONS, **more)


def errors(report):
    return [f for f in report['findings'] if f['severity'] == 'error']


# what is put in


def everything(model):
    "A batch with all that a check can need."
    drawn = ShapesDataset(image_transform(model.config.encoder), image_size=32, captions_per_image=1)
    return batch_of(
        model,
        items=[drawn[i] for i in range(8, 12)],
        hypotheses=bugs.say(model, SCENES),
        plan=training.TrainingConfig(max_steps=300),
    )


def test_bugs_that_no_captioner_shows_are_known():
    unseen_by_all = {name for name, one in SPECIMENS.items() if not one.finding}
    assert unseen_by_all == {'untrained_language_model', 'resume_forgets', 'flag_that_stays_on'}


# what is sound


def test_nothing_is_found_in_a_sound_captioner_whatever_is_given(taught):
    model, _ = taught
    report = examine(model, everything(model))
    assert report['findings'] == [] and report['verdict'] == ['nothing found']
    assert report['not_examined'] == ['golden: needs a kept answer: `keep_answer`']


def taught_for(steps, words=None, **changes):
    "A function that makes a captioner with other settings and trains it for so many steps."

    def make(taught):
        model = small_captioner(3, taught[1] if words else None, **changes)
        if steps:
            teach(model, steps)
        return model, {}

    return make


def other(change):
    "A function that makes another form of the trained captioner."

    def make(taught):
        model = copy.deepcopy(taught[0])
        return change(model) or model, {}

    return make


def given(**batch):
    "A function that gives the trained captioner something else to look at."

    def make(taught):
        return taught[0], {name: part(taught[0]) for name, part in batch.items()}

    return make


def untrained_that_says_all(taught):
    model = small_captioner(3)
    model.set_output_vocabulary(None)
    return model, {}


def frozen(model):
    model.requires_grad_(False)


def eyes(name, **changes):
    return dict(encoder=EncoderConfig(name=name, image_size=32, **changes))


def mouth(**changes):
    return dict(decoder=DecoderConfig.tiny(**dict(max_position_embeddings=32) | changes))


def pictures(change):
    return lambda model: generation.process_image([change(picture) for picture in photos(SCENES)], model)


def texts(change):
    return lambda model: [change(scene) for scene in SCENES]


def some(number):
    return dict(
        pixel_values=lambda model: generation.process_image(photos(SCENES[:number]), model),
        captions=lambda model: CAPTIONS[:number],
    )


SOUND = {
    # trained, with other settings, some for too short a time
    'another prompt': taught_for(30, True, prompt='this is'),
    'no prompt': taught_for(30, True, prompt=''),
    'a long prompt': taught_for(15, True, prompt='please tell me what is on this picture'),
    'no language model': taught_for(15),
    'a ResNet': taught_for(15, True, **eyes('resnet10t', stages=(1,))),
    'smoothed labels': taught_for(15, True, label_smoothing=0.1),
    'hidden words': taught_for(15, True, word_dropout=0.2),
    # not trained
    'untrained': taught_for(0),
    'on a language model': taught_for(0, True),
    'a ResNet, untrained': taught_for(0, **eyes('resnet10t', stages=(1,))),
    'a MobileNet, untrained': taught_for(0, **eyes('mobilenetv3_small_050', stages=(1,))),
    'a ViT, untrained': taught_for(0, **eyes('vit_tiny_patch16_224', stages=(-1,))),
    'two stages': taught_for(0, **eyes('pvt_v2_b0', stages=(0, 1))),
    'no position codes': taught_for(0, **eyes('pvt_v2_b0', stages=(1,), position='none')),
    'a narrow decoder': taught_for(0, **mouth(hidden_size=32, num_attention_heads=2, intermediate_size=64)),
    'three layers': taught_for(0, **mouth(num_hidden_layers=3)),
    'larger pictures': taught_for(0, encoder=EncoderConfig.tiny()),
    # the trained one in other forms
    'bfloat16': other(lambda model: model.bfloat16()),
    'float16': other(lambda model: model.half()),
    'float64': other(lambda model: model.double()),
    'all words, untrained': untrained_that_says_all,
    'frozen': other(frozen),
    'saved and loaded': other(used),
    'packed': other(pack),
    'as a patient': lambda taught: (adapt(taught[0]), {}),
    # the trained one, looking at something else
    'mirrored pictures': given(pixel_values=pictures(ImageOps.mirror)),
    'grey pictures': given(pixel_values=pictures(lambda p: p.convert('L').convert('RGB'))),
    'half of the contrast': given(pixel_values=pictures(lambda p: ImageEnhance.Contrast(p).enhance(0.5))),
    'half of the resolution': given(pixel_values=pictures(lambda p: p.resize((16, 16)))),
    'one picture many times': given(
        pixel_values=lambda model: batch_of(model)['pixel_values'][:1].repeat(16, 1, 1, 1),
        captions=lambda model: [SCENES[0].captions[i % 2] for i in range(16)],
    ),
    'capitals': given(captions=texts(lambda scene: scene.captions[0].upper())),
    'lists of captions': given(captions=texts(lambda scene: list(scene.captions))),
    'three pictures': given(**some(3)),
    'one picture': given(**some(1)),
    'no captions': given(captions=lambda model: None),
    'noise and no captions': given(
        pixel_values=lambda model: torch.randn(2, 3, 32, 32),
        captions=lambda model: None,
        real=lambda model: False,
    ),
}


@pytest.mark.parametrize('name', SOUND)
def test_no_error_for_sound_variations(taught, name):
    model, other_batch = SOUND[name](taught)
    batch = batch_of(model if isinstance(model, Captioner) else taught[0]) | other_batch
    assert errors(examine(model, batch, fast=True)) == []


def test_there_are_thirty_sound_variations_and_more():
    assert len(SOUND) >= 30


def test_an_untrained_captioner_and_a_young_one_are_called_so(taught):
    for steps, word in ((0, 'untrained'), (10, 'too short a time')):
        model = small_captioner(3)
        if steps:
            teach(model, steps)
        report = examine(model, batch_of(model), fast=True)
        assert report['verdict'][0].startswith('weights:') and word in report['verdict'][0]


# transformers' two


@pytest.fixture(scope='module')
def transformers():
    import transformers

    transformers.utils.logging.set_verbosity_error()
    return transformers


SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)


def encoder_decoder(transformers, **decoder):
    torch.manual_seed(0)
    vit = transformers.ViTConfig(**SIZES, image_size=32, patch_size=8, initializer_range=0.2)
    bert = transformers.BertConfig(
        **SIZES, vocab_size=30522, is_decoder=True, add_cross_attention=True, **decoder
    )
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vit, bert)
    model = transformers.VisionEncoderDecoderModel(config).eval()
    model.generation_config.update(decoder_start_token_id=101, eos_token_id=102, pad_token_id=0)
    return model


def blip(transformers, vision_deviation=0.2):
    torch.manual_seed(0)
    text = dict(SIZES, vocab_size=30524, max_position_embeddings=32, encoder_hidden_size=32)
    vision = dict(SIZES, image_size=32, patch_size=8, initializer_range=vision_deviation)
    config = transformers.BlipConfig(text_config=text, vision_config=vision)
    return transformers.BlipForConditionalGeneration(config).eval()


def test_a_random_encoder_decoder_works_with_and_without_captions(transformers, taught):
    model = encoder_decoder(transformers)
    pixels = batch_of(taught[0])['pixel_values']
    for batch in (dict(pixel_values=pixels, captions=CAPTIONS), dict(pixel_values=pixels)):
        report = examine(model, batch, fast=True, tokenizer=load_tokenizer())
        assert errors(report) == []
        assert any(line.startswith('weights: untrained') for line in report['verdict'])
    model.config.update(dict(decoder_start_token_id=101, pad_token_id=0))
    report = examine(model, dict(pixel_values=pixels, captions=CAPTIONS), tokenizer=load_tokenizer())
    assert errors(report) == [] and not any('loss of its own' in line for line in report['not_examined'])


def test_an_encoder_decoder_that_reads_both_ways_is_caught(transformers, taught):
    model = encoder_decoder(transformers)
    for module in model.decoder.modules():
        if hasattr(module, 'is_decoder'):
            module.is_decoder = False
    model.decoder.config.is_decoder = False
    pixels = batch_of(taught[0])['pixel_values']
    report = examine(model, dict(pixel_values=pixels, captions=CAPTIONS), True, load_tokenizer())
    assert {f['check'] for f in errors(report)} & {'causal', 'looks'}


@pytest.mark.parametrize('deviation', [0.2, 1e-10])
def test_a_random_blip_works_and_is_not_called_unconnected(transformers, taught, deviation):
    model = blip(transformers, deviation)
    pixels = batch_of(taught[0])['pixel_values']
    report = examine(model, dict(pixel_values=pixels, captions=CAPTIONS), True, load_tokenizer())
    assert errors(report) == []
    assert any('never loaded' in f['what'] for f in report['findings']) == (deviation < 1e-5)


def test_blip_trained_on_the_processors_rows_begins_otherwise(transformers, taught):
    model = blip(transformers)
    rows = CaptionTokenizer(prompt='')(CAPTIONS)
    batch = dict(pixel_values=batch_of(taught[0])['pixel_values'], **rows)
    report = examine(model, batch, True, load_tokenizer())
    assert report['verdict'][0].startswith('start:')
    rows['input_ids'][:, 0] = 30522
    assert errors(examine(model, dict(batch, **rows), True, load_tokenizer())) == []


def test_a_blip_folder_can_be_examined(transformers, tmp_path):
    blip(transformers).save_pretrained(tmp_path / 'blip')
    load_tokenizer().save_pretrained(tmp_path / 'blip')
    report = doctor(tmp_path / 'blip', fast=True, log=str)
    assert errors(report) == [] and any('captions' in line for line in report['not_examined'])


def test_a_blip_folder_that_lacks_weights_is_an_error(transformers, tmp_path):
    blip(transformers).save_pretrained(tmp_path / 'blip')
    file = tmp_path / 'blip/model.safetensors'
    weights = load_file(file)
    lost = next(name for name in weights if name.endswith('layer.0.attention.self.query.weight'))
    save_file({name: w for name, w in weights.items() if name != lost}, file, dict(format='pt'))
    report = doctor(tmp_path / 'blip', fast=True, log=str)
    assert report['verdict'][0].startswith('weights:') and lost in report['verdict'][0]


# a function


def test_a_function_of_photos_and_words_is_enough(taught):
    model, _ = taught
    patient = adapt(model)
    rows = model.tokenizer(CAPTIONS)
    pixels = batch_of(model)['pixel_values']
    every = lambda pixel_values, input_ids: patient.all_logits(pixel_values, input_ids)
    report = examine(every, dict(pixel_values=pixels, **rows))
    assert errors(report) == []
    assert len(report['not_examined']) > 8
    blind = lambda pixel_values, input_ids: every(torch.zeros_like(pixel_values), input_ids)
    assert examine(blind, dict(pixel_values=pixels, **rows))['verdict'][0].startswith('looks:')
    report = examine(every, dict(pixel_values=pixels[:1]))
    assert errors(report) == [] and any(line.startswith('looks: needs') for line in report['not_examined'])


def test_several_captions_a_photo_are_taken_from_one_batch(taught):
    model, _ = taught
    pixels = batch_of(model)['pixel_values']
    rows = model.tokenizer([caption for scene in SCENES for caption in scene.captions[:2]])
    assert examine(model, dict(pixel_values=pixels, **rows), fast=True)['findings'] == []


# as it was


def test_everything_is_as_it_was(taught):
    model = copy.deepcopy(taught[0]).requires_grad_(True).train()
    model.encoder.eval()
    batch = everything(model)
    weights, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    given = {
        name: value.clone() if torch.is_tensor(value) else copy.copy(value) for name, value in batch.items()
    }
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    report = examine(model, batch)
    assert torch.equal(torch.rand(4), expected)
    assert report['verdict'][0].startswith('mode:')
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(w, weights[name]) for name, w in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert batch.keys() == given.keys() and torch.equal(batch['pixel_values'], given['pixel_values'])
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


# folders


@pytest.fixture
def folder(taught, tmp_path):
    "A model folder, photos and captions."
    taught[0].save_pretrained(tmp_path / 'model')
    (tmp_path / 'photos').mkdir()
    for i, picture in enumerate(photos(SCENES)):
        picture.save(tmp_path / f'photos/{i}.png')
    captions = {f'{i}.png': list(scene.captions) for i, scene in enumerate(SCENES)}
    (tmp_path / 'captions.json').write_text(json.dumps(captions))
    return tmp_path


def changed_config(**changes):
    "A function that changes config.json; two underscores go down."

    def change(place):
        config = json.loads((place / 'config.json').read_text())
        for path, value in changes.items():
            *parts, last = path.split('__')
            node = config
            for part in parts:
                node = node[part]
            node[last] = value
        (place / 'config.json').write_text(json.dumps(config))

    return change


def changed_weights(part, change):
    "A function that changes the weights whose names have this part."

    def spoil(place):
        weights = load_file(place / 'model.safetensors')
        new = {name: change(w).contiguous() for name, w in weights.items() if part in name}
        assert new
        save_file(weights | new, place / 'model.safetensors')

    return spoil


def drawn(scale):
    return lambda w: torch.randn(w.shape, generator=torch.Generator().manual_seed(0)) * scale


def vocabulary_shorter_by_a_line(place):
    file = place / 'tokenizer.json'
    tokenizer = json.loads(file.read_text())
    words = sorted(tokenizer['model']['vocab'], key=tokenizer['model']['vocab'].get)
    moved = words[:999] + words[1000:] + words[999:1000]
    tokenizer['model']['vocab'] = {word: i for i, word in enumerate(moved)}
    file.write_text(json.dumps(tokenizer))


def tokens_added(place):
    tokenizer = load_tokenizer(place)
    tokenizer.add_tokens(['<photo>', '<end>'])
    tokenizer.save_pretrained(place)


def words_beyond_the_tables(place):
    "A tokenizer with more words than the tables, among them words of the captions."
    tokenizer = json.loads((place / 'tokenizer.json').read_text())
    vocabulary = tokenizer['model']['vocab']
    vocabulary['shape'], vocabulary['##shapes'] = len(vocabulary), vocabulary['shape']
    (place / 'tokenizer.json').write_text(json.dumps(tokenizer))


BROKEN = {
    'a word beyond the tables': ('vocabulary', words_beyond_the_tables),
    'pixels as another backbone wants them': (
        'pixels',
        changed_config(encoder__mean=[0.0, 0.0, 0.0], encoder__std=[1.0, 1.0, 1.0]),
    ),
    'tokens added': ('vocabulary', tokens_added),
    'places drawn anew': (
        ('weights', 'looks', 'end', 'start'),
        changed_weights('position_embeddings', drawn(0.5)),
    ),
    'an infinite weight': ('finite', changed_weights('cls.predictions.bias', lambda w: w + torch.inf)),
    'a wider config': ('file', changed_config(decoder__hidden_size=128)),
    'a damaged tokenizer': ('file', lambda place: (place / 'tokenizer.json').write_text('{')),
    'a damaged config': ('file', lambda place: (place / 'config.json').write_text('{"library"')),
    'another prompt': ('start', changed_config(prompt='can you tell me what is in this picture')),
    'no prompt': ('start', changed_config(prompt='')),
    'a limit below the captions': ('end', changed_config(max_length=9)),
    'half of the words': (
        'vocabulary',
        lambda place: changed_config(output_vocabulary=[101, 102, 1037, 1997, 2417])(place),
    ),
    'a vocabulary without a line': ('vocabulary', vocabulary_shorter_by_a_line),
    'words moved by a row': ('vocabulary', changed_weights('word_embeddings', lambda w: w.roll(1, 0))),
    'words drawn anew': ('weights', changed_weights('word_embeddings', drawn(0.06))),
    'layers drawn anew': (('weights', 'looks', 'end'), changed_weights('decoder.bert.encoder', drawn(0.06))),
    'eyes drawn anew': ('looks', changed_weights('encoder.backbone', drawn(0.05))),
    'no cross-attention': ('looks', changed_weights('crossattention.output.dense', torch.zeros_like)),
    'small features': ('pixels', changed_weights('encoder.norms', lambda w: w * 0.01)),
    'blue, green, red': (
        'pixels',
        changed_weights('patch_embed.proj.weight', lambda w: w.flip(1) if w.shape[1] == 3 else w),
    ),
    'an end that is not said': (
        'end',
        changed_weights('cls.predictions.bias', lambda w: w - 20 * (torch.arange(len(w)) == 102)),
    ),
    'no numbers': ('finite', changed_weights('cls.predictions.bias', lambda w: w * float('nan'))),
    'no normaliser': ('file', changed_config(encoder__normaliser='none')),
    'cut weights': ('file', lambda place: (place / 'model.safetensors').write_bytes(b'1234')),
    'no config': ('file', lambda place: (place / 'config.json').unlink()),
}


@pytest.mark.parametrize('name', BROKEN)
def test_a_spoilt_folder_is_an_error_and_its_verdict_is_right(folder, name):
    check, spoil = BROKEN[name]
    spoil(folder / 'model')
    report = doctor(folder / 'model', folder / 'photos', folder / 'captions.json', fast=True, log=str)
    assert errors(report)
    assert report['verdict'][0].split(':')[0] in (check if isinstance(check, tuple) else (check,)), report[
        'verdict'
    ]


@pytest.mark.parametrize('above', ['a', 'a folder of a long name ' * 8])
def test_the_length_of_its_path_changes_no_verdict(taught, tmp_path, above):
    place = tmp_path / above.strip() / 'model'
    taught[0].save_pretrained(place)
    tokens_added(place)
    (verdict,) = doctor(place, fast=True, log=str)['verdict']
    assert verdict.startswith('vocabulary: config.json: the tokenizer has')
    assert verdict.endswith('they must agree')


def test_a_prompt_of_the_same_length_costs_nothing_and_is_no_error(folder):
    changed_config(prompt='a drawing of')(folder / 'model')
    report = doctor(folder / 'model', folder / 'photos', folder / 'captions.json', fast=True, log=str)
    assert errors(report) == []


def test_what_is_printed_and_what_is_written(folder):
    lines = []
    changed_config(prompt='')(folder / 'model')
    out = folder / 'report.json'
    report = doctor(folder / 'model', folder / 'photos', folder / 'captions.json', out, True, lines.append)
    assert json.loads(out.read_text()) == report | dict(written_by='pvtblip')
    assert set(report) == {'verdict', 'findings', 'not_examined'}
    for finding in report['findings']:
        assert set(finding) == {'check', 'severity', 'what', 'evidence', 'healthy', 'lesson'}
        assert (ROOT / f'nbs/{finding["lesson"]}.ipynb').is_file()
    assert lines[0].splitlines()[0].startswith('verdict: start:')
    assert describe(report) == lines[0]
    doctor(
        folder / 'model', folder / 'photos', folder / 'captions.json', out, True, str
    )  # may be written again
    with pytest.raises(ValueError, match='captions.json'):
        doctor(
            folder / 'model', folder / 'photos', folder / 'captions.json', folder / 'captions.json', True, str
        )


def test_without_photos_or_captions_it_says_what_it_could_not_look_at(folder):
    report = doctor(folder / 'model', fast=True, log=str)
    assert report['findings'] == [] and any(
        line.startswith('looks: needs') for line in report['not_examined']
    )
    report = doctor(folder / 'model', folder / 'photos', fast=True, log=str)
    assert report['findings'] == [] and any(
        'captions of the photos' in line for line in report['not_examined']
    )
    with pytest.raises(ValueError, match='captions need their photos'):
        doctor(folder / 'model', captions=folder / 'captions.json', log=str)
    with pytest.raises(ValueError, match='no photos'):
        doctor(folder / 'model', folder / 'model', log=str)
    with pytest.raises(OSError, match='nowhere'):
        doctor(folder / 'nowhere', log=str)


def test_a_dark_photo_is_seen_without_captions(taught):
    model, _ = taught
    with bug('pixels_twice'):
        report = examine(model, dict(pixel_values=batch_of(model)['pixel_values']), fast=True)
    assert report['verdict'][0].startswith('pixels: every photo is nearly black')


def test_a_kept_answer_finds_what_nothing_else_does(folder):
    (folder / 'model/golden.json').write_text(json.dumps(keep_answer(load_patient(folder / 'model'))))
    assert doctor(folder / 'model', fast=True, log=str)['findings'] == []
    changed_config(decoder__num_attention_heads=2)(folder / 'model')
    assert doctor(folder / 'model', fast=True, log=str)['verdict'][0].startswith('golden:')


@pytest.mark.parametrize('command', [['--fast'], []])
def test_the_command_ends_with_1_where_there_is_an_error(folder, capsys, monkeypatch, command):
    from pvtblip.cli import main

    given = ['--model', 'model', '--images', 'photos', '--captions', 'captions.json', '--json', 'out.json']
    monkeypatch.chdir(folder)
    for expected in (0, 1):
        monkeypatch.setattr('sys.argv', ['pvtblip', 'doctor', *given, *command])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == expected
        assert json.loads((folder / 'out.json').read_text())['verdict']
        assert capsys.readouterr().out.startswith('verdict: ')
        changed_config(prompt='')(folder / 'model')


# how findings are joined


def test_a_verdict_is_what_no_other_finding_explains():
    of = lambda *pairs: [Finding(check, severity, check, '', '') for check, severity in pairs]
    assert verdict_of(of(('text', 'error'), ('looks', 'error'), ('pixels', 'error'))) == ['pixels: pixels']
    assert verdict_of(of(('text', 'warning'), ('device', 'error'))) == ['device: device']
    assert verdict_of(of(('text', 'warning'), ('weights', 'warning'))) == ['weights: weights']
    assert verdict_of(of(('vocabulary', 'note'))) == ['nothing found'] == verdict_of([])
    assert verdict_of(of(('batch', 'error'), ('device', 'error'))) == ['device: device', 'batch: batch']


def test_every_check_has_a_lesson_and_a_place():
    assert set(CHECKS) == set(LESSONS) and len(CHECKS) == 20
    assert set(EXPLAINS) <= set(LESSONS)
    assert all(
        isinstance(LESSONS[check], str) and (ROOT / f'nbs/{LESSONS[check]}.ipynb').is_file()
        for check in LESSONS
    )


def test_the_page_of_symptoms_is_made_from_the_tables():
    assert (ROOT / 'nbs/symptoms.ipynb').read_text(encoding='utf-8') == symptoms.notebook(), (
        'run python tests/check.py --fix'
    )
    for seen, checks, causes, lessons in SYMPTOMS:
        assert set(checks) <= set(CHECKS) and all((ROOT / f'nbs/{name}.ipynb').is_file() for name in lessons)
        assert list(causes.values()) == sorted(causes.values(), reverse=True), seen


def test_a_report_with_findings_leads_to_the_symptoms():
    one = dict(check='looks', severity='error', what='blind', evidence='0', healthy='1', lesson='02_decoder')
    found = dict(verdict=['looks: blind'], findings=[one], not_examined=[])
    assert describe(found).splitlines()[-1].endswith('see symptoms')
    assert 'symptoms' not in describe(dict(found, verdict=['nothing found'], findings=[]))
