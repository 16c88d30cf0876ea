"""The rewards against pycocoevalcap's formula and by hand, the gradient against that of the expected reward,
and a resumed run
"""

import math
from types import SimpleNamespace

import pytest, torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

from pvtblip.training import Collate
from pvtblip.decoder import Captioner, CaptionerConfig, DecoderConfig
from pvtblip.evaluation import has_coco_code
from pvtblip.generation import generate
from pvtblip.practice import checkpoint_gradients
from pvtblip.pvt_encoder import EncoderConfig, image_transform
from pvtblip.reward import (
    CiderReward,
    RewardMeter,
    add_rewards,
    bleu,
    caption_rows,
    leave_one_out,
    reward_loader,
    sampled_batch,
)
from pvtblip.shapes import ShapesDataset
from pvtblip.training import TrainingConfig, _loader, make_accelerator, train, training_step

SENTENCE = st.lists(st.sampled_from('a red dog and two men on the grass'.split()), max_size=12)


@pytest.fixture
def world():
    torch.manual_seed(0)
    config = CaptionerConfig.tiny(encoder=EncoderConfig.tiny(image_size=32, stages=(0,)))
    shapes = ShapesDataset(
        length=40, transform=image_transform(config.encoder), image_size=32, captions_per_image=3
    )
    model = Captioner(config).eval()
    ids = model.tokenizer([caption for i in range(40) for caption in shapes[i]['captions']])['input_ids']
    model.set_output_vocabulary(set(ids.unique().tolist()) - {model.tokenizer.pad_token_id})
    people = [
        caption_rows(model.tokenizer(shapes[i]['captions'])['input_ids'], model.tokenizer) for i in range(40)
    ]
    return model, shapes, CiderReward(people)


@pytest.mark.skipif(not has_coco_code(), reason='pycocoevalcap is an extra')
@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(SENTENCE, st.lists(SENTENCE, min_size=1, max_size=4)), min_size=2, max_size=8))
def test_cider_is_the_librarys(images):
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    theirs = CiderScorer()
    for said, people in images:
        theirs += (' '.join(said), [' '.join(row) for row in people])
    if not theirs.crefs or not any(ref for refs in theirs.crefs for ref in refs):
        return  # the library cannot score where nobody said anything
    reward = CiderReward([people for _, people in images])
    assert_close(
        torch.tensor([reward(*image) for image in images], dtype=torch.float64),
        torch.tensor(theirs.compute_score()[1]),
        atol=1e-9,
        rtol=0,
    )


def test_weights_multiply_each_rows_loss(world):
    model, shapes, _ = world
    batch = Collate(model.tokenizer)([shapes[0], shapes[1]])
    weights = torch.randn(6)
    loss = model(batch['pixel_values'], batch['input_ids'], batch['labels'], weights).loss
    logits = model.decoder(batch['input_ids'], model.encode_image(batch['pixel_values']))[
        :, :-1, model.output_ids
    ]
    labels = batch['labels'][:, 1:]
    sums = [
        weights[row]
        * F.cross_entropy(
            logits[row][labels[row] != -100],
            model.output_index[labels[row][labels[row] != -100]],
            reduction='sum',
        )
        for row in range(6)
    ]
    assert_close(loss, sum(sums) / (labels != -100).sum(), atol=1e-5, rtol=1e-5)
    assert_close(
        model(batch['pixel_values'], batch['input_ids'], batch['labels'], torch.ones(6)).loss,
        model(batch['pixel_values'], batch['input_ids'], batch['labels']).loss,
    )


def test_a_sampled_batch_is_learnt_from_as_it_was_drawn(world):
    model, shapes, reward = world
    batch = Collate(model.tokenizer)([shapes[i] for i in range(8)])
    drawn = sampled_batch(model, batch, reward, torch.Generator().manual_seed(3))
    start = model.tokenizer.prompt_length
    assert (
        drawn['input_ids'].shape == drawn['labels'].shape == drawn['attention_mask'].shape
        and len(drawn['weights']) == len(drawn['input_ids']) == 24
    )
    for ids, labels, row in zip(
        drawn['input_ids'], drawn['labels'], caption_rows(drawn['input_ids'], model.tokenizer)
    ):
        assert labels[labels != -100].tolist() == row == ids[start : start + len(row)].tolist()
        assert model.tokenizer.sep_token_id not in row[:-1]
    assert_close(drawn['weights'].view(8, 3).sum(1), torch.zeros(8), atol=1e-4, rtol=0)
    assert not drawn['input_ids'].is_inference() and not drawn['weights'].is_inference()


def test_killed_and_resumed_it_draws_the_same(world, tmp_path):
    model, shapes, reward = world
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    config = TrainingConfig(
        max_steps=6,
        batch_size=4,
        learning_rate=1e-3,
        logging_steps=3,
        save_steps=3,
        gradient_accumulation_steps=2,
    )

    def run(folder, stop=None, resume=False):
        if not resume:
            model.load_state_dict(weights)

        def loader(step, accelerator):
            return accelerator.prepare(_loader(shapes, model.tokenizer, config, step, 1))

        rewarded = reward_loader(model, loader, reward, accumulate=2, seed=1)

        def killed(step, accelerator):
            for i, batch in enumerate(rewarded(step, accelerator)):
                if i == stop:
                    raise KeyboardInterrupt
                yield batch

        history = train(
            model, shapes, config, folder, resume, progress=False, callbacks=[RewardMeter()], loader=killed
        )
        return {k: v.clone() for k, v in model.state_dict().items()}, [entry['reward'] for entry in history]

    whole, rewards = run(tmp_path / 'whole')
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / 'cut', stop=8)
    again, rewards_again = run(tmp_path / 'cut', resume=True)
    assert rewards == rewards_again and all(torch.equal(whole[k], again[k]) for k in whole)
    assert any(not torch.equal(whole[k], weights[k]) for k in whole)


def test_one_caption_has_no_others():
    with pytest.raises(ValueError, match='sample two or more'):
        leave_one_out(torch.rand(3, 1))
    with pytest.raises(ValueError, match='too few'):
        CiderReward([[[1, 2]]])


@pytest.fixture
def toy():
    """A captioner of two words with all that blurs its probabilities, in training mode, and all that it can
    say: (model, pixels, rows).
    """
    torch.manual_seed(0)
    eyes = EncoderConfig.tiny(image_size=32, stages=(0,))
    eyes.backbone_kwargs['drop_path_rate'] = 0.5
    mouth = DecoderConfig.tiny(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
    model = Captioner(
        CaptionerConfig.tiny(encoder=eyes, decoder=mouth, label_smoothing=0.1, word_dropout=0.5)
    ).double()
    red, blue = model.tokenizer.tokenizer.convert_tokens_to_ids(['red', 'blue'])
    end, prompt = model.tokenizer.sep_token_id, model.tokenizer.prompt_ids
    model.set_output_vocabulary([red, blue])
    # cut at two words, or ended
    said = [[end, 0]] + [[first, second] for first in (red, blue) for second in (red, blue, end)]
    return (
        model.train(),
        torch.rand(1, 3, 32, 32, dtype=torch.double),
        torch.tensor([prompt + words for words in said]),
    )


def drawn_labels(model, rows):
    "Everything behind the prompt; padding is what follows the first row's end."
    P = model.tokenizer.prompt_length
    labels = rows.clone()
    labels[:, :P] = -100
    labels[rows == model.tokenizer.pad_token_id] = -100
    return labels


def logs(model, pixels, rows):
    "log p of each whole row, in evaluation mode, from the decoder's plain logits: (N,)."
    P = model.tokenizer.prompt_length
    logits = model.decoder(rows, model.encode_image(pixels))[:, P - 1 : -1, model.output_ids].log_softmax(-1)
    columns = model.output_index[rows[:, P:]]
    return (logits.gather(-1, columns.clamp(min=0)[..., None])[..., 0] * (columns >= 0)).sum(1)


def gradients(model, loss):
    names, parameters = zip(*((name, p) for name, p in model.named_parameters()))
    return {
        name: g
        for name, g in zip(names, torch.autograd.grad(loss, parameters, allow_unused=True))
        if g is not None
    }


def test_the_gradient_is_that_of_the_expected_reward(toy):
    """All seven captions of a toy, each as often as it is drawn: the loss gives the gradient of the mean
    reward, whatever the config.
    """
    model, pixels, rows = toy
    model.requires_grad_(True)
    labels = drawn_labels(model, rows)
    pay = torch.tensor([0.0, 3.0, 1.0, 2.0, -1.0, 5.0, 0.5], dtype=torch.double)
    with torch.no_grad():
        p = logs(model.eval(), pixels, rows).exp()
    assert_close(p.sum(), torch.ones((), dtype=torch.double))
    exact = gradients(model, -(logs(model, pixels, rows).exp() * pay).sum())
    tokens = (labels != -100).sum()
    learnt = gradients(model.train(), model(pixels, rows, labels, p * (pay - (p * pay).sum())).loss * tokens)
    assert exact.keys() == learnt.keys()
    for name in exact:
        assert_close(learnt[name], exact[name], atol=1e-7, rtol=1e-5)  # the loss itself is in float32
    assert model.training and all(module.training for module in model.decoder.modules())


def test_the_gradient_of_one_word_by_hand(toy):
    """d log p(i) / d bias = onehot(i) - p: captions of one word, so that the head's bias is the policy's own
    logit.
    """
    model, pixels, rows = toy
    P = model.tokenizer.prompt_length
    rows = rows[[0, 1, 4], : P + 1]  # [SEP], red, blue
    with torch.no_grad():
        p = logs(model.eval(), pixels, rows).exp()
    pay = torch.tensor([1.0, 4.0, 2.0], dtype=torch.double)
    by_hand = -sum(p[i] * pay[i] * (torch.eye(3)[i] - p) for i in range(3)) / 3  # mean over three labels
    labels = rows.clone()
    labels[:, :P] = -100
    bias = gradients(model.train(), model(pixels, rows, labels, p * pay).loss)['decoder.cls.predictions.bias']
    assert_close(bias[rows[:, P]], by_hand, atol=1e-7, rtol=1e-5)


def test_people_are_still_learnt_from_with_everything(toy):
    """Smoothing, hidden words and dropout belong to people's captions: without weights each forward pass
    differs.
    """
    model, pixels, rows = toy
    labels = drawn_labels(model, rows)
    first, second = (model(pixels, rows, labels).loss.item() for _ in range(2))
    assert first != second
    clean = model.eval()(pixels, rows, labels, torch.ones(len(rows))).loss
    smoothed = model(pixels, rows, labels).loss
    model.config.label_smoothing = 0.0
    assert_close(model(pixels, rows, labels).loss, clean)
    assert abs(smoothed - clean) > 1e-5


@pytest.mark.parametrize('checkpointing', [False, True])
@pytest.mark.parametrize('encoder', ['pvt', 'timm'])
def test_a_step_learns_from_the_probabilities_that_drew(checkpointing, encoder):
    """Two micro-batches through `training_step` with everything on: the gradient is that of -weight *
    log p with the very
    log-probabilities of `generate`; modes and BatchNorm's statistics stay."""
    torch.manual_seed(0)
    eyes = (
        EncoderConfig.tiny(image_size=32, stages=(0,))
        if encoder == 'pvt'
        else EncoderConfig(
            name='mobilenetv2_100', image_size=32, stages=(-1,), backbone_kwargs=dict(drop_path_rate=0.5)
        )
    )
    mouth = DecoderConfig.tiny(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
    model = Captioner(
        CaptionerConfig.tiny(encoder=eyes, decoder=mouth, label_smoothing=0.1, word_dropout=0.5, max_length=8)
    )
    shapes = ShapesDataset(length=8, transform=image_transform(eyes), image_size=32, captions_per_image=3)
    ids = model.tokenizer([caption for i in range(8) for caption in shapes[i]['captions']])['input_ids']
    model.set_output_vocabulary(set(ids.unique().tolist()) - {model.tokenizer.pad_token_id})
    if checkpointing:
        checkpoint_gradients(model)
    model.train()
    people = [Collate(model.tokenizer)([shapes[i] for i in some]) for some in ((0, 1, 2), (3, 4))]
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers() if 'running' in name}

    def chance(i):
        return torch.Generator().manual_seed(i)

    def reward(row, references):
        return float(row[0] % 7)

    draws = [sampled_batch(model, batch, reward, chance(i)) for i, batch in enumerate(people)]
    drawn = [
        generate(model, batch['pixel_values'], do_sample=True, num_return_sequences=3, generator=chance(i))
        for i, batch in enumerate(people)
    ]
    total = sum((batch['labels'] != -100).sum() for batch in draws)
    sums = [found.token_logprobs.flatten(0, 1).sum(1) for found in drawn]
    expected = -sum((batch['weights'] * logs).sum() for batch, logs in zip(draws, sums)) / total
    # by hand, in evaluation mode
    model.eval()
    by_hand = 0.0
    for batch in draws:
        logits = model.decoder(batch['input_ids'], model.encode_image(batch['pixel_values']))[
            :, :-1, model.output_ids
        ]
        labels = batch['labels'][:, 1:]
        logits = logits.log_softmax(-1)
        said = logits.gather(-1, model.output_index[labels.clamp(min=0)].clamp(min=0)[..., None])[..., 0] * (
            labels != -100
        )
        by_hand = by_hand - (batch['weights'] * said.sum(1)).sum() / total
    assert_close(by_hand, expected, atol=1e-5, rtol=1e-4)
    exact = gradients(model, by_hand)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    # the step
    model.train()
    accelerator = make_accelerator(TrainingConfig())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loss = training_step(
        accelerator, model, [*draws, dict(broken=[])], optimizer, TrainingConfig(max_grad_norm=1e9)
    )
    assert_close(loss, expected, atol=1e-5, rtol=1e-4)
    for name, p in model.named_parameters():
        if name in exact:
            assert_close(before[name] - p.detach(), exact[name], atol=2e-5, rtol=1e-3)
    assert model.training and all(module.training for module in model.modules())
    assert all(
        torch.equal(buffer, statistics[name]) for name, buffer in model.named_buffers() if name in statistics
    )


def test_own_and_peoples_captions_in_one_step(world):
    """Only the batch with weights is learnt in evaluation mode: what comes after it in the same step has its
    dropout.
    """
    model, shapes, reward = world
    people = Collate(model.tokenizer)([shapes[0], shapes[1]])
    modes = []
    plain = model.forward

    def noted(*args):
        modes.append(model.decoder.training)
        return plain(*args)

    model.train().forward = noted
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    batches = [sampled_batch(model, people, reward), people]
    training_step(make_accelerator(TrainingConfig()), model, batches, optimizer, TrainingConfig())
    assert modes == [False, True] and model.training


def test_all_that_was_drawn_is_learnt_and_no_more(monkeypatch):
    """A row cut at max_length has no [SEP] and is learnt to its end, also where [PAD] was drawn in it; behind
    a [SEP] nothing is.
    """
    config = CaptionerConfig.tiny(encoder=EncoderConfig.tiny(image_size=32, stages=(0,)))
    model = Captioner(config)
    tokenizer, P = model.tokenizer, model.tokenizer.prompt_length
    red = tokenizer.tokenizer.convert_tokens_to_ids('red')
    end = tokenizer.sep_token_id
    pad = tokenizer.pad_token_id
    said = torch.tensor([[red, pad, red], [red, end, pad], [end, pad, pad], [red, red, end]])
    rows = torch.cat([torch.tensor([tokenizer.prompt_ids] * 4), said], 1)
    monkeypatch.setattr(
        'pvtblip.reward.generate', lambda *args, **kwargs: SimpleNamespace(sequences=rows[None])
    )
    batch = dict(
        pixel_values=torch.zeros(1, 3, 32, 32), input_ids=tokenizer(['a', 'b', 'c', 'd'])['input_ids']
    )
    drawn = sampled_batch(model, batch, lambda row, references: float(len(row)))
    learnt = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]]).bool()
    assert (
        torch.equal(drawn['labels'][:, P:], said.masked_fill(~learnt, -100))
        and (drawn['labels'][:, :P] == -100).all()
    )
    assert torch.equal(drawn['attention_mask'][:, P:].bool(), learnt) and drawn['attention_mask'][:, :P].all()


def test_the_draw_leaves_the_mode(world):
    model, shapes, reward = world
    batch = Collate(model.tokenizer)([shapes[0]])
    for mode in (True, False):
        sampled_batch(model.train(mode), batch, reward)
        assert all(module.training is mode for module in model.modules())


@pytest.mark.parametrize(
    'said, people, expected',
    [
        ('a b c d e', ['a b c d e'], 1.0),
        ('a b c d', ['a b c e'], (3 / 4 * (2 + 1) / (3 + 1) * (1 + 1) / (2 + 1) * (0 + 1) / (1 + 1)) ** 0.25),
        ('a b', ['a b c d'], math.exp(1 - 4 / 2)),  # all right, half as long
        ('a b', ['a b c', 'a'], 1.0),  # as near to one as to three words: the shorter counts
        (
            'a a a',
            ['a b', 'b a a'],
            (2 / 3 * (1 + 1) / (2 + 1) * (0 + 1) / (1 + 1)) ** 0.25,
        ),  # two a's at most in one caption, and 'a a' once
        ('x y', ['a b'], 0.0),
        ('', ['a b'], 0.0),
    ],
)
def test_bleu_by_hand(said, people, expected):
    assert math.isclose(bleu(said.split(), [row.split() for row in people]), expected, abs_tol=1e-12)


@settings(max_examples=100, deadline=None)
@given(SENTENCE, st.lists(SENTENCE.filter(bool), min_size=1, max_size=4))
def test_bleu_is_a_share(said, people):
    "From 0 to 1; 1 for what somebody said."
    assert 0 <= bleu(said, people) <= 1 and math.isclose(bleu(people[0], people), 1.0)


def test_breaking_off_costs_because_the_end_counts():
    "'a man in a [SEP]' has a run that nobody said; both rewards see the end."
    people = [
        ['a man in a hat [SEP]'.split(), 'a man with a hat [SEP]'.split()],
        ['a dog on the grass [SEP]'.split()],
    ]
    for reward in (CiderReward(people), bleu):
        off, whole = (
            reward(said.split(), people[0]) for said in ('a man in a [SEP]', 'a man in a hat [SEP]')
        )
        assert off < whole
    cut, ended = (bleu(said.split(), people[0]) for said in ('a man in a', 'a man in a [SEP]'))
    assert cut != ended


def test_rewards_add_up():
    reward = add_rewards((1.0, lambda row, references: 2.0), (0.5, lambda row, references: float(len(row))))
    assert reward(['a', 'b', 'c'], []) == 3.5
