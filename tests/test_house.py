"A module stands on modules of smaller numbers only, and no private name crosses a door."

import importlib
import json
import re
from dataclasses import fields, is_dataclass

import pytest
from fastcore.docments import docments

import pvtblip
from house import ROOT, arrows, imported, is_reference, notebooks, sidebar, with_map

MODULES = notebooks()


def test_every_module_has_a_notebook_and_every_number_comes_once():
    written_by_hand = {'__init__', '__main__', '_modidx'}
    assert set(MODULES) == {file.stem for file in ROOT.glob('pvtblip/*.py')} - written_by_hand
    assert len(set(MODULES.values())) == len(MODULES)


@pytest.mark.parametrize('module', MODULES)
def test_imports_go_to_smaller_numbers(module):
    larger = [source for source in arrows()[module] if MODULES[source] >= MODULES[module]]
    assert not larger, f'{MODULES[module]} imports {larger}'


@pytest.mark.parametrize('module', MODULES)
def test_no_private_name_crosses_a_door(module):
    assert not [(source, name) for source, name in imported(module) if name.startswith('_')]


def test_the_map_in_contributing_is_that_of_the_imports():
    text = (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8')
    assert text == with_map(text), 'run python tests/check.py --fix'


def test_the_sidebar_shows_every_notebook_in_its_part():
    assert (ROOT / 'nbs/sidebar.yml').read_text(encoding='utf-8') == sidebar(), (
        'run python tests/check.py --fix'
    )


def test_no_text_names_a_notebook_that_is_not_there():
    there = {file.stem for file in ROOT.glob('nbs/*.ipynb')}
    files = [*ROOT.glob('nbs/*.ipynb'), *ROOT.glob('pvtblip/*.py'), *ROOT.glob('*.md')]
    for file in files:
        named = set(re.findall(r'`(\d\d\d?_[a-z_]+)`', file.read_text(encoding='utf-8')))
        assert named <= there, f'{file.name}: {named - there}'


def test_three_names_of_the_package():
    for name in ('load_model', 'process_image', 'generate_caption'):
        assert callable(getattr(pvtblip, name))


def test_every_notebook_ends_with_the_name_of_the_next():
    files = [file for file in sorted(ROOT.glob('nbs/[0-9]*.ipynb')) if not is_reference(file.stem)]
    for file, following in zip(files, files[1:]):
        last = ''.join(json.loads(file.read_text(encoding='utf-8'))['cells'][-1]['source'])
        assert f'**Next:** `{following.stem}`' in last, file.name


def test_every_setting_says_what_it_is_for():
    for module in MODULES:
        for config in vars(importlib.import_module(f'pvtblip.{module}')).values():
            if (
                is_dataclass(config)
                and config.__module__ == f'pvtblip.{module}'
                and hasattr(config, '__post_init__')
            ):
                meanings = docments(config)
                assert all(meanings.get(field.name) for field in fields(config)), (config, meanings)
