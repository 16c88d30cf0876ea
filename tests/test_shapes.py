"""What the cells of 05_shapes do not reach: other processes, random boxes, random captions, pixels against
facts.
"""

import dataclasses
import hashlib
import math
import os
import pickle
import subprocess
import sys
from importlib.resources import files

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageDraw

from pvtblip.shapes import (
    _LEXICON,
    _OUTLINES,
    COLOURS,
    HELD_OUT,
    KINDS,
    RADII,
    RELATIONS,
    SPLITS,
    Background,
    CaptionReader,
    Scene,
    ShapeObject,
    ShapesDataset,
    check_caption,
    draw,
    make_scene,
    plural,
    relation,
    score_captions,
    write_caption,
)

OPPOSITE = dict(zip(RELATIONS, ('right of', 'left of', 'below', 'above')))
SCENES = [make_scene(11, index, split, max_objects=3) for split in SPLITS for index in range(150)]
scenes = st.sampled_from(SCENES)
lexicon = st.lists(st.sampled_from([' '.join(words) for words in _LEXICON]), max_size=25).map(' '.join)


def fingerprint():
    "One number for the pictures, captions and facts of a few scenes of every split."
    digest = hashlib.sha256()
    for split in SPLITS:
        for index in (0, 1, 999_999_999):
            scene = make_scene(2**40, index, split, max_objects=3, image_size=48)
            digest.update(scene.image.tobytes() + repr((scene.captions, scene.facts, scene.objects)).encode())
    return digest.hexdigest()


def test_scenes_are_the_same_in_every_process():
    code = 'import test_shapes; print(test_shapes.fingerprint())'
    for hash_seed in ('1', '2'):
        answer = subprocess.run(
            [sys.executable, '-c', code],
            capture_output=True,
            text=True,
            check=True,
            cwd=os.path.dirname(__file__),
            env={**os.environ, 'PYTHONHASHSEED': hash_seed},
        )
        assert answer.stdout.strip() == fingerprint()


def test_a_scene_depends_on_nothing_but_its_numbers():
    before = np.random.get_state()[1].copy()
    late = make_scene(11, 149, 'train', max_objects=3)
    assert late == SCENES[149] and late.captions == SCENES[149].captions  # captions before the picture, here
    assert (late.image == SCENES[149].image).all()
    assert (np.random.get_state()[1] == before).all()


def test_pictures_and_captions_are_made_only_when_asked_for():
    scene = make_scene(0, 0)
    assert not {'image', 'captions'} & set(vars(scene))
    assert scene.image is scene.image and scene.captions is scene.captions


def test_scenes_survive_pickling():
    scene = pickle.loads(pickle.dumps(SCENES[3]))
    assert scene == SCENES[3] and (scene.image == SCENES[3].image).all()
    dataset = pickle.loads(pickle.dumps(ShapesDataset(np.asarray, length=5)))
    assert (dataset[2, 4]['pixel_values'] == ShapesDataset(np.asarray, length=15)[14]['pixel_values']).all()


def alone(shape, ground, side=192):
    return draw([shape], Background(shade=(float(ground),) * 3), side).astype(int)


@given(scenes)
@settings(max_examples=60, deadline=None)
def test_pixels_agree_with_boxes_colours_sizes_and_relations(scene):
    side = 192
    boxes = []
    for shape in scene.objects:
        dark, light = alone(shape, 0, side), alone(shape, 255, side)
        cover = 1 - (light - dark)[..., 1] / 255  # what does not let the ground through
        rows, columns = np.where((cover > 0.5).any(1))[0], np.where((cover > 0.5).any(0))[0]
        boxes.append((columns[0] / side, rows[0] / side, (columns[-1] + 1) / side, (rows[-1] + 1) / side))
        assert (
            np.abs(np.subtract(boxes[-1], shape.box)).max() * side < 3.5
        )  # the tips of a star are thinner than a pixel
        assert ((np.array(shape.box) > 0) & (np.array(shape.box) < 1)).all()
        pixels = dark[cover > 0.99].mean(0)
        assert min(COLOURS, key=lambda name: math.dist(COLOURS[name], pixels)) == shape.colour
        extent = max(boxes[-1][2] - boxes[-1][0], boxes[-1][3] - boxes[-1][1]) / 2
        assert min(RADII, key=lambda size: abs(extent - sum(RADII[size]) / 2)) == shape.size
    for fact in scene.facts:
        if fact.about == 'relation':
            centres = [((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for b in (boxes[i] for i in fact.objects)]
            dx, dy = centres[1][0] - centres[0][0], centres[1][1] - centres[0][1]
            assert fact.value == (
                ('right of', 'left of')[int(dx > 0)] if abs(dx) > abs(dy) else ('below', 'above')[int(dy > 0)]
            )


@given(scenes)
@settings(max_examples=60, deadline=None)
def test_shapes_never_overlap_and_every_pair_has_one_relation(scene):
    count = len(scene.objects)
    places = [fact for fact in scene.facts if fact.about == 'relation']
    assert len(places) == count * (count - 1) and len(scene.facts) == 3 * count + len(places) + 1
    for a in scene.objects:
        for b in scene.objects:
            assert a is b or (a.colour, a.kind) != (b.colour, b.kind)
            assert (
                a is b
                or min(a.box[2] - b.box[0], b.box[2] - a.box[0], a.box[3] - b.box[1], b.box[3] - a.box[1])
                <= 0
            )
            x, y = (abs(a.box[i] + a.box[i + 2] - b.box[i] - b.box[i + 2]) for i in (0, 1))
            assert a is b or max(x, y) >= 1.49 * min(x, y)  # nobody would call it diagonal


corner, side = st.floats(0, 0.7), st.floats(0.05, 0.3)
boxes = st.builds(lambda x, y, w, h: (x, y, x + w, y + h), corner, corner, side, side)


@given(boxes, boxes)
def test_a_relation_read_backwards_is_its_opposite(a, b):
    assert relation(a, b) == OPPOSITE.get(relation(b, a))
    assert relation(a, a) is None


def test_every_word_is_one_token_of_berts_vocabulary():
    vocabulary = set(files('pvtblip').joinpath('vocab.txt').read_text(encoding='utf-8').split('\n'))
    said = {
        word for scene in SCENES for caption in scene.captions for word in caption.replace(',', ' ,').split()
    }
    assert not said - vocabulary
    assert not {word for words in _LEXICON for word in words} - vocabulary


def test_captions_are_short_true_and_different():
    for scene in SCENES:
        lengths = [len(caption.replace(',', ' ,').split()) for caption in scene.captions]
        assert max(lengths) <= (30 if len(scene.objects) == 3 else 24)
        assert len(set(scene.captions)) == 5
        for caption in scene.captions:
            assert caption == caption.lower().strip() and check_caption(caption, scene).fully_true, caption


def test_the_whole_grammar_is_read_back():
    rng = np.random.default_rng(0)
    said = set()
    for scene in SCENES:
        for _ in range(10):
            caption = write_caption(scene.objects, rng)
            said |= set(caption.replace(',', ' ,').split())
            assert check_caption(caption, scene).fully_true, caption
    unsaid = {word for words in _LEXICON for word in words} - said
    assert unsaid <= {'four', 'five', 'six', *(plural(kind) for kind in KINDS)}  # two of a kind are rare


@given(scenes, st.one_of(st.text(max_size=80), lexicon))
@settings(max_examples=300, deadline=None)
def test_any_text_can_be_judged(scene, caption):
    check = check_caption(caption, scene)
    facts = set(scene.facts)
    for statement in check.true:
        assert statement.about == 'count' or statement in facts
    for statement in check.false:
        assert statement not in facts
    assert set(check.missing) <= facts
    assert not check.fully_true or (check.true and not check.unknown)


@given(
    st.lists(st.sampled_from(['a red circle', 'a blue star', 'a tiny moon']), min_size=9, max_size=60), scenes
)
@settings(max_examples=20, deadline=2000)
def test_a_caption_that_never_ends_is_judged_in_time(phrases, scene):
    check = check_caption(' and '.join(phrases), scene)
    assert len(check.true) + len(check.false) == 2 * len(phrases)
    assert len({s.objects for s in check.true}) <= len(scene.objects)


@given(scenes, st.data())
@settings(max_examples=80, deadline=None)
def test_a_caption_becomes_false_when_the_scene_changes_under_it(scene, data):
    number = data.draw(st.integers(0, len(scene.objects) - 1))
    shape = scene.objects[number]
    what = data.draw(st.sampled_from(['kind', 'colour']))
    unused = sorted(set({'kind': KINDS, 'colour': COLOURS}[what]) - {getattr(o, what) for o in scene.objects})
    changed = dataclasses.replace(shape, **{what: data.draw(st.sampled_from(unused))})
    other = dataclasses.replace(
        scene, objects=(*scene.objects[:number], changed, *scene.objects[number + 1 :])
    )
    for caption in scene.captions:  # the grammar always names kind and colour
        assert not check_caption(caption, other).fully_true, (caption, changed)


def test_one_mention_speaks_of_one_object_only():
    left, right = (0.1, 0.4, 0.3, 0.6), (0.6, 0.4, 0.8, 0.6)
    scene = Scene(
        (ShapeObject('circle', 'red', 'small', left), ShapeObject('star', 'blue', 'small', right)),
        Background(),
        (0, 0, 0),
    )
    assert not check_caption('a red circle and a red circle', scene).fully_true
    assert check_caption('a blue star with a red circle on its left', scene).fully_true
    assert not check_caption('a blue star with a red circle on its right', scene).fully_true
    assert not check_caption('a red circle alone', scene).fully_true
    assert check_caption('Two small shapes: a RED circle, left of a star.', scene).fully_true
    assert [s.value for s in check_caption('left of a blue star', scene).false] == ['left of']


def test_reading_keeps_unknown_words_in_order():
    assert CaptionReader('a rather red circle, perhaps').unknown == ['rather', 'perhaps']


def test_held_out_pairs_never_reach_training():
    for index in range(1500):
        shown = [
            {(o.colour, o.kind) for o in make_scene(2, index, split, 3).objects} & HELD_OUT
            for split in SPLITS
        ]
        assert not shown[0] and not shown[1] and shown[2]


def test_every_name_is_drawn_about_equally_often():
    shapes = [o for index in range(4000) for o in make_scene(4, index).objects]
    for what, names in (('kind', KINDS), ('colour', COLOURS)):
        for name in names:
            assert abs(sum(getattr(o, what) == name for o in shapes) / len(shapes) - 1 / 8) < 0.015


def test_a_guesser_that_never_looks_scores_low_and_the_truth_scores_one():
    captions = [scene.captions[0] for scene in SCENES]
    own, blind = score_captions(captions, SCENES), score_captions(captions[1:] + captions[:1], SCENES)
    assert own['statements_true'] == own['captions_true'] == 1 and own['unknown_words'] == 0
    assert blind['statements_true'] < 0.35 and blind['captions_true'] < 0.05
    silent = score_captions([''] * len(SCENES), SCENES)
    assert silent['statements_true'] == silent['captions_true'] == 0 and silent['missing'] == 1


@pytest.mark.parametrize(
    'arguments, message',
    [
        (dict(split='validation'), 'train'),
        (dict(max_objects=0), 'one to three'),
        (dict(image_size=4), '16 pixels'),
    ],
)
def test_errors_say_what_to_do(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_scene(0, 0, **arguments)
    if 'split' in arguments:
        with pytest.raises(ValueError, match=message):
            ShapesDataset(np.asarray, **arguments)
    if 'max_objects' in arguments:
        for too_many in (dict(index=-1), dict(max_objects=4)):
            with pytest.raises(ValueError, match='negative|one to three'):
                make_scene(0, **{'index': 0, **too_many})


def test_every_kind_and_colour_is_held_out_once_and_colours_lie_further_apart_than_tints():
    assert len(HELD_OUT) == 8
    assert {kind for _, kind in HELD_OUT} == set(KINDS)
    assert {colour for colour, _ in HELD_OUT} == set(COLOURS)
    assert ('red', 'heart') in HELD_OUT and ('black', 'triangle') in HELD_OUT
    distances = [math.dist(COLOURS[a], COLOURS[b]) for a in COLOURS for b in COLOURS if a < b]
    assert min(distances) > 2 * math.sqrt(3) * 22


def pillow(kind, side=768):
    "White on black by Pillow: the kind with radius 0.4 of the side, in the middle, shrunk to 96 pixels"
    at = lambda *points: [((x * 0.4 + 0.5) * side, (y * 0.4 + 0.5) * side) for x, y in points]
    picture = Image.new('L', (side, side))
    pen = ImageDraw.Draw(picture)
    tip = [math.pi * k / 5 for k in range(10)]
    shift = (1 - math.cos(math.pi / 5)) / 2
    if kind == 'circle':
        pen.ellipse(sum(at((-1, -1), (1, 1)), ()), fill=255)
    if kind == 'triangle':
        pen.polygon(at((0, -0.87), (1, 0.87), (-1, 0.87)), fill=255)
    if kind == 'star':
        corners = zip(tip, [1, 0.45] * 5)
        pen.polygon(at(*((r * math.sin(t), shift - r * math.cos(t)) for t, r in corners)), fill=255)
    if kind == 'cross':
        for a, b in ((1, 0.36), (0.36, 1)):
            pen.rectangle(sum(at((-a, -b), (a, b)), ()), fill=255)
    return np.asarray(picture.resize((96, 96), Image.Resampling.BOX), float)


@pytest.mark.parametrize('kind', ['circle', 'triangle', 'star', 'cross'])
def test_another_library_draws_the_same(kind):
    half_width, half_height, _ = _OUTLINES[kind]
    box = (0.5 - 0.4 * half_width, 0.5 - 0.4 * half_height, 0.5 + 0.4 * half_width, 0.5 + 0.4 * half_height)
    white = ShapeObject(kind, 'white', 'large', box, (17.0, 17.0, 17.0))
    ours = draw([white], Background(shade=(0.0, 0.0, 0.0)), 96)[..., 0]
    assert np.abs(ours - pillow(kind)).mean() < 1


@pytest.mark.parametrize('kind', KINDS)
def test_a_drawing_fills_its_box(kind):
    "At 96 pixels they may differ by one, and by two at tips, which are thinner than a pixel."
    half_width, half_height, _ = _OUTLINES[kind]
    box = (0.5 - 0.2 * half_width, 0.5 - 0.2 * half_height, 0.5 + 0.2 * half_width, 0.5 + 0.2 * half_height)
    picture = draw([ShapeObject(kind, 'black', 'small', box)], image_size=96)[..., 0]
    filled = picture < (COLOURS['black'][0] + 128) / 2  # more black than grey
    rows, columns = np.where(filled.any(1))[0], np.where(filled.any(0))[0]
    drawn = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    tips = kind in ('star', 'triangle', 'heart', 'moon')
    assert np.abs(drawn - 96 * np.array(box)).max() <= (2 if tips else 1)


def test_relations_by_hand():
    middle = (0.4, 0.4, 0.6, 0.6)
    assert relation((0.1, 0.4, 0.3, 0.6), middle) == 'left of'
    assert relation(middle, (0.1, 0.4, 0.3, 0.6)) == 'right of'
    assert relation((0.4, 0.1, 0.6, 0.3), middle) == 'above'
    assert relation((0.45, 0.7, 0.65, 0.9), middle) == 'below'
    assert relation((0.1, 0.1, 0.3, 0.3), middle) is None  # diagonally: no word is right


def test_readings_by_hand():
    reading = CaptionReader('two circles, a red one above a tiny blue one')
    assert reading.counts == [(2, [('kind', 'circle')])]
    small = [('size', 'small'), ('colour', 'blue'), ('kind', 'circle')]
    assert reading.mentions == [[('colour', 'red'), ('kind', 'circle')], small]
    assert reading.relations == [['above', 0, 1]]
    assert CaptionReader('a green star with a moon on its left').relations == [['left of', 1, 0]]


def test_more_errors_say_what_to_do():
    for wrong, message in (
        (lambda: write_caption((), np.random.default_rng(0)), '0 shapes'),
        (lambda: ShapeObject('hexagon', 'red', 'small', (0, 0, 1, 1)), "kind 'hexagon' is unknown"),
        (lambda: draw([], Background(pattern='zigzag')), 'zigzag'),
        (lambda: score_captions(['a circle'], []), '1 captions for 0 scenes'),
        (lambda: score_captions([], []), '0 captions for 0 scenes'),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()


def test_a_scene_is_the_same_at_any_size():
    scene = make_scene(0, 3)
    sizes = [dataclasses.replace(scene, image_size=size) for size in (32, 96)]
    assert [one.captions for one in sizes] == [scene.captions] * 2
    assert [one.image.shape[0] for one in sizes] == [32, 96]
