"The reward of `pvtblip.reward` against pycocoevalcap's formula, the weighted loss by hand, and a resumed run"
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

from pvtblip.data import Collate
from pvtblip.decoder import Captioner, CaptionerConfig, DecoderConfig
from pvtblip.evaluation import has_coco_code
from pvtblip.pvt_encoder import EncoderConfig, image_transform
from pvtblip.reward import CiderReward, RewardMeter, caption_rows, leave_one_out, reward_loader, sampled_batch
from pvtblip.shapes import ShapesDataset
from pvtblip.training import TrainingConfig, _loader, train

SENTENCE = st.lists(st.sampled_from('a red dog and two men on the grass'.split()), max_size=12)


@pytest.fixture
def world():
    torch.manual_seed(0)
    config = CaptionerConfig.tiny(encoder=EncoderConfig.tiny(image_size=32, stages=(0,)))
    shapes = ShapesDataset(length=40, transform=image_transform(config.encoder), image_size=32, captions_per_image=3)
    model = Captioner(config).eval()
    ids = model.tokenizer([caption for i in range(40) for caption in shapes[i]['captions']])['input_ids']
    model.set_output_vocabulary(set(ids.unique().tolist()) - {model.tokenizer.pad_token_id})
    people = [caption_rows(model.tokenizer(shapes[i]['captions'])['input_ids'], model.tokenizer) for i in range(40)]
    return model, shapes, CiderReward(people)


@pytest.mark.skipif(not has_coco_code(), reason='pycocoevalcap is an extra')
@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(SENTENCE, st.lists(SENTENCE, min_size=1, max_size=4)), min_size=2, max_size=8))
def test_cider_is_the_librarys(images):
    from pycocoevalcap.cider.cider_scorer import CiderScorer
    theirs = CiderScorer()
    for said, people in images: theirs += (' '.join(said), [' '.join(row) for row in people])
    if not theirs.crefs or not any(ref for refs in theirs.crefs for ref in refs): return      # the library cannot score where nobody said anything
    reward = CiderReward([people for _, people in images])
    assert_close(torch.tensor([reward(*image) for image in images], dtype=torch.float64), torch.tensor(theirs.compute_score()[1]), atol=1e-9, rtol=0)


def test_weights_multiply_each_rows_loss(world):
    model, shapes, _ = world
    batch, weights = Collate(model.tokenizer)([shapes[0], shapes[1]]), torch.randn(6)
    loss = model(batch['pixel_values'], batch['input_ids'], batch['labels'], weights).loss
    logits = model.decoder(batch['input_ids'], model.encode_image(batch['pixel_values']))[:, :-1, model.output_ids]
    labels = batch['labels'][:, 1:]
    sums = [weights[row] * F.cross_entropy(logits[row][labels[row] != -100], model.output_index[labels[row][labels[row] != -100]], reduction='sum') for row in range(6)]
    assert_close(loss, sum(sums) / (labels != -100).sum(), atol=1e-5, rtol=1e-5)
    assert_close(model(batch['pixel_values'], batch['input_ids'], batch['labels'], torch.ones(6)).loss, model(batch['pixel_values'], batch['input_ids'], batch['labels']).loss)


def test_a_sampled_batch_is_learnt_from_as_it_was_drawn(world):
    model, shapes, reward = world
    batch = Collate(model.tokenizer)([shapes[i] for i in range(8)])
    drawn = sampled_batch(model, batch, reward, torch.Generator().manual_seed(3))
    start = model.tokenizer.prompt_length
    assert drawn['input_ids'].shape == drawn['labels'].shape == drawn['attention_mask'].shape and len(drawn['weights']) == len(drawn['input_ids']) == 24
    for ids, labels, row in zip(drawn['input_ids'], drawn['labels'], caption_rows(drawn['input_ids'], model.tokenizer)):
        assert labels[labels != -100].tolist() == row == ids[start:start+len(row)].tolist()
        assert model.tokenizer.sep_token_id not in row[:-1]
    assert_close(drawn['weights'].view(8, 3).sum(1), torch.zeros(8), atol=1e-4, rtol=0)
    assert not drawn['input_ids'].is_inference() and not drawn['weights'].is_inference()


def test_killed_and_resumed_it_draws_the_same(world, tmp_path):
    model, shapes, reward = world
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    config = TrainingConfig(max_steps=6, batch_size=4, learning_rate=1e-3, logging_steps=3, save_steps=3, gradient_accumulation_steps=2)

    def run(folder, stop=None, resume=False):
        if not resume: model.load_state_dict(weights)
        def loader(step, accelerator): return accelerator.prepare(_loader(shapes, model.tokenizer, config, step, 1))
        rewarded = reward_loader(model, loader, reward, accumulate=2, seed=1)
        def killed(step, accelerator):
            for i, batch in enumerate(rewarded(step, accelerator)):
                if i == stop: raise KeyboardInterrupt
                yield batch
        history = train(model, shapes, config, folder, resume, progress=False, callbacks=[RewardMeter()], loader=killed)
        return {k: v.clone() for k, v in model.state_dict().items()}, [entry['reward'] for entry in history]

    whole, rewards = run(tmp_path/'whole')
    with pytest.raises(KeyboardInterrupt): run(tmp_path/'cut', stop=8)
    again, rewards_again = run(tmp_path/'cut', resume=True)
    assert rewards == rewards_again and all(torch.equal(whole[k], again[k]) for k in whole)
    assert any(not torch.equal(whole[k], weights[k]) for k in whole)


def test_one_caption_has_no_others():
    with pytest.raises(ValueError, match='sample two or more'): leave_one_out(torch.rand(3, 1))
    with pytest.raises(ValueError, match='too few'): CiderReward([[[1, 2]]])
