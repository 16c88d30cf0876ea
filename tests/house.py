"Which module stands on which, read from the imports: the map of CONTRIBUTING.md, and the three parts of the sidebar."

import ast
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ('index', 'glossary', 'symptoms', 'teaching', 'from_blip', 'from_transformers')
PARTS = {'0': 'course', '1': 'practice', '2': 'use'}

# without it JupyterLab asks for a kernel before it opens a notebook
KERNEL = {'kernelspec': {'display_name': 'python3', 'language': 'python', 'name': 'python3'}}


def written_notebook(name, texts):
    "A notebook of text alone, as its file says it: a cell a text, with ids that stay."
    cells = [
        dict(cell_type='markdown', id=f'{name}-{i:02}', metadata={}, source=text.splitlines(keepends=True))
        for i, text in enumerate(texts)
    ]
    whole = dict(cells=cells, metadata=KERNEL, nbformat=4, nbformat_minor=5)
    return json.dumps(whole, indent=1, ensure_ascii=False, sort_keys=True) + '\n'


def is_reference(notebook):
    "Three digits with 0 in front: it lies below all lessons, because they stand on it, and is not read in order."
    return re.match(r'0\d\d_', notebook) is not None


def part(notebook):
    "The part that a notebook belongs to; reference stands with practice."
    return 'practice' if is_reference(notebook) else PARTS[notebook[0]]


BEGIN, END = '<!-- map: made by tests/house.py -->', '<!-- end of map -->'


def notebooks():
    "{module: number of its notebook}, in the order of the numbers."
    numbers = {}
    for file in sorted(ROOT.glob('pvtblip/*.py')):
        if found := re.search(
            r'File to edit: \.\./nbs/(\d+[a-z]?_\w+)\.ipynb', file.read_text(encoding='utf-8')
        ):
            numbers[file.stem] = found[1]
    return dict(sorted(numbers.items(), key=lambda item: item[1]))


def imported(module):
    "[(module of ours, name)] of every import of a module, those inside functions too."
    found = []
    for node in ast.walk(ast.parse((ROOT / f'pvtblip/{module}.py').read_text(encoding='utf-8'))):
        if isinstance(node, ast.ImportFrom):
            source = (node.module or '').removeprefix('pvtblip').removeprefix('.')
            if node.level == 1 or (node.module or '').split('.')[0] == 'pvtblip':
                found += [(source or name.name, name.name) for name in node.names]
        if isinstance(node, ast.Import):
            found += [
                (name.name.removeprefix('pvtblip.'), '')
                for name in node.names
                if name.name.startswith('pvtblip.')
            ]
    return found


def arrows():
    "{module: modules that it stands on, in the order of their numbers}"
    numbers = notebooks()
    return {
        module: sorted({source for source, _ in imported(module)} & set(numbers), key=numbers.get)
        for module in numbers
    }


def house_map():
    "The table of CONTRIBUTING.md: part, number, module, what it stands on."
    numbers = notebooks()
    rows = [
        f'| {part(numbers[module])} | `{numbers[module]}` | {", ".join(stands_on) or "nothing of ours"} |'
        for module, stands_on in arrows().items()
    ]
    return '\n'.join(
        [BEGIN, '', '| part | notebook | its module stands on |', '| --- | --- | --- |', *rows, '', END]
    )


def with_map(text):
    "A text with the map between its two marks made anew."
    before, _, rest = text.partition(BEGIN)
    return before + house_map() + rest.partition(END)[2]


def read_cells(notebook):
    "[(kind, text)] of the cells that a learner reads: neither hidden nor the line that names the module."
    cells = json.loads((ROOT / f'nbs/{notebook}.ipynb').read_text(encoding='utf-8'))['cells']
    read = [(cell['cell_type'], ''.join(cell['source'])) for cell in cells]
    return [(kind, text) for kind, text in read if not re.search(r'^#\| ?(hide|default_exp)\b', text, re.M)]


def words_in(text):
    "Words of a markdown cell, the code in it aside."
    return len(re.sub(r'[`|*#]', ' ', re.sub(r'^```.*?^```', '', text, flags=re.M | re.S)).split())


def reading_minutes(notebook):
    "Minutes for what a learner reads: 200 words a minute, half a minute for a cell of code."
    read = read_cells(notebook)
    words = sum(words_in(text) for kind, text in read if kind == 'markdown')
    return words / 200 + sum(kind == 'code' for kind, _ in read) / 2


def lesson_size(notebook):
    "What a learner has before them: cells, words, lines of the longest cell of code, its widest line."
    read = read_cells(notebook)
    code = [re.sub(r'^#\|.*\n', '', text, flags=re.M) for kind, text in read if kind == 'code']
    return dict(
        cells=len(read),
        words=sum(words_in(text) for kind, text in read if kind == 'markdown'),
        lines=max(text.count('\n') + 1 for text in code),
        width=max(len(line) for text in code for line in text.split('\n')),
    )


def sidebar():
    "nbs/sidebar.yml: the notebooks in their three parts, below the front page and the pages for looking up."
    lines = ['website:', '  sidebar:', '    contents:']
    lines += [f'      - {page}.ipynb' for page in PAGES]
    names = sorted(file.stem for file in ROOT.glob('nbs/[0-9]*.ipynb'))
    for title, name in (('The course', 'course'), ('Practice', 'practice'), ('Use', 'use')):
        lines += [f'      - section: "{title}"', '        contents:']
        lines += [f'          - {notebook}.ipynb' for notebook in names if part(notebook) == name]
    return '\n'.join(lines) + '\n'
