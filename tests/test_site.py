"The site has a page for every notebook and module, no link leads nowhere, and nothing is loaded from elsewhere."

import importlib.util
import re
import warnings
from pathlib import Path

import matplotlib
import pytest
from nbdev.process import NBProcessor
from nbdev.processors import add_show_docs, exec_show_docs

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope='module')
def make():
    spec = importlib.util.spec_from_file_location('make_site', ROOT / 'nbs/make_site.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def site(make, tmp_path_factory):
    folder = tmp_path_factory.mktemp('site')
    number = make.make_site(folder)
    assert number == len(list(ROOT.glob('nbs/*.ipynb')))
    return folder


def test_every_link_leads_somewhere_and_nothing_comes_from_elsewhere(site):
    pages = {file: file.read_text(encoding='utf-8') for file in site.rglob('*.html')}
    lost = []
    for file, text in pages.items():
        for tag, link in re.findall(r'<(\w+)[^>]*?\s(?:href|src)="([^"]+)"', text):
            place, _, anchor = link.partition('#')
            if link.startswith('data:'):
                continue
            if re.match(r'\w+:', link):
                assert tag == 'a', (file.name, link)
                continue
            there = (file.parent / place).resolve() if place else file
            if not there.exists() or anchor and f'id="{anchor}"' not in pages[there]:
                # the search's files are written by pagefind, where it is installed
                lost += [(file.name, link)] if 'pagefind/' not in link else []
    assert not lost


def test_modules_have_pages_and_directives_are_not_shown(site):
    assert 'def generate' in re.sub(
        r'<[^>]+>', '', (site / 'source/generation.html').read_text(encoding='utf-8')
    )
    text = re.sub(r'<[^>]+>', '', (site / 'decoder.html').read_text(encoding='utf-8'))
    assert '#| export' not in text and '$$' not in text


def test_names_lead_to_what_they_name(make):
    known = {'generate': 'generation.html#generate', '02_decoder': 'decoder.html'}
    said = make.with_links('see `02_decoder`, `generate()`, `other` and [this](05_shapes.ipynb#x)', known)
    assert said == (
        'see [`02_decoder`](decoder.html), [`generate()`](generation.html#generate), `other` and '
        '[this](shapes.html#x)'
    )
    code = '```\n`generate`\n```'
    assert make.with_links(code, known) == code


def test_formulas_become_mathml(make):
    assert '<math' in make.with_formulas(r'the rule $R \leftarrow \tfrac12 A$ of')
    assert make.with_formulas('costs $5 and $6') == 'costs $5 and $6'


@pytest.fixture
def own_settings():
    "What a notebook asks of Matplotlib (its font, its backend) does not outlive the test, nor reach the next one."
    with matplotlib.rc_context():
        yield
    matplotlib.use('agg')


@pytest.mark.parametrize('notebook', sorted(path.name for path in (ROOT / 'nbs').glob('*.ipynb')))
def test_nbdev_can_document_a_notebook(notebook, monkeypatch, own_settings):
    "`nbdev_proc_nbs`, which Quarto's site begins with, runs exported cells and those with imports, and no others."
    monkeypatch.chdir(ROOT / 'nbs')
    monkeypatch.setenv('MPLBACKEND', 'agg')
    with warnings.catch_warnings():
        # it would run the other code too: a change of folder, for one, would meet the notebooks after it
        warnings.filterwarnings('error', 'Found cells containing imports and other code')
        NBProcessor(ROOT / 'nbs' / notebook, procs=[add_show_docs, exec_show_docs]).process()
    assert Path.cwd() == ROOT / 'nbs'
