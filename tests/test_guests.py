"Captioners of transformers in every face: what they say is what they say at home, and what they cannot do is refused."

import json, shutil

import pytest, torch
import transformers
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel

from pvtblip.confidence import caption_confidence
from pvtblip.doctor import doctor
from pvtblip.evaluation import has_coco_code
from pvtblip.fast import fingerprint, load_model
from pvtblip.files import printable
from pvtblip.generation import GenerationConfig, generate, generate_caption, stream_caption
from pvtblip.guests import Guest, load_guest
from pvtblip.looking_inside import word_maps
from pvtblip.page import Talk, Wishes, explain
from pvtblip.pipeline import CaptionRun, attention_drawer, caption_files, caption_many
from pvtblip.scoring import EvaluationRun, evaluate_photos
from pvtblip.shapes import make_scene
from pvtblip.tokenizer import collapse_whitespace, load_tokenizer

transformers.utils.logging.set_verbosity_error()
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
EYES = dict(SIZES, image_size=32, patch_size=8, initializer_range=0.5)
KINDS = 'blip', 'vit_bert', 'vit_gpt2'


def blip(folder):
    words = dict(SIZES, vocab_size=30524, max_position_embeddings=32, encoder_hidden_size=32)
    words['initializer_range'] = 0.3
    config = transformers.BlipConfig(text_config=words, vision_config=EYES)
    transformers.BlipForConditionalGeneration(config).save_pretrained(folder)
    load_tokenizer().save_pretrained(folder)
    transformers.BlipImageProcessor(size=dict(height=32, width=32)).save_pretrained(folder)


def encoder_decoder(folder, words, tokenizer, **ids):
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(**EYES), words
    )
    model = transformers.VisionEncoderDecoderModel(config)
    model.generation_config.update(**ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    transformers.ViTImageProcessor(size=dict(height=32, width=32)).save_pretrained(folder)


def vit_bert(folder):
    # another width than the eyes', so that a projection lies between them
    words = transformers.BertConfig(
        **SIZES | dict(hidden_size=48),
        vocab_size=30522,
        is_decoder=True,
        add_cross_attention=True,
        initializer_range=0.3,
    )
    ids = dict(decoder_start_token_id=101, eos_token_id=102, pad_token_id=0)
    encoder_decoder(folder, words, load_tokenizer(), **ids)


def vit_gpt2(folder):
    letters = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = transformers.GPT2Tokenizer(vocab=letters | {'<|endoftext|>': 256}, merges=[])
    words = transformers.GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=64,
        vocab_size=257,
        add_cross_attention=True,
        bos_token_id=256,
        eos_token_id=256,
        initializer_range=0.3,
    )
    ids = dict(decoder_start_token_id=256, eos_token_id=256, pad_token_id=256)
    encoder_decoder(folder, words, tokenizer, **ids)


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp('guests')
    for kind in KINDS:
        torch.manual_seed(0)
        globals()[kind](place / kind)
    return place


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    place = tmp_path_factory.mktemp('photos')
    for i in range(3):
        image = Image.fromarray(make_scene(0, i, image_size=96).image)
        image.resize((96, 64 + 16 * i)).save(place / f'{i}.png')
    return place


@pytest.fixture(params=KINDS)
def folder(request, folders):
    return folders / request.param


def at_home(folder, files, **options):
    "What transformers alone says, photo by photo."
    kind = json.loads((folder / 'config.json').read_text())['model_type']
    name = 'BlipForConditionalGeneration' if kind == 'blip' else 'VisionEncoderDecoderModel'
    model = getattr(transformers, name).from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    captions = []
    for file in files:
        pixels = processor(Image.open(file).convert('RGB'), return_tensors='pt')['pixel_values']
        rows = model.generate(pixel_values=pixels, **options)
        captions.append(
            [collapse_whitespace(text) for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]
        )
    return captions


@pytest.mark.parametrize(
    'options', [dict(num_beams=1), dict(num_beams=3), dict(num_beams=2, num_return_sequences=2)]
)
def test_a_guest_says_what_it_says_at_home(folder, photos, options):
    options = dict(options, max_length=12)
    files = sorted(photos.iterdir())
    guest = load_model(folder, 'cpu')
    assert isinstance(guest, Guest) and not guest.training
    said = [
        texts if isinstance(texts, list) else [texts] for texts in generate_caption(guest, files, **options)
    ]
    assert said == at_home(folder, files, **options)
    assert len({texts[0] for texts in said}) > 1


def test_scores_are_those_of_transformers(folder, photos):
    guest = load_model(folder, 'cpu')
    pixels = torch.stack([guest.photo_transform()(file) for file in sorted(photos.iterdir())])
    out = generate(guest, pixels, num_beams=2, num_return_sequences=2, max_length=10)
    theirs = guest.model.generate(
        pixel_values=pixels,
        num_beams=2,
        num_return_sequences=2,
        max_length=10,
        output_scores=True,
        return_dict_in_generate=True,
    )
    torch.testing.assert_close(out.scores.flatten(), theirs.sequences_scores, atol=1e-4, rtol=1e-4)
    confidence = caption_confidence(out, guest.tokenizer)
    assert (confidence <= 0).all() and confidence.isfinite().all()


def test_its_own_length_and_rules_count_where_nothing_else_is_asked(folders, photos, tmp_path):
    shutil.copytree(folders / 'vit_bert', tmp_path / 'a')
    file = tmp_path / 'a/generation_config.json'
    wishes = dict(max_length=9, no_repeat_ngram_size=1, repetition_penalty=1.3)
    file.write_text(json.dumps(json.loads(file.read_text()) | wishes))
    guest = load_model(tmp_path / 'a', 'cpu')
    one = sorted(photos.iterdir())[:1]
    assert generate_caption(guest, one, num_beams=1) == at_home(tmp_path / 'a', one)[0]
    assert GenerationConfig().check(guest).max_length == 9


def test_maps_lie_on_the_photo_and_add_to_one(folder, photos):
    guest = load_model(folder, 'cpu')
    assert (guest.encoder.first, guest.encoder.grids(None)) == (1, [(4, 4)])
    ids = generate(guest, guest.photo_transform()(photos / '0.png')[None], max_length=8).sequences[0, 0]
    words, maps = word_maps(guest, photos / '0.png', ids)
    assert maps.shape == (len(words), 64, 96) and len(words) > 1
    torch.testing.assert_close(maps.sum((1, 2)), torch.ones(len(words)), atol=1e-3, rtol=0)


def test_words_come_one_by_one_and_draws_repeat(folder, photos):
    guest = load_model(folder, 'cpu')
    photo = photos / '1.png'
    assert ''.join(stream_caption(guest, photo, max_length=8)) == generate_caption(
        guest, photo, 1, max_length=8
    )
    draw = lambda: generate_caption(
        guest, photo, do_sample=True, max_length=8, generator=torch.Generator().manual_seed(3)
    )
    assert draw() == draw()


@pytest.mark.parametrize('kind', ['blip', 'vit_bert'])
def test_words_that_must_and_must_not_be_said(folders, photos, kind):
    guest = load_model(folders / kind, 'cpu')
    said = generate_caption(guest, photos / '0.png', force_words=['dog'], prefix='a picture', max_length=10)
    assert said.startswith('a picture') and 'dog' in said
    pixels = guest.photo_transform()(photos / '0.png')[None]
    first = lambda **options: generate(guest, pixels, max_length=10, **options).sequences[0, 0, 1].item()
    assert first(bad_words_ids=[[first()]]) != first()


def test_the_commands_functions_take_a_guest(folder, photos, tmp_path):
    lines, files = [], sorted(photos.iterdir())
    run = CaptionRun(GenerationConfig(num_beams=2, num_return_sequences=2, max_length=10), batch_size=2)
    look = attention_drawer(tmp_path / 'maps.png')
    assert caption_files([photos], str(folder), run, look=look, out=lines.append) == 0
    expected = at_home(folder, files, num_beams=2, num_return_sequences=2, max_length=10)
    assert [line.partition('\t')[2] for line in lines] == [
        printable(text) for texts in expected for text in texts
    ]
    assert (tmp_path / 'maps.png').stat().st_size > 1000
    # one line a photo, and the same command goes on
    for _ in range(2):
        assert caption_many([photos], str(folder), tmp_path / 'out.jsonl', run, log=str, progress=False) == 0
    written = [json.loads(line) for line in (tmp_path / 'out.jsonl').read_text().splitlines()]
    assert len(written) == 3 and all(one['confidence'] < 0 and one['more'] for one in written)


@pytest.mark.skipif(not has_coco_code(), reason='pycocoevalcap or Java is not there')
def test_a_guest_is_evaluated(folder, photos, tmp_path):
    captions = {f'{i}.png': ['a red ball', 'a blue ring ' + 'and a star ' * 40] for i in range(3)}
    (tmp_path / 'captions.json').write_text(json.dumps(captions))
    run = EvaluationRun(json_file=tmp_path / 'scores.json')
    report = evaluate_photos(str(folder), photos, tmp_path / 'captions.json', run, str, str, progress=False)
    assert report['model'] == fingerprint(load_model(folder, 'cpu')) and report['shuffled_gap']['real'] > 0
    assert list(report['confidences']) == ['0.png', '1.png', '2.png']


def test_the_doctor_looks_a_guest_over(folder, photos):
    report = doctor(str(folder), photos, fast=True, log=str)
    failed = [found for found in report['findings'] if found['what'] == 'it fails when it is asked']
    assert not failed and report['verdict'] != ['nothing found']


def test_the_page_speaks_with_a_guest(folder, photos, tmp_path):
    guest = load_model(folder, 'cpu')
    shown = explain(photos / '2.png', str(folder), Wishes(candidates=2))
    best = shown.captions[0]
    assert best.text == generate_caption(guest, photos / '2.png', num_beams=3)
    assert [word for word, _ in best.words] == best.text.split() and 0 < best.confidence < 1
    assert all(seen.sum() == pytest.approx(1, abs=1e-3) for _, seen in best.words)
    # as the browser sends it
    shutil.copy(photos / '2.png', tmp_path)
    fields = ('beams', 3, 1.0, 3, '', '', '')
    *_, last = Talk(guest, tmp_path).answer(dict(path=str(tmp_path / '2.png'), orig_name='a.png'), *fields)
    assert 'class="map"' in last and 'role="alert"' not in last


def test_a_photo_that_is_cut_has_no_maps_and_the_faces_say_so(folders, photos, tmp_path):
    shutil.copytree(folders / 'blip', tmp_path / 'a')
    file = tmp_path / 'a/preprocessor_config.json'
    cut = dict(do_center_crop=True, crop_size=dict(height=32, width=32))
    file.write_text(json.dumps(json.loads(file.read_text()) | cut))
    guest = load_model(tmp_path / 'a', 'cpu')
    html = explain(photos / '0.png', guest).to_html()
    assert 'does not show where it looked' in html and 'class="map"' not in html
    lines = []
    with pytest.raises(ValueError, match='does not show where it looks'):
        look = attention_drawer(tmp_path / 'maps.png')
        caption_files([photos], str(tmp_path / 'a'), look=look, out=lines.append)
    assert not lines


def test_numbers_of_another_type(folder, photos):
    guest = load_model(folder, 'cpu', 'bfloat16')
    assert next(guest.parameters()).dtype == torch.bfloat16
    assert isinstance(generate_caption(guest, photos / '0.png', max_length=8), str)


def spoilt(folder, place, file, change):
    "A copy of a folder with one file changed, or without it."
    shutil.copytree(folder, place)
    if change is None:
        (place / file).unlink()
    else:
        (place / file).write_text(json.dumps(json.loads((place / file).read_text()) | change))
    return place


@pytest.mark.parametrize(
    'file, change, words',
    [
        ('preprocessor_config.json', None, 'preprocessor_config.json cannot be found'),
        ('tokenizer.json', None, "tokenizer's files cannot be found"),
        ('model.safetensors', None, 'no .safetensors file'),
        ('generation_config.json', dict(eos_token_id=[102, 103]), 'has 2 end tokens'),
        ('generation_config.json', dict(suppress_tokens=[5]), 'sets suppress_tokens'),
        ('config.json', dict(decoder=dict(model_type='nobody_knows')), 'can be loaded'),
    ],
)
def test_what_is_no_whole_guest_is_refused_in_a_line(folders, tmp_path, file, change, words):
    place = spoilt(folders / 'vit_bert', tmp_path / 'a', file, change)
    for name in ('vocab.txt',) if file == 'tokenizer.json' else ():
        (place / name).unlink(missing_ok=True)
    with pytest.raises((ValueError, OSError), match=words) as caught:
        load_model(place, 'cpu')
    assert '\n' not in str(caught.value) and len(str(caught.value)) < 400


def test_missing_weights_are_never_drawn_at_random(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(folders / 'vit_bert', tmp_path / 'a')
    file = tmp_path / 'a/model.safetensors'
    weights = load_file(file)
    lost = next(name for name in weights if name.startswith('encoder.') and 'bias' in name)
    save_file({name: weight for name, weight in weights.items() if name != lost}, file, dict(format='pt'))
    with pytest.raises(ValueError, match='weights are missing'):
        load_model(tmp_path / 'a', 'cpu')


def test_code_beside_a_guest_is_not_run(folders, tmp_path):
    shutil.copytree(folders / 'blip', tmp_path / 'a')
    (tmp_path / 'a/evil.py').write_text(f'open({str(tmp_path / "ran")!r}, "w")\nclass Evil: pass\n')
    for name in ('config.json', 'tokenizer_config.json', 'preprocessor_config.json'):
        file = tmp_path / 'a' / name
        kinds = 'AutoConfig', 'AutoModel', 'AutoImageProcessor'
        auto_map = {kind: 'evil.Evil' for kind in kinds} | dict(AutoTokenizer=['evil.Evil', 'evil.Evil'])
        file.write_text(json.dumps(json.loads(file.read_text()) | dict(auto_map=auto_map)))
    try:
        load_guest(tmp_path / 'a')
    except ValueError as error:
        assert '\n' not in str(error)
    assert not (tmp_path / 'ran').exists()


def test_words_of_gpt2_are_neither_forced_nor_forbidden(folders, photos):
    guest = load_model(folders / 'vit_gpt2', 'cpu')
    for words in (dict(force_words=['dog']), dict(bad_words=['dog'])):
        with pytest.raises(ValueError, match='WordPieces'):
            generate_caption(guest, photos / '0.png', **words)
        with pytest.raises(ValueError, match='WordPieces'):
            CaptionRun(**{name: tuple(given) for name, given in words.items()}).options(guest)


def test_a_name_that_nobody_has_is_one_line(tmp_path):
    with pytest.raises(OSError, match='no model at') as caught:
        load_model('nobody/knows-this-captioner')
    assert '\n' not in str(caught.value)
