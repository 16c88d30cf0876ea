"The picture of the whole: every part can be lit, and everything in it can be read."

import io
from itertools import combinations

import matplotlib

matplotlib.use('agg')
import matplotlib.pyplot as plt
import pytest
from matplotlib.patches import FancyBboxPatch
from PIL import Image

from house import notebooks
from pvtblip.pictures import BOXES, draw_architecture


@pytest.fixture
def drawn():
    "A function that draws and gives (figure, {part: its box}, texts that are not empty)."

    def draw(lit=None):
        figure = draw_architecture(lit)
        patches = [patch for patch in figure.axes[0].patches if isinstance(patch, FancyBboxPatch)]
        texts = [text for text in figure.axes[0].texts if text.get_text()]
        return figure, dict(zip(BOXES, patches, strict=True)), texts

    yield draw
    plt.close('all')


def faces(boxes):
    return {part: box.get_facecolor() for part, box in boxes.items()}


@pytest.mark.parametrize('part', BOXES)
def test_a_lit_part_stands_out(part, drawn):
    plain, lit = faces(drawn()[1]), faces(drawn(part)[1])
    inner = {'self_attention', 'cross_attention', 'feed_forward'} if part == 'decoder' else set()
    assert len(set(plain.values())) == 1
    assert {name for name, face in lit.items() if face == lit[part]} == {part} | inner
    assert lit[part] not in plain.values()


def test_several_parts_and_none():
    first, second = draw_architecture(['photo', 'encoder']), draw_architecture(iter(('photo', 'encoder')))
    pixels = [io.BytesIO(), io.BytesIO()]
    for figure, file in zip((first, second), pixels):
        figure.savefig(file)
    assert pixels[0].getvalue() == pixels[1].getvalue()
    with pytest.raises(ValueError, match="'attention' is no part of the picture; choose from photo"):
        draw_architecture(['photo', 'attention'])
    plt.close('all')


def test_text_is_large_apart_and_inside(drawn):
    figure, boxes, texts = drawn()
    renderer = figure.canvas.get_renderer()
    places = {text: text.get_window_extent(renderer) for text in texts}
    assert min(text.get_fontsize() for text in texts) >= 8
    for one, other in combinations(texts, 2):
        assert not places[one].overlaps(places[other]), (one.get_text(), other.get_text())
    # every text lies in one box whole, or in none
    for box in boxes.values():
        frame = box.get_window_extent(renderer)
        for text in texts:
            if frame.overlaps(places[text]):
                inside = frame.x0 < places[text].x0 and places[text].x1 < frame.x1
                assert inside and frame.y0 < places[text].y0 < places[text].y1 < frame.y1, text.get_text()


@pytest.mark.parametrize('lit', [None, 'decoder', ['loss', 'logits']])
def test_small_file_on_white(lit, drawn):
    file = io.BytesIO()
    drawn(lit)[0].savefig(file, format='png')
    assert file.tell() < 60_000
    picture = Image.open(file).convert('RGBA')
    assert 800 <= picture.width <= 900 and picture.getpixel((0, 0)) == (255, 255, 255, 255)


def test_numbers_in_the_corners_are_notebooks():
    there = {name[:2] for name in notebooks().values()}
    assert {box[4] for box in BOXES.values()} - {''} <= there
