"Confidence: what batches, ties, random data and damaged files do to it; oracles by brute force."

import json, math

import pytest, torch
from hypothesis import given, settings, strategies as st

from pvtblip.pipeline import caption_files
from pvtblip.fast import fingerprint
from pvtblip.confidence import (
    MEASURES,
    Calibration,
    Judge,
    auroc,
    calibration_error,
    caption_confidence,
    confidences_and_scores,
    fit_confidence,
    kept_share,
    load_confidence,
    plot_kept_share,
    plot_reliability,
)
from pvtblip.decoder import Captioner, CaptionerConfig, DecoderConfig
from pvtblip.generation import generate

numbers = st.lists(st.tuples(st.integers(-5, 5), st.booleans()), min_size=2, max_size=40).filter(
    lambda rows: len({right for _, right in rows}) == 2
)

pytestmark = pytest.mark.usefixtures('one_seed')


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    model = Captioner(
        CaptionerConfig.tiny(
            max_length=12,
            output_vocabulary=list(range(2000, 2020)),
            decoder=DecoderConfig.tiny(initializer_range=0.3),
        )
    ).eval()
    with torch.no_grad():
        model.decoder.cls['predictions'].bias[model.tokenizer.sep_token_id] = (
            1.0  # so that some captions end early
        )
    return model


def world(n=2000, slope=2.0, intercept=3.0, seed=0):
    "Confidences whose truth is drawn from a known logistic curve."
    rng = torch.Generator().manual_seed(seed)
    confidences = -3 * torch.rand(n, generator=rng, dtype=torch.float64)
    return confidences, torch.rand(n, generator=rng) < (slope * confidences + intercept).sigmoid()


# --- a caption's confidence
@pytest.mark.parametrize('options', [dict(), dict(num_beams=3, num_return_sequences=3), dict(do_sample=True)])
@pytest.mark.parametrize('measure', MEASURES)
def test_own_tokens_count_and_padding_does_not(model, options, measure):
    output = generate(model, image_tokens=5 * torch.randn(12, 4, 64), **options)
    found = caption_confidence(output, model.tokenizer, measure)
    assert found.shape == output.scores.shape and (found <= 0).all()
    P = model.tokenizer.prompt_length
    sep = model.tokenizer.sep_token_id
    lengths = set()
    for i in range(12):
        for j in range(found.shape[1]):
            ids = output.sequences[i, j, P:].tolist()
            own = []
            for token, logprob in zip(ids, output.token_logprobs[i, j].tolist()):
                own.append(logprob)
                if token == sep:
                    break
            lengths.add(len(own))
            assert found[i, j].item() == pytest.approx(
                dict(mean=sum(own) / len(own), sum=sum(own), min=min(own))[measure], abs=1e-5
            )
    assert len(lengths) > 1  # otherwise there was no padding to fall for


def test_mean_is_generates_own_score_at_length_penalty_1(model):
    output = generate(model, image_tokens=5 * torch.randn(8, 4, 64), num_beams=3)
    torch.testing.assert_close(caption_confidence(output, model.tokenizer), output.scores, atol=1e-5, rtol=0)


def test_neighbours_do_not_matter(model):
    images = 5 * torch.randn(8, 4, 64)
    together = caption_confidence(generate(model, image_tokens=images), model.tokenizer)
    for i in range(8):
        torch.testing.assert_close(
            caption_confidence(generate(model, image_tokens=images[i : i + 1]), model.tokenizer)[0],
            together[i],
            atol=1e-4,
            rtol=0,
        )


def test_unknown_measure(model):
    with pytest.raises(ValueError, match="'median' is unknown; choose one of mean, sum, min"):
        caption_confidence(generate(model, torch.randn(1, 3, 64, 64)), model.tokenizer, 'median')
    with pytest.raises(ValueError, match="'median' is unknown"):
        fit_confidence(*world(), measure='median')


# --- ranking
@settings(deadline=None)
@given(numbers)
def test_auroc_is_the_share_of_pairs_in_order(rows):
    right, wrong = ([c for c, ok in rows if ok is value] for value in (True, False))
    pairs = [(a > b) + (a == b) / 2 for a in right for b in wrong]
    found = auroc(*zip(*rows))
    assert found == pytest.approx(sum(pairs) / len(pairs))
    assert auroc([-c for c, _ in rows], [ok for _, ok in rows]) == pytest.approx(1 - found)
    assert auroc([math.exp(c) for c, _ in rows], [ok for _, ok in rows]) == pytest.approx(found)


@settings(deadline=None)
@given(numbers, st.randoms())
def test_kept_share_ignores_the_order_of_ties_and_ends_at_the_mean(rows, random):
    shares, kept = kept_share(*zip(*rows))
    shuffled = random.sample(rows, len(rows))
    torch.testing.assert_close(kept, kept_share(*zip(*shuffled))[1])
    assert shares[-1] == 1 and kept[-1].item() == pytest.approx(sum(ok for _, ok in rows) / len(rows))
    best = kept_share([ok for _, ok in rows], [ok for _, ok in rows])[1]
    assert (kept <= best + 1e-9).all()


def test_kept_share_by_brute_force():
    confidences = torch.randn(30)
    scores = torch.rand(30)
    _, kept = kept_share(confidences, scores)
    for n in range(1, 31):
        assert kept[n - 1].item() == pytest.approx(
            scores[confidences.topk(n).indices].mean().item(), abs=1e-6
        )


@pytest.mark.parametrize(
    'confidences, scores, says',
    [
        ([1], [1, 0], '1 confidences and 2 scores'),
        ([], [], 'at least one'),
        ([1, math.inf], [0, 1], 'confidence 1 is inf'),
        ([1, 2], [math.nan, 1], 'score 0 is nan'),
    ],
)
def test_what_does_not_pair_is_named(confidences, scores, says):
    for function in (kept_share, auroc, fit_confidence, plot_kept_share):
        with pytest.raises(ValueError, match=says):
            function(confidences, scores)


# --- calibration
def test_platt_finds_the_curve_that_made_the_data():
    confidences, correct = world(20_000)
    calibration = fit_confidence(confidences, correct)
    assert calibration.slope == pytest.approx(2, abs=0.15) and calibration.intercept == pytest.approx(
        3, abs=0.2
    )
    fresh, truth = world(20_000, seed=1)
    assert (
        calibration_error(calibration.probability(fresh), truth)
        < 0.02
        < calibration_error(fresh.exp(), truth)
    )


def test_platt_is_the_minimum():
    from pvtblip.confidence import _fit_platt

    confidences, correct = world(300)
    right, wrong = int(correct.sum()), int((~correct).sum())
    targets = torch.where(correct, (right + 1) / (right + 2), 1 / (wrong + 2)).double()
    curve = torch.tensor(_fit_platt(confidences, correct), dtype=torch.float64, requires_grad=True)
    torch.nn.functional.binary_cross_entropy_with_logits(
        curve[0] * confidences + curve[1], targets
    ).backward()
    assert curve.grad.abs().max() < 1e-6


@pytest.mark.parametrize('scale, shift', [(1, 0), (1000, -5e5), (1e-4, 3)])
def test_any_scale_of_confidence_is_fitted_alike(scale, shift):
    confidences, correct = world()
    plain, other = fit_confidence(confidences, correct), fit_confidence(scale * confidences + shift, correct)
    torch.testing.assert_close(
        other.probability(scale * confidences + shift), plain.probability(confidences), atol=1e-5, rtol=0
    )


def test_perfectly_parted_captions_stay_finite():
    calibration = fit_confidence(torch.arange(40), torch.arange(40) >= 20)
    assert (
        math.isfinite(calibration.slope)
        and 0 < calibration.probability(0) < 0.1
        and 0.9 < calibration.probability(39) < 1
    )


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 999))
def test_probability_grows_with_confidence_and_keeps_the_ranking(seed):
    confidences, correct = world(200, seed=seed)
    probabilities = fit_confidence(confidences, correct).probability(confidences)
    assert (probabilities[confidences.argsort()].diff() >= 0).all()
    assert auroc(probabilities, correct) == pytest.approx(auroc(confidences, correct))


def test_number_and_tensor_alike():
    calibration = fit_confidence(*world())
    assert calibration.probability(-1.0) == pytest.approx(
        calibration.probability(torch.tensor([-1.0], dtype=torch.float64)).item()
    )


def test_refused():
    with pytest.raises(ValueError, match='all 30 captions are wrong'):
        fit_confidence(range(30), [0] * 30)
    with pytest.raises(ValueError, match='19 captions are too few'):
        fit_confidence(range(19), [0] * 9 + [1] * 10)
    with pytest.raises(ValueError, match='not more often right'):
        fit_confidence([-1.0] * 40, [0, 1] * 20)
    with pytest.raises(ValueError, match='true or false for each caption; compare scores with a limit'):
        fit_confidence(range(40), [0.5] * 40)
    with pytest.raises(ValueError, match='take exp of log-probabilities'):
        calibration_error([-1.0, -2], [0, 1])


def test_calibration_error_by_hand():
    assert calibration_error([0.05, 0.15, 0.95, 0.95], [0, 1, 1, 0]) == pytest.approx(
        (0.05 + 0.85 + 2 * 0.45) / 4
    )
    assert calibration_error([0.0, 1.0], [0, 1]) == 0


# --- the promise
def test_binomial_tail():
    from pvtblip.confidence import _at_least

    assert _at_least(10, 10, 0.5) == pytest.approx(0.5**10)
    assert _at_least(3, 2, 0.5) == pytest.approx(0.5)
    assert _at_least(7, 0, 0.3) == pytest.approx(1)


def test_promise_holds_as_often_as_it_says():
    broken = plain_broken = 0
    for seed in range(100):
        calibration = fit_confidence(*world(2000, seed=seed))
        fresh, truth = world(4000, seed=1000 + seed)
        keep = lambda sure: truth[fresh >= calibration.threshold(0.8, sure)].double().mean().item()
        broken += keep(0.9) < 0.8
        plain_broken += keep(None) < 0.8
    assert broken <= 10 and plain_broken >= broken + 5  # the check tells a bound from a guess


def test_threshold_grows_with_what_is_asked():
    calibration = fit_confidence(*world())
    limits = [calibration.threshold(p) for p in (0.3, 0.6, 0.8, 0.85)]
    assert limits == sorted(limits) and calibration.threshold(0.8, sure=None) <= calibration.threshold(
        0.8, 0.9
    ) <= calibration.threshold(0.8, 0.999)
    with pytest.raises(
        ValueError, match=r'no threshold promises that a share of 0.9999 .* of the 100 surest of 2000'
    ):
        calibration.threshold(0.9999)
    for precision in (0, 1, 1.5, -1, math.nan):
        with pytest.raises(ValueError, match='above 0 and below 1'):
            calibration.threshold(precision)
    with pytest.raises(ValueError, match='sure is 1'):
        calibration.threshold(0.5, 1)


def test_kept_counts_with_ties():
    calibration = fit_confidence([0] * 30 + [1] * 30, [0] * 20 + [1] * 35 + [0] * 5)
    assert calibration.kept == [[1, 30, 25], [0, 60, 35]]


# --- the file
def test_file_round_trip(tmp_path):
    calibration = fit_confidence(*world(), measure='min')
    calibration.save(tmp_path / 'new' / 'model')
    assert load_confidence(tmp_path / 'new' / 'model') == calibration and [
        f.name for f in (tmp_path / 'new' / 'model').iterdir()
    ] == ['confidence.json']
    assert (tmp_path / 'new' / 'model' / 'confidence.json').stat().st_size < 4000


GOOD = dict(library='pvtblip', slope=1.0, intercept=0.0, kept=[[0.0, 10, 5]], measure='mean')


@pytest.mark.parametrize(
    'content, says',
    [
        ('{', 'not JSON'),
        ('[]', 'where an object'),
        (dict(GOOD, library='other'), 'not a calibration'),
        (dict(GOOD, more=1), 'has intercept, kept, measure, more, slope'),
        (
            {k: v for k, v in GOOD.items() if k != 'kept'},
            'a calibration has intercept, kept, measure, model, slope',
        ),
        (dict(GOOD, slope=-1), 'slope above 0'),
        (dict(GOOD, slope=math.nan), 'finite'),
        (dict(GOOD, intercept='0'), 'finite'),
        (dict(GOOD, slope=True), 'finite'),
        (dict(GOOD, measure='median'), "'median' is unknown"),
        (dict(GOOD, kept=[]), 'kept must be'),
        (dict(GOOD, kept=[[0, 5, 10]]), 'kept must be'),
        (dict(GOOD, kept=[[0, 5]]), 'kept must be'),
        (dict(GOOD, kept=[[0, 5, 2.5]]), 'kept must be'),
        (dict(GOOD, kept=5), 'kept must be'),
        (dict(GOOD, measure=[1]), 'is unknown'),
        ('[' * 100_000, 'nested'),
        (dict(GOOD, library='other', written_by='other'), 'not a calibration'),
    ],
)
def test_damaged_files_are_named(tmp_path, content, says):
    (tmp_path / 'confidence.json').write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=says) as problem:
        load_confidence(tmp_path)
    assert str(tmp_path / 'confidence.json') in str(problem.value)


def test_missing_file_and_good_file(tmp_path):
    with pytest.raises(FileNotFoundError, match='has not been calibrated'):
        load_confidence(tmp_path)
    (tmp_path / 'confidence.json').write_text(json.dumps(GOOD))
    assert load_confidence(tmp_path) == Calibration(1.0, 0.0, [[0.0, 10, 5]], 'mean')


def test_a_calibration_knows_its_weights(tmp_path):
    model = Captioner(CaptionerConfig.tiny())
    Calibration(1.0, 0.0, [[0.0, 10, 10]], model=fingerprint(model)).save(tmp_path)
    judge = Judge(tmp_path, 0.5)
    judge.check(model)
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    with pytest.raises(ValueError, match='confidence.json was made for other weights'):
        judge.check(model)
    Calibration(1.0, 0.0, [[0.0, 10, 10]]).save(tmp_path)
    Judge(tmp_path, 0.5).check(model)  # nothing noted: an earlier version's file


# --- photos
def write(folder, **report):
    images = {name: dict(CIDEr=i / 2, Bleu_1=0.5) for i, name in enumerate(('a.jpg', '7', 'c.jpg'))}
    (folder / 'report.json').write_text(
        json.dumps({**dict(images=images, captions=dict.fromkeys(images, 'a ring')), **report})
    )
    return folder / 'report.json'


def test_a_report_brings_its_confidences(tmp_path):
    report = write(tmp_path, confidences={'c.jpg': -3.0, 'a.jpg': -1.0, '7': -2.0, 'other.jpg': -9.0})
    assert confidences_and_scores(report) == (['a.jpg', '7', 'c.jpg'], [-1.0, -2.0, -3.0], [0.0, 0.5, 1.0])
    assert confidences_and_scores(report, 'Bleu_1')[2] == [0.5] * 3


def test_bad_reports(tmp_path):
    report = write(tmp_path, confidences={'a.jpg': -1.0})
    with pytest.raises(ValueError, match="report.json: no confidence for 2 of 3 photos, '7' the first"):
        confidences_and_scores(report)
    report = write(tmp_path, confidences=dict.fromkeys(('a.jpg', '7', 'c.jpg'), -1.0))
    with pytest.raises(ValueError, match='has no SPICE; it has CIDEr, Bleu_1'):
        confidences_and_scores(report, 'SPICE')
    with pytest.raises(ValueError, match='has no confidences; run pvtblip evaluate --json anew'):
        confidences_and_scores(write(tmp_path))
    with pytest.raises(FileNotFoundError, match='no such file'):
        confidences_and_scores(tmp_path / 'nowhere.json')
    for text in (
        '{"images": {}, "captions": {}}',
        '{"images": [], "captions": {}}',
        '{}',
        '{"images": {"a": {}}, "captions": 3}',
    ):
        report.write_text(text)
        with pytest.raises(ValueError, match='report.json: has no images with scores'):
            confidences_and_scores(report)
    for text, says in (
        ('[]', 'where an object'),
        ('[' * 100_000, 'nested'),
        ('', 'not JSON'),
        ('{"images": {"a": 3}, "captions": {"a": "x"}}', "scores of 'a' are 3"),
    ):
        report.write_text(text)
        with pytest.raises(ValueError, match=f'report.json.*{says}'):
            confidences_and_scores(report)


@pytest.mark.parametrize('value', [None, 'high', True, [1], {}, math.nan, math.inf, 10**400], ids=str)
def test_a_report_without_numbers(tmp_path, value):
    "One entry is no number, or lacks it: named, before anything is reckoned."
    names = ('a.jpg', '7', 'c.jpg')
    sure = {'a.jpg': -1.0, '7': -2.0, 'c.jpg': -3.0}
    images = {name: dict(CIDEr=0.5) for name in names}
    report = write(tmp_path, confidences=sure, images=images | {'7': dict(CIDEr=value)})
    with pytest.raises(ValueError, match=r"report.json: the CIDEr of '7' is .*, not a number"):
        confidences_and_scores(report)
    report = write(tmp_path, confidences=sure | {'7': value}, images=images)
    with pytest.raises(ValueError, match=r"report.json: the confidence of '7' is .*, not a number"):
        confidences_and_scores(report)
    report = write(tmp_path, confidences=sure, images=images | {'7': {'Bleu_1': 1.0}})
    with pytest.raises(ValueError, match="the CIDEr of '7' is missing"):
        confidences_and_scores(report)


def test_what_the_command_writes_is_what_generate_said(model, tmp_path):
    "`pvtblip caption --json` on a real folder: one confidence, batches or not."
    from PIL import Image

    model.save_pretrained(tmp_path / 'model')
    files, written = [], []
    for i in range(3):
        Image.effect_noise((40 + 9 * i, 30), 90).convert('RGB').save(tmp_path / f'{i}.png')
        files.append(tmp_path / f'{i}.png')
    caption_files(files, tmp_path / 'model', as_json=True, out=written.append)
    from pvtblip.generation import process_image

    output = generate(model, process_image(files, model), num_beams=3)
    expected = caption_confidence(output, model.tokenizer)[:, 0].tolist()
    assert [one['confidence'] for one in json.loads(written[0])] == pytest.approx(expected, abs=1e-4)


def test_an_earlier_calibration_may_be_replaced_and_a_foreign_file_may_not(tmp_path):
    from pvtblip.confidence import calibrate

    Captioner(CaptionerConfig.tiny()).save_pretrained(tmp_path / 'model')
    names = [str(i) for i in range(40)]
    (tmp_path / 'report.json').write_text(
        json.dumps(
            dict(
                images={name: dict(CIDEr=i / 40) for i, name in enumerate(names)},
                captions=dict.fromkeys(names, 'a'),
                confidences={name: i / 40 - 1 for i, name in enumerate(names)},
            )
        )
    )
    place = tmp_path / 'model/confidence.json'
    for before in (dict(GOOD), None):
        if before:
            place.write_text(json.dumps(before))
        calibrate(tmp_path / 'report.json', tmp_path / 'model', out=lambda text: None)
        assert (
            json.loads(place.read_text())['written_by'] == 'pvtblip'
            and len(load_confidence(tmp_path / 'model').kept) > 1
        )
    place.write_text('{"my": "notes"}')
    with pytest.raises(ValueError, match='confidence.json: not a calibration'):
        calibrate(tmp_path / 'report.json', tmp_path / 'model')
    assert place.read_text() == '{"my": "notes"}'


def test_names_are_no_formulas():
    import matplotlib

    matplotlib.use('agg')
    confidences, correct = world(50)
    plot_kept_share(confidences, correct, r'mean $\foo$').figure.canvas.draw()
    plot_reliability({r'$\foo$': confidences.exp()}, correct).canvas.draw()


def test_pictures():
    import matplotlib

    matplotlib.use('agg')
    confidences, correct = world(200)
    ax = plot_kept_share(confidences, correct, threshold=-1.0)
    assert ax.get_lines()[1].get_xdata()[-1] == 1 and ax.get_ylim()[1] >= 1
    assert plot_kept_share([-1, -2], [3.5, 0.1], 'CIDEr').get_ylim()[1] > 3.5
    assert (
        len(
            plot_reliability(
                {'a': confidences.exp(), 'b': fit_confidence(confidences, correct).probability(confidences)},
                correct,
            ).axes
        )
        == 2
    )
