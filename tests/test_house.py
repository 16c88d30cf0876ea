"A module stands on modules of smaller numbers only, no private name crosses a door, and no signature is long."

import ast
import importlib
import json
import re
from collections import Counter
from dataclasses import fields, is_dataclass

import pytest
from fastcore.docments import docments

import pvtblip
from check import readme
from house import (
    KERNEL,
    ROOT,
    arrows,
    imported,
    is_reference,
    lesson_size,
    notebooks,
    part,
    reading_minutes,
    sidebar,
    with_map,
)

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
        named = set(re.findall(r'`(\d\d\d?[a-z]?_[a-z_]+)`', file.read_text(encoding='utf-8')))
        assert named <= there, f'{file.name}: {named - there}'


def test_the_readme_is_the_text_of_the_index_without_pictures():
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    assert text == readme(), 'run python tests/check.py --fix'
    assert '![' not in text and 'data:image' not in text and 'draw_architecture' not in text


def test_three_names_of_the_package():
    for name in ('load_model', 'process_image', 'generate_caption'):
        assert callable(getattr(pvtblip, name))


def test_a_notebook_opens_without_asking_for_a_kernel():
    for file in ROOT.glob('nbs/*.ipynb'):
        assert json.loads(file.read_text(encoding='utf-8'))['metadata'] == KERNEL, file.name


def test_pictures_are_small():
    for file in sorted(ROOT.glob('nbs/*.ipynb')):
        for cell in json.loads(file.read_text(encoding='utf-8'))['cells']:
            for output in cell.get('outputs', []):
                size = len(output.get('data', {}).get('image/png', '')) * 3 // 4  # base64
                assert size < 60_000, f'{file.name}, cell {cell["id"]}: {size}'


def test_every_notebook_ends_with_the_name_of_the_next():
    files = [file for file in sorted(ROOT.glob('nbs/[0-9]*.ipynb')) if not is_reference(file.stem)]
    for file, following in zip(files, files[1:]):
        last = ''.join(json.loads(file.read_text(encoding='utf-8'))['cells'][-1]['source'])
        assert f'**Next:** `{following.stem}`' in last, file.name


def test_reading_times_are_measured():
    lessons = [file.stem for file in sorted(ROOT.glob('nbs/[0-9]*.ipynb')) if not is_reference(file.stem)]
    stated = {}
    for name in lessons:
        text = (ROOT / f'nbs/{name}.ipynb').read_text(encoding='utf-8')
        if found := re.search(r'Reading time\W+(?:about )?(\d+) min', text):
            stated[name] = int(found[1]), reading_minutes(name)
    front = (ROOT / 'nbs/index.ipynb').read_text(encoding='utf-8').lower()
    for title in ('course', 'practice', 'use'):
        hours = re.search(rf'\*\*(?:the )?{title}\*\* \([^)]*about ([\d.]+) hours', front)[1]
        stated[title] = 60 * float(hours), sum(reading_minutes(n) for n in lessons if part(n) == title)
    wrong = {name: pair for name, pair in stated.items() if abs(pair[0] - pair[1]) > 0.2 * pair[1]}
    assert len(stated) > 3 and not wrong, wrong


def test_every_setting_says_what_it_is_for():
    for module in MODULES:
        for config in vars(importlib.import_module(f'pvtblip.{module}')).values():
            if (
                is_dataclass(config)
                and config.__module__ == f'pvtblip.{module}'
                and '__post_init__' in vars(config)
            ):
                meanings = docments(config)
                assert all(meanings.get(field.name) for field in fields(config)), (config, meanings)


@pytest.mark.parametrize('module', MODULES)
def test_nothing_is_defined_twice(module):
    "`@patch` adds a method to the class of its first parameter, so two classes may get methods of one name."
    found = []
    for node in ast.parse((ROOT / f'pvtblip/{module}.py').read_text(encoding='utf-8')).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            patched = any('patch' in ast.unparse(decorator) for decorator in node.decorator_list)
            owner = ast.unparse(node.args.args[0].annotation) if patched else None
            found.append((owner, node.name))
        if isinstance(node, ast.ClassDef):
            found += [(node.name, method.name) for method in node.body if isinstance(method, ast.FunctionDef)]
    assert [name for name, count in Counter(found).items() if count > 1] == []


LESSONS = sorted(file.stem for file in ROOT.glob('nbs/0[0-7]*_*.ipynb') if not is_reference(file.stem))
NARROW = [lesson for lesson in LESSONS if lesson >= '05']  # in which no cell needs sideways scrolling


@pytest.mark.parametrize('lesson', LESSONS)
def test_a_lesson_can_be_read_in_one_sitting(lesson):
    size = lesson_size(lesson)
    assert size['cells'] <= 90 and size['words'] <= 3000 and size['lines'] <= 25, size
    assert size['width'] <= (100 if lesson in NARROW else 110), size


MOST = 8  # parameters; a function that needs more takes a config
LONGER = {
    'train': 'has a config; the others are what goes into the loop: data, functions, callbacks, a folder',
    'run_training': 'hands all of that on to `train`, with a config more',
}


def parameters(function):
    "The names of a function's parameters, without self."
    arguments = function.args
    names = [one.arg for one in arguments.posonlyargs + arguments.args + arguments.kwonlyargs]
    return names[1:] if names[:1] in (['self'], ['cls']) else names


@pytest.mark.parametrize('module', MODULES)
def test_no_function_has_more_than_eight_parameters(module):
    tree = ast.parse((ROOT / f'pvtblip/{module}.py').read_text(encoding='utf-8'))
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.Lambda))]
    long = {getattr(one, 'name', 'lambda') for one in functions if len(parameters(one)) > MOST}
    assert long <= LONGER.keys(), f'{long - LONGER.keys()}: give them a config'


def long_and_bare(text):
    "Functions of more than 15 lines in which no comment has a line of its own."
    lines = [line.strip() for line in text.split('\n')]
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body if ast.get_docstring(node) is None else node.body[1:]
            code = [line for line in lines[body[0].lineno - 1 : node.end_lineno] if line] if body else []
            if len(code) > 15 and not any(line.startswith('#') for line in code):
                found.append(node.name)
    return found


def hanging(text):
    "Comments behind a closing bracket, whose meaning stands lines above; a function's result has its place there."
    behind = re.compile(r'\s*(\)(?!( -> .*)?:  # )|[\]}]).*  # ')
    return [line for line in text.split('\n') if behind.match(line)]


def test_a_missing_signpost_and_a_hanging_comment_are_seen():
    steps = ''.join(f'    x = {i}\n' for i in range(15))
    head = 'def f(\n    # the number\n    x,\n):  # nothing\n    "Says nothing."\n'
    assert long_and_bare(head + steps) == []
    assert long_and_bare(head + steps + '    x = 15\n') == ['f']
    assert long_and_bare(head + steps + '    # the last step\n    x = 15\n') == []
    assert hanging(') -> int:  # of them\n):  # of them\nx = f(y)  # why\n') == []
    assert hanging('    )  # why\n)[0],  # why\n) -> dict[\n]:  # why\n') == [
        '    )  # why',
        ')[0],  # why',
        ']:  # why',
    ]


@pytest.mark.parametrize('module', MODULES)
def test_a_long_function_says_where_each_step_begins(module):
    assert not long_and_bare((ROOT / f'pvtblip/{module}.py').read_text(encoding='utf-8'))


@pytest.mark.parametrize('module', MODULES)
def test_no_comment_hangs_behind_a_closing_bracket(module):
    assert not hanging((ROOT / f'pvtblip/{module}.py').read_text(encoding='utf-8'))
