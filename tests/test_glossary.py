"The words of the field: in order, explained where they say, and every link to one arrives."

import json
import re
from collections import Counter

import pytest

from glossary import TABLE, anchor, notebook, terms
from house import ROOT

ANCHORS = [anchor(term) for term, _, _ in terms()]


def text_of(file):
    "All sources of a notebook."
    return '\n'.join(
        ''.join(cell['source']) for cell in json.loads(file.read_text(encoding='utf-8'))['cells']
    )


def test_the_page_is_that_of_the_table():
    assert (ROOT / 'nbs/glossary.ipynb').read_text(encoding='utf-8') == notebook(), (
        'run python tests/check.py --fix'
    )


def test_rows_are_in_order_each_word_once():
    assert ANCHORS == sorted(ANCHORS) and max(Counter(ANCHORS).values()) == 1
    for row in TABLE.strip().splitlines():
        assert re.fullmatch(r'[0-2]\d[a-z]? [^:]+: \S.{10,}', row), row


@pytest.mark.parametrize('term, notebook', [(term, notebook) for term, _, notebook in terms()])
def test_a_word_is_in_the_notebook_that_explains_it(term, notebook):
    assert term.lower() in text_of(ROOT / f'nbs/{notebook}.ipynb').lower()


def test_links_to_words_arrive():
    linked = {
        word
        for file in ROOT.glob('nbs/*.ipynb')
        for word in re.findall(r'glossary\.ipynb#([^)\s]+)', file.read_text(encoding='utf-8'))
    }
    assert linked and linked <= set(ANCHORS), linked - set(ANCHORS)


def test_every_flag_of_a_cell_is_explained():
    used = {
        flag
        for file in ROOT.glob('nbs/*.ipynb')
        for flag in re.findall(r'^#\| ?(\w+)', text_of(file), re.MULTILINE)
    }
    assert {'export', 'hide', 'varies'} <= used
    assert used <= {term.removeprefix('#| ') for term, _, _ in terms()}, used
