"""What the cells of 04_generation do not reach: the whole grid against transformers, and random properties."""

import itertools
import math
import pickle
from dataclasses import asdict

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.testing import assert_close
from transformers import BertConfig, BertLMHeadModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.generation import (
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from plain_generation import NoWordLeft, plain_generate
from pvtblip.decoder import BertDecoder, Captioner, CaptionerConfig, DecoderConfig, attention_weights
from pvtblip.generation import (
    ForcedWords,
    GenerationConfig,
    NextToken,
    Rules,
    _beam_search,
    bad_endings,
    encode_in_pieces,
    generate,
    generate_caption,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise_repetition,
    pick,
    process_image,
    repeated_ngrams,
    settled,
    stream_caption,
    tokens_missing,
    word_ids,
)
from pvtblip.pvt_encoder import image_transform
from pvtblip.tokenizer import CaptionTokenizer

torch.set_num_threads(1)
SEP = 102
PROMPT = [101, 1037, 3861, 1997]


def make(seed, sep_bias, images=8):
    "A captioner with random weights, the same in transformers, and image tokens."
    torch.manual_seed(seed)
    ours = Captioner(CaptionerConfig.tiny()).eval()
    for weight in ours.decoder.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    ours.decoder.cls['predictions'].bias.data[SEP] += sep_bias
    theirs = BertLMHeadModel(
        BertConfig(**asdict(ours.config.decoder), is_decoder=True, add_cross_attention=True)
    ).eval()
    state = ours.decoder.state_dict()
    theirs.load_state_dict(
        state
        | {
            'cls.predictions.decoder.weight': ours.decoder.word_embedding,
            'cls.predictions.decoder.bias': state['cls.predictions.bias'],
        }
    )
    return ours, theirs, torch.randn(images, ours.encoder.num_tokens, 64)


@pytest.fixture(scope='module')
def early():
    "Captions that end at different places, some of them not at all."
    return make(0, 4.2)


def theirs_generate(theirs, images, **kwargs):
    with torch.inference_mode():
        return theirs.generate(
            input_ids=torch.tensor([PROMPT] * len(images)),
            encoder_hidden_states=images,
            do_sample=False,
            eos_token_id=SEP,
            pad_token_id=0,
            past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()),
            return_dict_in_generate=True,
            output_scores=True,
            **kwargs,
        )


def until_end(rows):
    return [row[: row.index(SEP) + 1] if SEP in row else row for row in rows.tolist()]


def equal(ours, theirs, images, **kwargs):
    out = generate(ours, image_tokens=images, **kwargs)
    other = theirs_generate(theirs, images, **kwargs)
    assert until_end(out.sequences[:, 0]) == until_end(other.sequences)
    if kwargs.get('num_beams', 1) > 1:
        assert_close(out.scores[:, 0], other.sequences_scores, rtol=0, atol=1e-4)
    for row, kept, logprobs in zip(
        out.sequences[:, 0].tolist(), until_end(out.sequences[:, 0]), out.token_logprobs[:, 0].tolist()
    ):
        assert not any(row[len(kept) :]) and not any(logprobs[len(kept) - 4 :]), (
            'behind [SEP] there is only padding'
        )
    return out


# ---------------------------------------------------------------- equality with the plain definitions

WORDS = [102, 1037, 1996, 2006, 2015, 2075, 2417, 3899, 4937]  # [SEP] a the on ##s ##ing red dog cat
small = {}


def small_captioner(seed, sep_bias):
    "Random weights in double precision, so that rounding decides nothing; nine words."
    if not small:
        decoder = DecoderConfig.tiny(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=24,
        )
        small['model'] = (
            Captioner(CaptionerConfig.tiny(decoder=decoder, output_vocabulary=WORDS, max_length=24))
            .double()
            .eval()
        )
    model = small['model']
    generator = torch.Generator().manual_seed(seed)
    for (
        name,
        weight,
    ) in (
        model.decoder.named_parameters()
    ):  # small biases and wide positions: what comes next must depend on what was said and where
        if weight.numel() > 2000:
            continue
        spread = 1.0 if 'position' in name else 0.5 if weight.dim() == 2 else 0.1
        weight.data.copy_(
            torch.randn(weight.shape, generator=generator) * spread + float('LayerNorm.weight' in name)
        )
    model.decoder.word_embedding.data[WORDS] = torch.randn(len(WORDS), 16, generator=generator).double()
    model.decoder.cls['predictions'].bias.data[102] = sep_bias
    return model


token_lists = st.lists(st.sampled_from(WORDS[1:]), min_size=1, max_size=3)
bad_lists = st.lists(st.sampled_from([1996, 2006, 2015, 4937]), min_size=1, max_size=3)
common = dict(
    max_length=st.integers(7, 11),
    min_length=st.sampled_from([0, 0, 5, 7]),
    length_penalty=st.sampled_from([0.0, 1.0, 2.0, -0.5]),
    no_repeat_ngram_size=st.sampled_from([0, 0, 0, 1, 2, 3]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 0.7, 1.4]),
    bad_words_ids=st.one_of(st.none(), st.lists(bad_lists, min_size=1, max_size=2)),
    prefix=st.sampled_from(['', '', 'a', 'red dog']),
)
stops = dict(early_stopping=st.sampled_from([False, True, 'never']), num_return_sequences=st.integers(1, 2))
configs = st.one_of(
    st.fixed_dictionaries(common),
    st.fixed_dictionaries(
        common
        | dict(
            do_sample=st.just(True),
            num_return_sequences=st.integers(1, 3),
            temperature=st.sampled_from([0.5, 1.0, 3.0]),
            top_k=st.sampled_from([0, 0, 2, 5]),
            top_p=st.sampled_from([1.0, 0.8, 0.3]),
            min_p=st.sampled_from([0.0, 0.0, 0.2]),
        )
    ),
    st.fixed_dictionaries(common | stops | dict(num_beams=st.integers(2, 4))),
    st.integers(2, 3).flatmap(
        lambda groups: st.fixed_dictionaries(
            common
            | stops
            | dict(
                num_beam_groups=st.just(groups),
                num_beams=st.integers(1, 3).map(lambda k: k * groups),
                diversity_penalty=st.sampled_from([0.0, 0.3, 2.0]),
            )
        )
    ),
    st.fixed_dictionaries(
        common
        | stops
        | dict(
            num_beams=st.integers(2, 4),
            force_words_ids=st.lists(
                st.one_of(token_lists, st.lists(token_lists, min_size=1, max_size=2)), min_size=1, max_size=2
            ),
        )
    ),
)


@given(st.integers(0, 2**31), st.sampled_from([-2.0, 1.0, 3.0]), st.integers(1, 3), configs)
@settings(max_examples=1000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_generate_is_the_plain_definition(seed, sep_bias, batch, options):
    model = small_captioner(seed, sep_bias)
    try:
        config = GenerationConfig(**options).check(model)
    except ValueError:
        assume(False)
    images = torch.randn(batch, 3, 16, generator=torch.Generator().manual_seed(seed)).double()
    steps = config.max_length - len(config.prompt_ids(model))
    seeds = [seed + i for i in range(batch)]
    try:
        plain = [
            plain_generate(
                model,
                image[None],
                config,
                torch.rand(
                    config.num_return_sequences, steps, generator=torch.Generator().manual_seed(s)
                ).tolist(),
            )
            for image, s in zip(images, seeds)
        ]
    except NoWordLeft:
        with pytest.raises(ValueError, match='no word is left|keep to all rules'):
            generate(model, image_tokens=images, config=config)
        return
    out = generate(
        model, image_tokens=images, config=config, generator=[torch.Generator().manual_seed(s) for s in seeds]
    )
    for b, captions in enumerate(plain):
        assert len(captions) == config.num_return_sequences
        for r, (score, ids, logprobs) in enumerate(captions):
            assert until_end(out.sequences[b, r : r + 1]) == [ids]
            assert abs(float(out.scores[b, r]) - score) < 1e-5
            assert_close(
                out.token_logprobs[b, r, : len(logprobs)], torch.tensor(logprobs).double(), rtol=0, atol=1e-5
            )


# ---------------------------------------------------------------- equality with transformers


def test_the_grid_has_captions_that_end_early_and_captions_that_do_not(early):
    ours, _, images = early
    lengths = {
        len(row)
        for row in until_end(generate(ours, image_tokens=images, num_beams=3, max_length=20).sequences[:, 0])
    }
    assert len(lengths) >= 3 and min(lengths) < 12
    lengths = [
        len(row) for row in until_end(generate(ours, image_tokens=images, max_length=20).sequences[:, 0])
    ]
    assert len(set(lengths)) >= 3, 'greedy captions must leave the batch at different steps'


@pytest.mark.parametrize('early_stopping', [False, True, 'never'])
@pytest.mark.parametrize('batch', [1, 8])
@pytest.mark.parametrize('num_beams', [1, 3, 5])
def test_same_tokens_and_scores_as_transformers(early, num_beams, batch, early_stopping):
    ours, theirs, images = early
    for penalty, (shortest, ngram) in itertools.product((0.0, 1.0, 2.0), ((0, 0), (10, 2))):
        equal(
            ours,
            theirs,
            images[:batch],
            num_beams=num_beams,
            early_stopping=early_stopping,
            length_penalty=penalty,
            min_length=shortest,
            no_repeat_ngram_size=ngram,
            max_length=16,
        )


@pytest.mark.parametrize('num_beams', [1, 3])
@pytest.mark.parametrize(
    'options',
    [
        dict(repetition_penalty=0.3),
        dict(repetition_penalty=0.6, no_repeat_ngram_size=2),
        dict(bad_words_ids='said'),
        dict(bad_words_ids='said', repetition_penalty=1.2, min_length=9, no_repeat_ngram_size=1),
    ],
)
def test_rules_are_those_of_transformers(early, num_beams, options):
    ours, theirs, images = early
    free = generate(ours, image_tokens=images, num_beams=num_beams, max_length=14).sequences
    if (
        'bad_words_ids' in options
    ):  # what would be said: a token, a pair, a pair that begins in the prompt, and [SEP], which both let pass
        options = options | dict(
            bad_words_ids=[[int(free[0, 0, 5])], free[1, 0, 5:7].tolist(), [1997, int(free[2, 0, 4])], [SEP]]
        )
    out = equal(ours, theirs, images, num_beams=num_beams, max_length=14, **options)
    assert out.sequences.shape != free.shape or not torch.equal(out.sequences, free), (
        'the rule changed nothing: the test says nothing'
    )


def test_several_continued_captions_are_transformers():
    ours, theirs, images = make(0, 4.2, 2)
    prompt = PROMPT + [2048, 6077]  # two dogs
    for num_beams in (1, 3):
        with torch.inference_mode():
            other = theirs.generate(
                input_ids=torch.tensor([prompt] * 2),
                encoder_hidden_states=images,
                do_sample=False,
                num_beams=num_beams,
                num_return_sequences=num_beams,
                max_length=14,
                length_penalty=0.5,
                eos_token_id=SEP,
                pad_token_id=0,
                past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()),
                return_dict_in_generate=True,
                output_scores=True,
            )
        out = generate(
            ours,
            image_tokens=images,
            num_beams=num_beams,
            num_return_sequences=num_beams,
            max_length=14,
            length_penalty=0.5,
            prefix='Two  dogs',
        )
        assert until_end(out.sequences.flatten(0, 1)) == until_end(other.sequences)
        assert out.token_logprobs.shape[-1] == out.sequences.shape[-1] - 6
        if num_beams > 1:
            assert_close(out.scores.flatten(), other.sequences_scores, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    'options',
    [
        dict(),
        dict(temperature=0.6, top_p=0.9),
        dict(min_p=0.05, repetition_penalty=1.5),
        dict(top_k=9, min_p=0.3, temperature=1.7, no_repeat_ngram_size=1),
    ],
)
def test_same_draws_as_transformers(early, options):
    ours, theirs, images = early
    for seed in range(4):
        torch.manual_seed(seed)
        with torch.inference_mode():
            other = theirs.generate(
                input_ids=torch.tensor([PROMPT]),
                encoder_hidden_states=images[:1],
                do_sample=True,
                eos_token_id=SEP,
                pad_token_id=0,
                max_length=16,
                past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()),
                **dict(top_k=0) | options,
            )
        torch.manual_seed(seed)
        out = generate(ours, image_tokens=images[:1], do_sample=True, max_length=16, **options)
        assert until_end(out.sequences[:, 0]) == until_end(other)


@pytest.mark.parametrize('seed', range(1, 7))
def test_same_as_transformers_on_other_weights(seed):
    ours, theirs, images = make(seed, sep_bias=1.5 + seed / 2, images=3)
    for num_beams in (1, 2, 4):
        equal(
            ours,
            theirs,
            images,
            num_beams=num_beams,
            max_length=14,
            length_penalty=-1.0 if seed == 3 else 1.0,
        )


def test_all_beams_are_transformers_beams(early):
    ours, theirs, images = early
    out = generate(ours, image_tokens=images, num_beams=4, num_return_sequences=4, max_length=14)
    other = theirs_generate(theirs, images, num_beams=4, num_return_sequences=4, max_length=14)
    assert until_end(out.sequences.flatten(0, 1)) == until_end(other.sequences)
    assert_close(out.scores.flatten(), other.sequences_scores, rtol=0, atol=1e-4)


# ---------------------------------------------------------------- scores, batches, vocabularies


@pytest.mark.parametrize('num_beams', [1, 3])
def test_log_probabilities_are_the_models_own(early, num_beams):
    ours, _, images = early
    out = generate(ours, image_tokens=images, num_beams=num_beams, max_length=14, length_penalty=0.7)
    with torch.inference_mode():
        logits = ours.decoder(out.sequences[:, 0], images).log_softmax(-1)
    said = logits[:, 3:-1].gather(2, out.sequences[:, 0, 4:, None])[..., 0]  # (B, T-P)
    spoken = torch.tensor(
        [[i < len(row) - 4 for i in range(said.shape[1])] for row in until_end(out.sequences[:, 0])]
    )
    assert_close(out.token_logprobs[:, 0], said.where(spoken, torch.tensor(0.0)), rtol=0, atol=1e-4)
    assert_close(
        out.scores[:, 0], out.token_logprobs[:, 0].sum(-1) / spoken.sum(-1) ** 0.7, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize(
    'options', [dict(), dict(num_beams=3), dict(num_beams=5, early_stopping=True, no_repeat_ngram_size=2)]
)
def test_company_changes_nothing(early, options):
    ours, _, images = early
    order = torch.tensor([5, 0, 7, 2, 1, 3])
    together = generate(ours, image_tokens=images, max_length=16, **options)
    shuffled = generate(ours, image_tokens=images[order], max_length=16, **options)
    assert until_end(shuffled.sequences[:, 0]) == [until_end(together.sequences[:, 0])[i] for i in order]
    assert_close(shuffled.scores[:, 0], together.scores[order, 0], rtol=0, atol=1e-4)


def test_only_the_output_vocabulary_is_spoken(early):
    ours, theirs, images = make(3, 2.0)
    words = list(range(3000, 3060))
    ours.set_output_vocabulary(words)
    theirs.cls.predictions.decoder.bias = torch.nn.Parameter(theirs.cls.predictions.bias.detach().clone())
    others = torch.ones(30522, dtype=torch.bool)
    others[words + [SEP]] = False
    theirs.cls.predictions.decoder.bias.data[others] = -1e9  # the full vocabulary, all other words impossible
    for num_beams in (1, 3):
        out = equal(ours, theirs, images, num_beams=num_beams, max_length=14)
        assert set(out.sequences[..., 4:].flatten().tolist()) <= {*words, SEP, 0}


@pytest.mark.parametrize('shortest', [0, 7, 12, 16])
def test_min_length_is_kept(shortest):
    ours, _, images = make(0, 50.0, 4)  # it would end at once
    for num_beams in (1, 3):
        rows = until_end(
            generate(
                ours, image_tokens=images, num_beams=num_beams, min_length=shortest, max_length=16
            ).sequences[:, 0]
        )
        assert {len(row) for row in rows} == {min(max(5, shortest + 1), 16)}


def test_no_ngram_twice(early):
    ours, _, images = make(0, -1e4)
    for n, num_beams in itertools.product((1, 2, 3), (1, 3)):
        for row in (
            generate(ours, image_tokens=images, num_beams=num_beams, no_repeat_ngram_size=n, max_length=24)
            .sequences[:, 0]
            .tolist()
        ):
            grams = [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]
            assert len(grams) == len(set(grams))


def test_dropout_is_off_in_either_mode():
    torch.manual_seed(0)
    ours = Captioner(
        CaptionerConfig.tiny(
            decoder=DecoderConfig.tiny(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
        )
    )
    images = torch.randn(2, ours.encoder.num_tokens, 64)
    out = [
        generate(ours.train(mode), image_tokens=images, num_beams=2, max_length=8) for mode in (True, False)
    ]
    assert torch.equal(out[0].sequences, out[1].sequences) and torch.equal(out[0].scores, out[1].scores)


def test_the_model_is_left_as_it_was():
    ours = Captioner(CaptionerConfig.tiny())
    ours.train()
    ours.encoder.backbone.eval()  # a frozen part keeps its own mode
    modes, types = [m.training for m in ours.modules()], [type(m) for m in ours.modules()]
    state = {k: v.clone() for k, v in ours.state_dict().items()}
    generate(ours, torch.randn(2, 3, 64, 64), num_beams=2, max_length=8)
    assert [m.training for m in ours.modules()] == modes and [type(m) for m in ours.modules()] == types
    for k, v in ours.state_dict().items():
        assert torch.equal(v, state[k])
    ours(
        torch.randn(2, 3, 64, 64), *[ours.tokenizer(['a dog', 'a cat'])[k] for k in ('input_ids', 'labels')]
    ).loss.backward()


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize(
    'options',
    [
        dict(),
        dict(temperature=0.5),
        dict(top_k=3),
        dict(top_p=0.6),
        dict(temperature=2.0, top_k=6, top_p=0.7),
    ],
)
def test_draws_follow_the_exact_probabilities(options):
    ours, _, images = make(2, 2.0, 1)
    ours.set_output_vocabulary(range(3000, 3010))
    with torch.inference_mode():
        prompt = torch.tensor([PROMPT])
        logits = NextToken(ours, images)(prompt) / options.get('temperature', 1.0)
    if 'top_k' in options:
        logits = TopKLogitsWarper(options['top_k'])(None, logits)
    if 'top_p' in options:
        logits = TopPLogitsWarper(options['top_p'])(None, logits)
    expected = logits.softmax(-1)[0] * 4000
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat(
        [
            generate(
                ours,
                image_tokens=images.expand(1000, -1, -1),
                do_sample=True,
                max_length=5,
                generator=generator,
                **options,
            ).sequences[:, 0, 4]
            for _ in range(4)
        ]
    )
    counts = torch.stack([(drawn == token).sum() for token in ours.output_ids]).float()
    assert counts.sum() == 4000
    possible = expected > 0
    assert not counts[~possible].any(), 'a word was drawn that the filters had dropped'
    freedom = int(possible.sum()) - 1
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert statistic < freedom + 4 * math.sqrt(2 * freedom), 'chi-square, four deviations above its mean'


def test_the_same_generator_draws_the_same(early):
    ours, _, images = early
    draw = lambda seed, **kw: generate(
        ours,
        image_tokens=images,
        do_sample=True,
        max_length=14,
        generator=torch.Generator().manual_seed(seed),
        **kw,
    )
    a, b, c = draw(0), draw(0), draw(1)
    assert torch.equal(a.sequences, b.sequences) and torch.equal(a.token_logprobs, b.token_logprobs)
    assert a.sequences.shape != c.sequences.shape or not torch.equal(a.sequences, c.sequences)
    best = generate(ours, image_tokens=images, max_length=14)
    assert torch.equal(draw(0, top_k=1).sequences, best.sequences)
    assert torch.equal(draw(0, top_p=1e-9).sequences, best.sequences)


@pytest.mark.parametrize('returns', [1, 3])
def test_an_image_with_its_own_generator_is_drawn_alike_in_any_company(returns):
    ours, _, images = make(5, 0.5)
    ours.set_output_vocabulary(range(3000, 3012))
    options = dict(do_sample=True, max_length=14, top_p=0.95, num_return_sequences=returns)

    def draw(order):
        out = generate(
            ours,
            image_tokens=images[order],
            generator=[torch.Generator().manual_seed(i) for i in order],
            **options,
        )
        return {i: until_end(rows) for i, rows in zip(order, out.sequences)}

    together = draw(list(range(8)))
    for order in ([0], [5], [3, 0, 6], [7, 1, 5, 2, 0, 4, 6]):
        for i, rows in draw(order).items():
            assert rows == together[i]
    if returns > 1:
        assert any(rows[0] != rows[1] for rows in together.values()), 'draws of one image must differ'
    assert len({len(row) for rows in together.values() for row in rows}) > 2, (
        'captions must leave the batch at different steps'
    )


def test_its_own_generator_draws_from_the_exact_probabilities():
    ours, _, images = make(2, 2.0, 1)
    ours.set_output_vocabulary(range(3000, 3010))
    expected = NextToken(ours, images)(torch.tensor([PROMPT])).detach().softmax(-1)[0] * 4000
    out = generate(
        ours,
        image_tokens=images,
        do_sample=True,
        max_length=5,
        generator=[torch.Generator().manual_seed(0)],
        num_return_sequences=4000,
    )
    counts = torch.stack([(out.sequences[0, :, 4] == token).sum() for token in ours.output_ids]).float()
    freedom = len(expected) - 1
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 4 * math.sqrt(2 * freedom)


def test_several_draws_leave_the_image_where_it_is(early, monkeypatch):
    ours, _, images = early
    seen = []
    original = BertDecoder.new_cache
    monkeypatch.setattr(
        BertDecoder,
        'new_cache',
        lambda decoder, tokens: seen.append(len(tokens)) or original(decoder, tokens),
    )
    out = generate(
        ours,
        image_tokens=images,
        do_sample=True,
        num_return_sequences=5,
        max_length=9,
        output_attentions=True,
    )
    assert out.sequences.shape[:2] == (8, 5) and seen == [8, 8]  # once for the search, once for the attention


def test_top_p_at_the_exact_border():
    assert (
        keep_top_p(torch.zeros(1, 2), 0.5) > -torch.inf
    ).sum() == 1  # one word of two already holds a half
    assert (keep_top_p(torch.zeros(1, 4), 0.75) > -torch.inf).sum() == 3


rows_of_logits = st.integers(0, 10**6).map(
    lambda seed: torch.randn(4, 1 + seed % 60, generator=torch.Generator().manual_seed(seed)) * (1 + seed % 5)
)


@given(rows_of_logits, st.floats(0.01, 0.99))
@settings(max_examples=80, deadline=None)
def test_top_p_equals_transformers(logits, p):
    assert_close(keep_top_p(logits, p), TopPLogitsWarper(p)(None, logits))
    assert (keep_top_p(logits, p) > -torch.inf).any(-1).all()


@given(rows_of_logits, st.floats(0.0, 1.0))
@settings(max_examples=80, deadline=None)
def test_min_p_equals_transformers(logits, p):
    assert_close(keep_min_p(logits, p), MinPLogitsWarper(p)(None, logits))
    assert (keep_min_p(logits, p) > -torch.inf).any(-1).all()


@given(rows_of_logits, st.integers(1, 70))
@settings(max_examples=80, deadline=None)
def test_top_k_equals_transformers(logits, k):
    assert_close(keep_top_k(logits, k), TopKLogitsWarper(k)(None, logits))


# ---------------------------------------------------------------- refusals and front door


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(num_beams=0), 'num_beams is 0; it must be a whole number from 1 to'),
        (dict(num_beams=2.0), 'num_beams is 2.0'),
        (dict(max_length=0), "max_length is 0; it must be more than the prompt's 4 tokens and at most 64"),
        (dict(max_length=4), 'max_length is 4'),
        (dict(max_length=65), 'max_length is 65'),
        (dict(min_length=21, max_length=20), r'min_length is 21; it must be from 0 to max_length \(20\)'),
        (dict(min_length=-1), 'min_length is -1'),
        (dict(temperature=0.0), 'temperature is 0.0; it must be a number from 1e-06 to 100'),
        (dict(top_p=0.0), 'top_p is 0.0'),
        (dict(top_p=1.1), 'top_p is 1.1'),
        (dict(top_k=-1), 'top_k is -1'),
        (dict(no_repeat_ngram_size=-1), 'no_repeat_ngram_size is -1'),
        (dict(early_stopping='always'), "early_stopping is 'always'"),
        (dict(num_beams=2, num_return_sequences=3), 'num_return_sequences is 3'),
        (dict(num_beams=2, do_sample=True), 'num_beams is 2; it must be 1 when do_sample is on'),
        (dict(num_return_sequences=2), 'num_return_sequences is 2'),
        (dict(do_sample=True, num_return_sequences=0), 'num_return_sequences is 0'),
        (dict(min_p=1.5), 'min_p is 1.5'),
        (dict(repetition_penalty=0.0), 'repetition_penalty is 0.0'),
        (
            dict(num_beams=6, num_beam_groups=4),
            r'num_beams is 6; it must be a multiple of num_beam_groups \(4\)',
        ),
        (dict(num_beam_groups=0), 'num_beam_groups is 0'),
        (dict(num_beams=4, num_beam_groups=2, diversity_penalty=-1.0), 'diversity_penalty is -1.0'),
        (dict(num_beams=4, diversity_penalty=1.0), 'set num_beam_groups too'),
        (
            dict(num_beams=4, num_beam_groups=2, force_words_ids=[[3899]]),
            'num_beam_groups is 2; it must be 1 when words are forced',
        ),
        (dict(force_words_ids=[[3899]]), 'num_beams is 1; it must be 2 or more when words are forced'),
        (
            dict(num_beams=2, force_words_ids=[3899]),
            'force_words_ids has 3899; it must hold lists of token ids',
        ),
        (dict(num_beams=2, force_words_ids=[[]]), r'force_words_ids has \[\]'),
        (dict(bad_words_ids=[[40000]]), r'bad_words_ids has \[40000\]'),
        (dict(bad_words_ids=['dog']), "bad_words_ids has 'dog'"),
        (
            dict(num_beams=2, force_words_ids=[[3899]], bad_words_ids=[[3899]]),
            "'dog' says 'dog', which bad_words_ids forbids; drop one of them",
        ),
        (
            dict(num_beams=2, force_words_ids=[[4937], [[2417, 3899], [3899]]], bad_words_ids=[[2417]]),
            "'red dog' says 'red', which bad_words_ids forbids",
        ),
        (
            dict(prefix='a man', bad_words_ids=[[2158]]),
            "prefix 'a man' says 'man', which bad_words_ids forbids",
        ),
        (
            dict(num_beams=2, force_words_ids=[[1037, 3899]], no_repeat_ngram_size=1),
            "force_words_ids 'a dog' repeats 1 tokens in itself or of the prompt",
        ),
        (
            dict(num_beams=2, force_words_ids=[[2417, 3899], [2417, 4937]], no_repeat_ngram_size=1),
            "'red dog' and 'red cat' share 1 tokens",
        ),
        (dict(num_beams=2, force_words_ids=[[3899, 3899, 3899]], no_repeat_ngram_size=2), 'repeats 2 tokens'),
        (
            dict(num_beams=2, force_words_ids=[[3899], [4937]], max_length=5),
            r'need 2 tokens, behind prompt and prefix there is room for 1; raise max_length \(5\)',
        ),
        (
            dict(prefix='a dog and a cat', max_length=9),
            r"prefix 'a dog and a cat' has 5 tokens, and there is room for 4; shorten it, or raise "
            r'max_length \(9\)',
        ),
        (
            dict(prefix='dog ' * 20_000, max_length=64),
            r"prefix 'dog .*\.\.\..* has 20000 tokens, and there is room for 59; shorten it$",
        ),
        (
            dict(prefix='a 😀'),
            r"prefix 'a 😀': '😀' is not among the words that this model can say; choose another word",
        ),
        (dict(prefix='犬' * 90_000), "prefix '犬"),
        (dict(length_penalty=4300), 'length_penalty is 4300; it must be a number from -10 to 10'),
        (dict(length_penalty=2**63), 'length_penalty is 9223372036854775808'),
        (dict(length_penalty=math.nan), 'length_penalty is nan'),
        (dict(min_p='2000-01-01'), "min_p is '2000-01-01'; it must be a number from 0 to 1"),
        (dict(bad_words_ids=[0, 0]), 'bad_words_ids has 0; it must hold lists of token ids'),
        (dict(bad_words_ids=[[[0]]]), r'bad_words_ids has \[\[0\]\]'),
        (dict(bad_words_ids=5), 'bad_words_ids is 5; it must be a list, or not set'),
        (dict(bad_words_ids=[[2**70]]), 'bad_words_ids has'),
        (dict(num_beams=2, force_words_ids=[[[[1]]]]), 'force_words_ids has'),
        (dict(num_beams=10**9), 'num_beams is 1000000000'),
        (dict(do_sample=True, num_return_sequences=10**9), 'num_return_sequences is 1000000000'),
        (dict(do_sample='yes'), "do_sample is 'yes'; it must be true or false"),
        (dict(temperature=1e-300), 'temperature is 1e-300'),
        (dict(top_p=math.inf), 'top_p is inf'),
        (dict(num_beams=True), 'num_beams is True'),
    ],
)
def test_settings_without_sense_are_refused(early, options, message):
    ours, _, images = early
    with pytest.raises(ValueError, match=message):
        generate(ours, image_tokens=images, **options)


def test_what_is_no_contradiction_is_not_refused(early):
    ours, _, images = early
    for options in (
        dict(force_words_ids=[[2417, 3899], [3899, 4937]], no_repeat_ngram_size=1),  # red dog cat says both
        dict(force_words_ids=[[3899], [2417, 3899]], no_repeat_ngram_size=1),
        dict(force_words_ids=[[2417, 3899]], prefix='red', no_repeat_ngram_size=1),  # begun by the prefix
        dict(force_words_ids=[[3899]], prefix='dog', no_repeat_ngram_size=1, max_length=6),
    ):  # said by the prefix
        GenerationConfig(num_beams=2, **options).check(ours)


def test_words_outside_the_output_vocabulary_are_named():
    ours = Captioner(CaptionerConfig.tiny(output_vocabulary=[2417, 3899, *range(2000, 2006)])).eval()
    assert word_ids(ours, ['red', ['dog', 'Red dog']]) == [[2417], [[3899], [2417, 3899]]]
    pixels = torch.zeros(1, 3, 64, 64)
    for options in (
        dict(force_words=['cat']),
        dict(bad_words=['red cat']),
        dict(force_words=[['dog', '😀']]),
        dict(bad_words=['']),
        dict(prefix='red cat'),
    ):
        with pytest.raises(ValueError, match='is not among the words that this model can say'):
            generate_caption(ours, pixels, **options)
    with pytest.raises(ValueError, match='put them into a list'):
        generate_caption(ours, pixels, bad_words='dog')
    assert 'dog' not in generate_caption(ours, pixels, bad_words=['dog'], max_length=9)[0]
    assert generate_caption(ours, pixels, num_beams=2, force_words=['dog'], prefix='Red', max_length=6) == [
        'red dog'
    ]


@pytest.mark.parametrize('generators', [1, 3])
def test_a_wrong_number_of_generators_is_refused(early, generators):
    ours, _, images = early
    with pytest.raises(ValueError, match=f'{generators} generators for 2 images'):
        generate(ours, image_tokens=images[:2], do_sample=True, generator=[torch.Generator()] * generators)


def test_when_no_word_is_left_it_is_said():
    ours = Captioner(CaptionerConfig.tiny(output_vocabulary=[2417, 3899, 4937])).eval()
    images = torch.randn(2, ours.encoder.num_tokens, 64)
    for options in (dict(), dict(do_sample=True)):
        with pytest.raises(ValueError, match='no word is left at position 7'):
            generate(
                ours, image_tokens=images, no_repeat_ngram_size=1, min_length=10, max_length=10, **options
            )
    with pytest.raises(ValueError, match='keep to all rules'):
        generate(ours, image_tokens=images, no_repeat_ngram_size=1, min_length=10, max_length=10, num_beams=2)


def test_more_beams_than_words_are_refused():
    ours = Captioner(
        CaptionerConfig.tiny(output_vocabulary=list(range(3000, 3009)))
    ).eval()  # 10 words with [SEP]
    with pytest.raises(ValueError, match='from 1 to 5'):
        generate(ours, torch.zeros(1, 3, 64, 64), num_beams=6)
    generate(ours, torch.zeros(1, 3, 64, 64), num_beams=5)


def test_one_image_a_string_several_a_list(tmp_path):
    ours = Captioner(CaptionerConfig.tiny()).eval()
    picture = Image.effect_noise((90, 70), 80).convert('RGB')
    picture.save(tmp_path / 'noise.png')
    pixels = process_image(picture, ours)
    assert pixels.shape == (1, 3, 64, 64)
    caption = generate_caption(ours, picture, max_length=8)
    assert isinstance(caption, str) and not caption.startswith('a picture of')
    for one in (tmp_path / 'noise.png', str(tmp_path / 'noise.png'), pixels[0]):
        assert generate_caption(ours, one, max_length=8) == caption
    for several in (
        [picture, str(tmp_path / 'noise.png')],
        [pixels[0], picture],
        pixels.expand(2, -1, -1, -1),
        (picture, picture),
    ):
        assert generate_caption(ours, several, max_length=8) == [caption, caption]
    assert generate_caption(ours, picture, max_length=8, do_sample=True, top_k=1) == generate_caption(
        ours, picture, max_length=8, num_beams=1
    )
    (tmp_path / 'text.png').write_text('no photo')
    with pytest.raises(ValueError, match='text.png'):
        generate_caption(ours, [picture, tmp_path / 'text.png'])
    with pytest.raises(FileNotFoundError, match='gone.png'):
        generate_caption(ours, tmp_path / 'gone.png')


def test_attention_belongs_to_its_image(early):
    ours, _, images = early
    ids = generate(ours, image_tokens=images, max_length=12).sequences[:, 0]
    weights = attention_weights(ours, ids, images).cross_attentions
    assert weights.shape == (8, 2, 4, ids.shape[1], images.shape[1])
    assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    assert_close(attention_weights(ours, ids[2:3], images[2:3]).cross_attentions[0], weights[2])


def test_attention_on_request_is_what_eager_attention_gives(early):
    ours, theirs, images = early
    eager = BertLMHeadModel(
        BertConfig(
            **asdict(ours.config.decoder),
            is_decoder=True,
            add_cross_attention=True,
            attn_implementation='eager',
        )
    ).eval()
    eager.load_state_dict(theirs.state_dict())
    for options in (
        dict(),
        dict(num_beams=3, num_return_sequences=2),
        dict(do_sample=True, num_return_sequences=3),
        dict(num_beams=4, num_beam_groups=2, num_return_sequences=4),
    ):
        out = generate(ours, image_tokens=images, max_length=10, output_attentions=True, **options)
        B, R, T = out.sequences.shape
        with torch.inference_mode():
            weights = eager(
                input_ids=out.sequences.flatten(0, 1)[:, :-1],
                encoder_hidden_states=images.repeat_interleave(R, 0),
                output_attentions=True,
            ).cross_attentions
        assert out.cross_attentions.shape == (B, R, 2, 4, T - 1, images.shape[1])
        assert_close(out.cross_attentions.flatten(0, 1), torch.stack(weights, 1), rtol=0, atol=1e-5)
    assert generate(ours, image_tokens=images, max_length=10).cross_attentions is None


# ---------------------------------------------------------------- diverse and forced beams, checked on paper


class Table:
    """A step that reads its probabilities from a table: words red (0), ball (1) and the full stop (2), behind
    a prompt of one token.
    """

    table = {(): [0.5, 0.4, 0.1, 0.0], (0,): [0.45, 0.3, 0.25, 0.0], (1,): [0.15, 0.05, 0.8, 0.0]}
    # 3 is never said: two beams need four words
    ids, sep, pad, dtype, rows = (torch.tensor([0, 1, 2, 3]), 2, 9, torch.float32, None)

    def __call__(self, new_ids):
        self.rows = new_ids if self.rows is None else torch.cat((self.rows, new_ids), 1)
        return torch.tensor(
            [self.table.get(tuple(ids[1:]), [0.05, 0.15, 0.8, 0.0]) for ids in self.rows.tolist()]
        ).log()

    def log_softmax(self, logits):
        return logits.log_softmax(-1)

    def select(self, rows, images=None):
        self.rows = self.rows[rows]


def on_paper(table=Table.table, **options):
    "Captions of at most three words and the probability that the search gives them."
    step = Table()
    step.table = table
    config = GenerationConfig(max_length=4, length_penalty=0.0, **options)
    forced = options.get('force_words_ids') and ForcedWords(
        options['force_words_ids'], Table.ids, 2, torch.zeros(4, dtype=torch.bool), 1
    )
    sequences, scores, _ = _beam_search(
        step, Rules(config, Table.ids, 2), forced, torch.tensor([[9], [9]]), config
    )
    assert torch.equal(sequences[0], sequences[1]) and torch.equal(
        scores[0], scores[1]
    )  # two images, the same table
    said = [' '.join(['red', 'ball', '.'][i] for i in row if i < 9) for row in sequences[0, :, 1:].tolist()]
    return [(caption, round(float(score.exp()), 5)) for caption, score in zip(said, scores[0])]


def test_diverse_beams_on_paper():
    # one group of two beams: red .5, ball .4; then "ball ." .32 ends, "red red" .225 and "red ball" .15 go
    # on; at last "red red ." .18
    assert on_paper(num_beams=2) == [('ball .', 0.32), ('red red .', 0.18)]
    # no penalty: two groups say the same; both return it
    assert on_paper(num_beams=2, num_beam_groups=2) == [('red red .', 0.18), ('red red .', 0.18)]
    # penalty 0.1: red again, .5 e^-.1 = .4524 > .4; then red again, .45 e^-.1 = .4072 > .3; the full stop
    # costs nothing: .18 e^-.2 = .14737
    assert on_paper(num_beams=2, num_beam_groups=2, diversity_penalty=0.1) == [
        ('red red .', 0.18),
        ('red red .', 0.14737),
    ]
    # penalty 0.5: .5 e^-.5 = .3033 < .4, so the second group says ball; it meets no word of the first one
    # again
    assert on_paper(num_beams=2, num_beam_groups=2, diversity_penalty=0.5) == [
        ('ball .', 0.32),
        ('red red .', 0.18),
    ]


def test_a_group_that_has_stopped_costs_nothing():
    table = {
        (): [0.5, 0.4, 0.1, 0.0],
        (0,): [0.3, 0.1, 0.6, 0.0],
        (1,): [0.1, 0.6, 0.3, 0.0],
        (0, 0): [0.1, 0.8, 0.1, 0.0],
        (1, 1): [0.4, 0.5, 0.1, 0.0],
    }
    # red, and at the price of .5 for red, ball; "red ." .3 ends and stops its group; "ball ball" .24; then
    # ball .5 is free, for "red red ball" is no longer said by anybody
    found = on_paper(table, num_beams=2, num_beam_groups=2, diversity_penalty=0.5, early_stopping=True)
    assert found == [('red .', 0.3), ('ball ball ball', 0.12)]


def test_forced_beams_on_paper():
    # red: "red" (.5, nothing missing) and "ball" (.4); "red red" .225 and, in the other bank, "ball ball"
    # .02; "red red ." .18, "red red ball" .03375
    assert on_paper(num_beams=2, force_words_ids=[[0]]) == [('red red .', 0.18), ('red red ball', 0.03375)]
    # ball: "ball" .4 and "red" .5; "ball ." .32 ends, "red red" .225 (missing) and "red ball" .15 go on; "red
    # ball ." .12
    assert on_paper(num_beams=2, force_words_ids=[[1]]) == [('ball .', 0.32), ('red ball .', 0.12)]
    # ball twice in a row fills two of three places: "ball ball" .02, then the full stop .8; and "red ball
    # ball" .5 * .3 * .15
    assert on_paper(num_beams=2, force_words_ids=[[1, 1]]) == [
        ('red ball ball', 0.0225),
        ('ball ball .', 0.016),
    ]
    # red or twice ball: the alternatives share a bank count, "red red ." is the best
    assert on_paper(num_beams=2, force_words_ids=[[[1, 1], [0]]])[0] == ('red red .', 0.18)


# ---------------------------------------------------------------- words as they come


def test_streamed_words_add_up(early):
    ours, _, _ = early
    picture = Image.effect_noise((90, 70), 80).convert('RGB')
    for options in (dict(), dict(prefix='two dogs'), dict(bad_words=['dog'], repetition_penalty=1.3)):
        pieces = list(stream_caption(ours, picture, max_length=14, **options))
        assert ''.join(pieces) == generate_caption(ours, picture, num_beams=1, max_length=14, **options)
    for seed in range(20):
        draws = lambda: [torch.Generator().manual_seed(seed)]
        pieces = list(stream_caption(ours, picture, do_sample=True, max_length=14, generator=draws()))
        assert ''.join(pieces) == generate_caption(
            ours, picture, do_sample=True, max_length=14, generator=draws()
        )
        assert len(pieces) > 1 or ' ' not in pieces[0]


def test_words_come_while_the_search_goes_on(early, monkeypatch):
    ours, _, _ = early
    steps = []
    call = NextToken.__call__
    monkeypatch.setattr(NextToken, '__call__', lambda self, ids: steps.append(1) or call(self, ids))
    ours.train()
    words = stream_caption(
        ours, Image.effect_noise((90, 70), 80).convert('RGB'), max_length=20, min_length=20
    )
    assert not steps  # nothing is computed before a word is asked for
    next(words)
    assert 1 <= len(steps) < 8
    assert ours.training and not torch.is_inference_mode_enabled()
    list(words)
    assert len(steps) == 16
    ours.eval()


def test_streaming_refuses_before_work(early):
    ours, _, _ = early
    picture = Image.new('RGB', (64, 64))
    for options, message in (
        (dict(num_beams=2), 'num_beams is 2'),
        (dict(do_sample=True, num_return_sequences=2), 'num_return_sequences is 2'),
        (dict(max_length=2), 'max_length is 2'),
    ):
        with pytest.raises(ValueError, match=message):
            stream_caption(ours, picture, **options)
    with pytest.raises(ValueError, match='one image'):
        stream_caption(ours, [picture])


marks = st.lists(
    st.sampled_from('the dogs dog ##s t s n d 3 000 1 rock clock o " \' - / . , ( ) ! : a m'.split()),
    min_size=1,
    max_size=14,
)


@given(marks)
@settings(max_examples=1500, deadline=None, derandomize=True)
def test_settled_text_is_never_taken_back(pieces):
    tokenizer = small_captioner(0, 0.0).tokenizer
    ids = tokenizer.tokenizer.convert_tokens_to_ids(pieces)
    assert tokenizer.tokenizer.unk_token_id not in ids
    whole = tokenizer.decode(ids)
    for n in range(1, len(ids)):
        assert whole.startswith(settled(tokenizer.decode(ids[:n]))), (tokenizer.decode(ids[:n]), whole)


# ---------------------------------------------------------------- the parts, checked by hand


def test_the_filters_by_hand():
    assert keep_top_k(torch.tensor([[1.0, 3.0, 2.0]]), 2).tolist() == [[-math.inf, 3.0, 2.0]]
    assert (keep_top_p(torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log(), 0.8) > -torch.inf).sum() == 3
    assert (keep_min_p(torch.tensor([[0.9, 0.06, 0.04]]).log(), 0.2) > -torch.inf).sum() == 1


def test_what_would_repeat_or_say_a_bad_word_by_hand():
    assert repeated_ngrams([[5, 7, 5], [5, 7, 9]], 2) == [[7], []]
    assert repeated_ngrams([[5, 7, 5]], 1) == [[5, 7, 5]]
    assert repeated_ngrams([[5]], 3) == [[]]
    assert bad_endings([[5, 7], [5, 8]], [[9], [7, 3]]) == [[9, 3], [9]]


def test_a_repetition_costs_what_it_costs_in_transformers():
    values, rows = torch.tensor([[2.0, 1.0, -1.0]]), torch.tensor([[0, 2, 2]])
    penalised = penalise_repetition(values, torch.tensor([[True, False, True]]), 2.0)
    assert penalised.tolist() == [[1.0, 1.0, -2.0]]
    assert_close(penalised, RepetitionPenaltyLogitsProcessor(2.0)(rows, values))


def test_rules_together_are_transformers_processors():
    columns = torch.tensor([5, 7, 9, 102])
    values = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([[1, 9, 7, 9], [1, 5, 7, 7]])
    settings = dict(no_repeat_ngram_size=2, bad_words_ids=[[5], [7, 7]], min_length=5)
    chosen_by = Rules(GenerationConfig(repetition_penalty=1.5, **settings), columns, sep=3)(values, rows)
    # 9 7 and 7 7 stand there; 5 is bad; too early for [SEP]
    assert (chosen_by == -torch.inf).tolist() == [[True, True, False, True]] * 2
    # transformers wants a column for every id
    every = torch.full((2, 103), -9.0).index_copy(1, columns, values)
    every = RepetitionPenaltyLogitsProcessor(1.5)(rows, every)
    every = NoBadWordsLogitsProcessor([[5], [7, 7]], 102)(rows, every)
    assert_close(chosen_by[:, 2], every[:, 9])
    assert every[:, 5].tolist() == [-math.inf] * 2


def test_pick_by_hand():
    probability = torch.tensor([[0.5, 0.0, 0.3, 0.2]]).expand(6, -1)
    uniform = torch.tensor([0.0, 0.49, 0.51, 0.79, 0.81, 1 - 2**-24])
    assert pick(probability, uniform).tolist() == [0, 0, 2, 2, 3, 3]


def test_a_cached_step_is_the_whole_text_at_once(early):
    ours, _, images = early
    ids = torch.tensor([PROMPT + [2417, 3899]])
    with torch.inference_mode():
        step = NextToken(ours, images[:1])
        step(ids[:, :-1])
        assert_close(step(ids[:, -1:]), ours.decoder(ids, images[:1])[:, -1], rtol=0, atol=1e-4)


def test_tokens_missing_by_hand():
    dog, t_shirt = [[3899]], [[1056, 3797]]
    said = [], [1056], [1056, 5], [1056, 3797], [1056, 3797, 3899]
    assert [tokens_missing(ids, [dog, t_shirt]) for ids in said] == [3, 2, 3, 1, 0]
    assert tokens_missing([3899, 2863], [dog], pieces={2863}) == 1  # dog ##ma
    one_of_two = [[7], [8, 9]]
    assert [tokens_missing(ids, [one_of_two]) for ids in ([], [8], [8, 9], [7])] == [1, 1, 0, 0]


def test_forced_words_by_hand():
    ids, is_piece = torch.tensor([7, 8, 9, 10, 102]), torch.tensor([False, False, False, True, False])
    forced = ForcedWords([[7], [8, 9]], ids, 4, is_piece, start=1)
    missing = forced.missing(
        torch.tensor([[101], [8], [7]])
    )  # the first token is the prompt: nothing was said
    assert missing[0].tolist() == [2, 2, 3, 3, 3]
    missing = forced.missing(torch.tensor([[101, 8], [101, 7]]))
    # 8 was begun: 9 ends it; after 7 a piece would undo it
    assert missing.tolist() == [[2, 2, 1, 3, 3], [2, 1, 2, 3, 2]]
    assert forced.fits(missing, 2).tolist() == [[True, True, True, False, False]] * 2


def plain_groups(logprobs_after, groups, penalty, max_length):
    "Greedy search, group after group; every group avoids what the earlier ones say at the same position."
    sentences = [list(PROMPT) for _ in range(groups)]
    for _ in range(len(PROMPT), max_length):
        said = 0.0
        for ids in sentences:
            if SEP in ids:
                continue
            logprobs = logprobs_after(ids)
            ids.append(int((logprobs - penalty * said).argmax()))
            if ids[-1] != SEP:
                said = said + torch.nn.functional.one_hot(torch.tensor(ids[-1]), len(logprobs))
    return sentences


def test_groups_of_one_beam_are_greedy_searches_in_turn():
    differ = 0
    for seed, penalty in itertools.product(range(2), (0.0, 0.5, 3.0)):
        ours, _, images = make(seed, 3.5, 6)
        options = dict(num_beams=3, num_beam_groups=3, num_return_sequences=3, early_stopping=True)
        out = generate(ours, image_tokens=images, diversity_penalty=penalty, max_length=10, **options)
        for image, rows in zip(images, out.sequences):
            after = lambda ids: ours.decoder(torch.tensor([ids]), image[None])[0, -1].log_softmax(-1)
            with torch.inference_mode():
                plain = plain_groups(after, 3, penalty, 10)
            assert sorted(until_end(rows)) == sorted(plain)
            differ += len({tuple(ids) for ids in plain}) == 3
    assert differ > 5, 'the groups said the same: the test says nothing'


@torch.inference_mode()
def best_by_trying(model, image, token, length):  # image (S, D)
    "The largest log-probability of a caption of at most `length` tokens that says the token."
    ids = torch.tensor(
        list(itertools.product(model.output_ids.tolist(), repeat=length))
    )  # (V'**length, length)
    rows = torch.cat((torch.tensor(PROMPT).expand(len(ids), -1), ids), 1)
    hidden, _ = model.decoder.hidden_states(rows, model.decoder.new_cache(image[None]))
    logprobs = model.decoder.logits(hidden[:, 3:-1], model.output_ids).log_softmax(-1)  # (rows, length, V')
    each = logprobs.gather(2, model.output_index[ids][..., None])[..., 0]  # (rows, length)
    end = ids == SEP
    alive = end.cumsum(1) - end.long() == 0  # up to [SEP], [SEP] included
    return float((each * alive).sum(1)[((ids == token) & alive).any(1)].max())


def test_banks_find_the_likeliest_caption_with_the_word():
    ours, _, images = make(4, 3.5, 6)
    ours.set_output_vocabulary(range(3000, 3011))
    found = 0
    for token in (3003, 3008):
        options = dict(num_beams=6, force_words_ids=[[token]], max_length=7, length_penalty=0.0)
        out = generate(ours, image_tokens=images, **options)
        assert (out.sequences == token).any(-1).all()
        best = torch.tensor([best_by_trying(ours, image, token, 3) for image in images])
        assert (out.scores[:, 0] <= best + 1e-4).all()
        found += int((out.scores[:, 0] > best - 1e-4).sum())
    assert found == 12


# ---------------------------------------------------------------- edges


def test_a_captioner_that_never_ends_stops_at_max_length():
    endless, _, images = make(0, -1e4, 6)
    out = generate(endless, image_tokens=images, num_beams=3, max_length=9)
    assert out.sequences.shape == (6, 1, 9) and not (out.sequences == SEP).any()
    endless.set_output_vocabulary(range(2000, 2050))
    out = generate(endless, image_tokens=images, num_beams=3, max_length=9, num_return_sequences=3)
    assert ((out.sequences[..., 4:] >= 2000) & (out.sequences[..., 4:] < 2050)).all()
    assert (out.scores.diff(dim=1) <= 0).all()  # the best first


def test_a_captioner_that_ends_at_once_says_nothing():
    mute, _, images = make(0, 1e4, 6)
    out = generate(mute, image_tokens=images, max_length=9)
    assert mute.tokenizer.decode_batch(out.sequences[:, 0]) == [''] * 6
    assert out.token_logprobs.shape == (6, 1, 1)


def test_an_image_alone_is_captioned_as_in_company(early):
    ours, _, images = early
    together = generate(ours, image_tokens=images, num_beams=3, max_length=14)
    for i in range(len(images)):
        alone = generate(ours, image_tokens=images[i : i + 1], num_beams=3, max_length=14)
        assert until_end(alone.sequences[0]) == until_end(together.sequences[i])
        assert_close(alone.scores[0], together.scores[i], rtol=0, atol=1e-4)


def test_a_low_temperature_is_greedy(early):
    ours, _, images = early
    greedy = generate(ours, image_tokens=images, max_length=14).sequences
    drawn = generate(ours, image_tokens=images, max_length=14, do_sample=True, temperature=1e-6).sequences
    assert torch.equal(drawn, greedy)


def test_the_request_itself_is_checked(early):
    ours, _, images = early
    assert GenerationConfig().check(ours).max_length == ours.config.max_length
    with pytest.raises(ValueError, match='config or options, not both'):
        generate(ours, image_tokens=images, config=GenerationConfig(), num_beams=3)
    with pytest.raises(ValueError, match='give pixel_values'):
        generate(ours)
    pixels = torch.zeros(2, 3, 64, 64)
    with pytest.raises(ValueError, match='no images'):
        generate_caption(ours, [])
    with pytest.raises(ValueError, match='different shapes'):
        process_image([pixels[0], pixels[0, :, :16]], ours)
    with pytest.raises(FileNotFoundError, match='no_such_photo.jpg: no such image file'):
        generate_caption(ours, 'no_such_photo.jpg')
    with pytest.raises(ValueError, match='a beam search may take them back'):
        stream_caption(ours, pixels[0], num_beams=3)
    first, _ = generate_caption(ours, pixels, max_length=8, num_return_sequences=2)[1]
    assert first == generate_caption(ours, pixels[1], max_length=8)


def test_a_forced_word_that_cannot_be_said_is_named():
    ours = Captioner(CaptionerConfig.tiny(output_vocabulary=[1037, 2417, *range(2000, 2006)]))
    for options, message in (
        (dict(force_words_ids=[[3682]]), 'is not among the words that this model can say'),
        (dict(force_words_ids=[[1037, 2417]], no_repeat_ngram_size=1), 'no_repeat_ngram_size=1 forbids'),
        (dict(force_words_ids=[[2417]], bad_words_ids=[[2417]]), "'red', which bad_words_ids forbids"),
    ):
        with pytest.raises(ValueError, match=message):
            GenerationConfig(num_beams=2, **options).check(ours)
    with pytest.raises(ValueError, match="prefix 'a red' says 'red'"):
        GenerationConfig(prefix='a red', bad_words_ids=[[2417]]).check(ours)


def cut_text(tokenizer, ids):
    "Decode everything, then drop as many characters as the prompt was typed with."
    text = tokenizer.tokenizer.decode(ids, skip_special_tokens=True)
    return text[len(tokenizer.prompt) :].strip()


def cut_ids(tokenizer, ids):
    "Drop as many ids as the prompt has characters."
    return tokenizer.tokenizer.decode(ids[len(tokenizer.prompt) :], skip_special_tokens=True).strip()


def survives(decode, prompt, caption):
    "Does a caption come out as it went in, behind this prompt?"
    tokenizer = CaptionTokenizer(prompt=prompt)
    return decode(tokenizer, tokenizer([caption])['input_ids'][0].tolist()).replace(' ,', ',') == caption


def test_a_prompt_is_cut_off_as_tokens():
    "Bug 4: by characters it works for the plain prompt, which is why nobody notices."
    prompts = 'a picture of', "it's a picture of", 'photo:', 'a  picture of'
    captions = 'a small red ring on its own', 'one shape, a blue moon'
    for prompt, caption in itertools.product(prompts, captions):
        assert survives(lambda tokenizer, ids: tokenizer.decode(ids), prompt, caption)
    for caption in captions:
        assert not survives(cut_ids, 'a picture of', caption)
        assert survives(cut_text, 'a picture of', caption) and not survives(cut_text, prompts[1], caption)


def test_what_is_settled_by_hand():
    texts = ['two', 'two dogs', 'two dogs,', "the dogs'", "the dogs' t", 'a sign " stop s', 'a sign "stop" i']
    assert [settled(text) for text in texts] == ['', 'two', 'two', '', "the dogs'", 'a sign', 'a sign "stop"']


def test_photos_are_read_the_same_way_in_another_process():
    "Loaders start processes that get the transform as a pickle; it is `image_transform`'s to the bit."
    model = Captioner(CaptionerConfig.tiny())
    photo = Image.linear_gradient('L').convert('RGB')
    there = pickle.loads(pickle.dumps(model.photo_transform()))
    assert torch.equal(there(photo), image_transform(model.config.encoder)(photo))


@pytest.mark.parametrize('size, pieces', [(288, [4, 2]), (64, [6]), (640, [1] * 6)])
def test_a_processor_encodes_as_many_images_at_a_time_as_its_cache_holds(size, pieces, monkeypatch):
    model = Captioner(CaptionerConfig.tiny()).eval()
    pixel_values = torch.randn(6, 3, size, size)
    seen = []
    encode_image = Captioner.encode_image

    def noted(self, pixel_values):
        seen.append(len(pixel_values))
        return encode_image(self, pixel_values)

    with torch.inference_mode():
        want = model.encode_image(pixel_values)
        monkeypatch.setattr(Captioner, 'encode_image', noted)
        assert_close(encode_in_pieces(model, pixel_values), want)
    assert seen == pieces
    generate(model, pixel_values)  # takes the same way
    assert seen == pieces * 2
