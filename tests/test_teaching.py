"The page for teachers: its links arrive, what it quotes comes out, and the doctor says what it promises."

import json
import re

import pytest

from house import ROOT
from pvtblip.bugs import SPECIMENS


def cells(notebook):
    return json.loads((ROOT / f'nbs/{notebook}.ipynb').read_text(encoding='utf-8'))['cells']


PAGE = '\n'.join(''.join(cell['source']) for cell in cells('teaching'))
LINKS = sorted(set(re.findall(r'\(([\w]+)\.ipynb(?:#([^)\s]+))?\)', PAGE)))


def anchors(notebook):
    "The names that Quarto gives to a notebook's headings, which links use."
    text = '\n'.join(''.join(one['source']) for one in cells(notebook) if one['cell_type'] == 'markdown')
    names = set()
    for heading in re.findall(r'^#+ (.+)$', text, re.M):
        words = re.sub(r'[^\w\s.-]', '', heading.replace('-', ' ')).lower()
        names.add(re.sub(r'^[^a-z]+', '', '-'.join(words.split())))
    return names


def printed(notebook):
    "All text that is stored as a notebook's output."
    text = ''
    for cell in cells(notebook):
        for output in cell.get('outputs', []):
            part = output.get('text') or output.get('data', {}).get('text/plain', '')
            text += ''.join(part) + '\n'
    return text


@pytest.mark.parametrize('notebook, anchor', LINKS)
def test_every_heading_is_there(notebook, anchor):
    assert not anchor or anchor in anchors(notebook)


def test_a_lost_heading_is_seen():
    assert len(LINKS) > 20 and 'the-switch' in anchors('08_six_bugs')
    assert 'the-button' not in anchors('08_six_bugs')


def test_minutes_follow_each_other():
    plans = re.split(r'^## ', PAGE, flags=re.M)
    for title, whole in (('90 minutes', 90), ('Three hours', 180)):
        (plan,) = (one for one in plans if one.startswith(title))
        spans = [tuple(map(int, span)) for span in re.findall(r'^\| (\d+)–(\d+) \|', plan, re.M)]
        assert spans[0][0] == 0 and spans[-1][1] == whole
        assert all(before[1] == after[0] for before, after in zip(spans, spans[1:]))


def test_what_is_quoted_comes_out():
    stored = {' '.join(line.split()) for name, _ in LINKS for line in printed(name).split('\n')}
    quoted = [
        line for box in re.findall(r'^```text\n(.*?)^```', PAGE, re.M | re.S) for line in box.split('\n')
    ]
    quoted = [' '.join(line.split()) for line in quoted if line]
    assert len(quoted) > 15 and [line for line in quoted if line not in stored] == []


def test_the_doctor_finds_what_the_table_promises():
    rows = re.findall(r'^\| `(\w+)` \| .* \| `(\w+)` \| .* \|$', PAGE, re.M)
    assert len(rows) > 5
    assert {name: SPECIMENS[name].finding for name, _ in rows} == dict(rows)
