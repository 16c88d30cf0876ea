"""Plain HTML of all notebooks, without Quarto and without a network: `python nbs/make_site.py FOLDER`.

The sidebar is that of `sidebar.yml`, names in backticks lead to what they name, and every module has a page with its
source. Nothing is loaded from elsewhere. Needs nbconvert, which comes with jupyterlab; formulas need latex2mathml,
and searching needs pagefind (`pip install 'pvtblip[site]'` brings both).
"""

import ast, configparser, html, re, subprocess, sys
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

import nbformat
import yaml
from nbconvert import HTMLExporter
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

NBS = Path(__file__).resolve().parent
ROOT = NBS.parent
SETTINGS = configparser.ConfigParser()
SETTINGS.read(ROOT / 'settings.ini', encoding='utf-8')
PROJECT = SETTINGS['DEFAULT']
FILES = f'{PROJECT["git_url"]}/blob/{PROJECT["branch"]}'

# Light and dark as the reader's system says; pictures keep their white ground.
STYLE = """
:root { --ground: #fff; --ink: #1f2328; --quiet: #59636e; --line: #d1d9e0; --box: #f6f8fa; --link: #0757ba; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #15191f; --ink: #e6edf3; --quiet: #9aa4af; --line: #3d444d; --box: #1e242c; --link: #71b0ff;
    --pf-background: #1e242c; --pf-text: #e6edf3; --pf-text-secondary: #9aa4af; --pf-border: #3d444d;
    --pf-hover: #2a313b; --pf-mark: #e6edf3; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.6 system-ui, sans-serif; }
a { color: var(--link); text-decoration: none; }
a:hover, a:focus-visible { text-decoration: underline; }
.page { display: grid; grid-template-columns: 16rem minmax(0, 54rem); gap: 2.5rem; max-width: 75rem; margin: auto; }
nav { padding: 1.5rem 0 2rem 1.25rem; position: sticky; top: 0; height: 100vh; overflow-y: auto; font-size: 15px; }
nav ul { list-style: none; margin: .25rem 0 1rem; padding: 0; }
nav li a { display: block; padding: .1rem .5rem; border-radius: 4px; }
nav strong { font-size: 13px; color: var(--quiet); }
nav [aria-current] { background: var(--box); font-weight: 600; }
main { padding: 1.5rem 1.25rem 4rem 0; min-width: 0; }
blockquote { margin: 0; color: var(--quiet); }
h1, h2, h3 { line-height: 1.25; }
h2 { border-bottom: 1px solid var(--line); padding-bottom: .25rem; margin-top: 2.5rem; }
.anchor-link { visibility: hidden; padding-left: .4rem; }
:is(h1, h2, h3):hover .anchor-link { visibility: visible; }
code, pre { font: 14px/1.5 ui-monospace, monospace; }
code { background: var(--box); padding: .1em .3em; border-radius: 4px; }
pre { margin: 0; padding: .75rem 1rem; overflow-x: auto; }
pre code { background: none; padding: 0; }
.code, .source { background: var(--box); border: 1px solid var(--line); border-radius: 6px; margin: 1rem 0 .25rem; }
.exported { display: block; color: var(--quiet); font-size: 13px; padding: .2rem 1rem 0; }
.out { margin: .25rem 0 1rem; border-left: 3px solid var(--line); overflow-x: auto; }
.out img { max-width: 100%; background: #fff; border-radius: 4px; padding: 6px; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: 15px; }
th, td { border: 1px solid var(--line); padding: .3rem .6rem; text-align: left; vertical-align: top; }
details { border: 1px solid var(--line); border-radius: 6px; padding: .4rem .9rem; margin: 1rem 0; }
summary { cursor: pointer; font-weight: 600; }
.turn { display: flex; justify-content: space-between; border-top: 1px solid var(--line); padding-top: 1rem; }
.turn { margin-top: 3rem; }
@media (max-width: 60rem) {
  .page { display: flex; flex-direction: column; gap: 0; }
  nav { order: 2; position: static; height: auto; border-top: 1px solid var(--line); padding: 1rem 1.25rem; }
  main { padding: 1rem 1.25rem 2rem; }
}
"""


def page_name(notebook):
    "The page of a notebook, by the name that nbdev's own links have: 02_decoder becomes decoder.html."
    return re.sub(r'^\d+[a-z]?_', '', Path(notebook).stem) + '.html'


def contents():
    "[(part or None, [notebooks])] in the order of the sidebar."
    parts = []
    listed = yaml.safe_load((NBS / 'sidebar.yml').read_text(encoding='utf-8'))
    for entry in listed['website']['sidebar']['contents']:
        parts.append((None, [entry]) if isinstance(entry, str) else (entry['section'], entry['contents']))
    return parts


def targets():
    "{what may stand in backticks: where it leads}: notebooks, modules, and every exported name."
    sys.path.insert(0, str(ROOT))
    from pvtblip._modidx import d as index

    found = {}
    for name, (link, _) in (item for symbols in index['syms'].values() for item in symbols.items()):
        found[name.split('.', 2)[2]] = link
    for _, notebooks in contents():
        for notebook in notebooks:
            found[Path(notebook).stem] = page_name(notebook)
            if (ROOT / 'pvtblip' / page_name(notebook).replace('.html', '.py')).is_file():
                found[f'pvtblip.{Path(page_name(notebook)).stem}'] = f'source/{page_name(notebook)}'
    return found


def with_links(text, known):
    "Markdown whose names in backticks lead to what they name, and whose links to notebooks lead to pages."

    def name(found):
        link = known.get(found[1].removesuffix('()'))
        return f'[`{found[1]}`]({link})' if link else found[0]

    # code blocks stay as they are, and so does what is a link already, with brackets in its text or not
    pieces = re.split(r'(^```.*?^```|\[(?:\[[^\]\n]*\]|[^\[\]\n])*\]\([^)\n]*\))', text, flags=re.M | re.S)
    for i in range(0, len(pieces), 2):
        pieces[i] = re.sub(r'(?<!`)`(\w[\w.]*(?:\(\))?)`(?!`)', name, pieces[i])
    for i in range(1, len(pieces), 2):
        pieces[i] = re.sub(r'\(([\w./]*?)(\w+)\.ipynb', lambda m: f'({page_name(m[2])}', pieces[i])
        # other files of the repository are read there
        pieces[i] = re.sub(
            r'\((?!\w+:|#)([\w./-]+)\)$',
            lambda m: f'({FILES}/{m[1]})' if (ROOT / m[1]).exists() else m[0],
            pieces[i],
        )
    return ''.join(pieces)


def with_formulas(text):
    "Markdown whose formulas are MathML, which browsers draw by themselves."
    if not re.search(r'\$[^$\n]*\\', text):
        return text
    from latex2mathml.converter import convert

    text = re.sub(r'\$\$(.+?)\$\$', lambda m: convert(m[1], display='block'), text, flags=re.S)
    return re.sub(r'(?<![\\$\w])\$([^$\n]+)\$', lambda m: convert(m[1]), text)


def defined(code):
    "Names that a cell defines: functions, classes and their methods, those added with `@patch` too."
    found = []
    for node in ast.parse(code).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.append(node.name)
        if isinstance(node, ast.ClassDef):
            found += [
                f'{node.name}.{method.name}' for method in node.body if isinstance(method, ast.FunctionDef)
            ]
        if isinstance(node, ast.FunctionDef) and node.args.args and node.decorator_list:
            owner = node.args.args[0].annotation
            found += [f'{owner.id}.{node.name}'] if isinstance(owner, ast.Name) else []
    return found


def anchored(text):
    "HTML whose headings can also be reached by the name that Quarto gives them, which the links of notebooks use."

    def both(found):
        words = re.sub(r'[^\w\s.-]', '', html.unescape(unquote(found[2]).replace('-', ' '))).lower()
        name = re.sub(r'^[^a-z]+', '', '-'.join(words.split()))
        return f'<a id="{name}"></a>{found[0]}' if name and name != found[2] else found[0]

    return re.sub(r'<(h\d) id="([^"]+)"', both, text)


def body(exporter, notebook, known):
    "(title, HTML) of a notebook as a reader sees it: no hidden cell, no directive."
    nb = nbformat.read(NBS / notebook, as_version=4)
    parts = []
    for cell in nb.cells:
        directives = re.findall(r'^#\|\s*(\w+)', cell.source, re.M)
        folded = 'hide' in directives and 'export' in directives
        if 'hide' in directives and not folded or 'default_exp' in directives or not cell.source.strip():
            continue
        if cell.cell_type == 'markdown':
            cell.source = with_formulas(with_links(cell.source, known))
            lone = nbformat.v4.new_notebook(cells=[cell])
            parts.append(exporter.from_notebook_node(lone)[0])
            continue
        # what is exported carries the anchors of the names that it defines
        code = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M).strip('\n')
        names = defined(code) if 'export' in directives else []
        anchors = ''.join(f'<a id="{name.lower()}"></a>' for name in names)
        label = '<span class="exported">exported</span>' if 'export' in directives else ''
        shown = highlight(code, PythonLexer(), HtmlFormatter())
        if folded:
            what = ', '.join(name for name in names if '.' not in name) or 'settings'
            parts.append(f'{anchors}<details><summary>exported: {what}</summary>{shown}</details>')
        elif code:
            parts.append(f'<div class="code">{anchors}{label}{shown}</div>')
        for output in cell.get('outputs', []):
            parts.append(f'<div class="out">{output_html(output)}</div>')
    text = anchored('\n'.join(parts))
    title = re.search(r'<h1[^>]*>(.*?)<a', text, re.S)
    return html.unescape(re.sub(r'<[^>]+>', '', title[1])) if title else Path(notebook).stem, text


def output_html(output):
    "A cell's output: picture before HTML before text."
    if output.output_type == 'stream':
        return f'<pre>{html.escape(output.text)}</pre>'
    if output.output_type == 'error':
        return f'<pre>{html.escape(output.ename)}: {html.escape(output.evalue)}</pre>'
    data = output.data
    if 'image/png' in data:
        about = html.escape(''.join(data.get('text/plain', 'picture')), quote=True)
        return f'<img alt="{about}" src="data:image/png;base64,{data["image/png"].strip()}">'
    if 'text/html' in data:
        return ''.join(data['text/html'])
    return f'<pre>{html.escape("".join(data.get("text/plain", "")))}</pre>'


def sidebar(here, depth=''):
    "The three parts, the present page marked."
    parts = []
    for part, notebooks in contents():
        items = ''
        for one in notebooks:
            mark = ' aria-current="page"' if one == here else ''
            items += f'<li><a href="{depth}{page_name(one)}"{mark}>{Path(one).stem}</a></li>'
        parts.append((f'<strong>{html.escape(part)}</strong>' if part else '') + f'<ul>{items}</ul>')
    if find_spec('pagefind'):
        parts.insert(0, '<pagefind-modal-trigger></pagefind-modal-trigger><pagefind-modal></pagefind-modal>')
    return f'<nav aria-label="Notebooks">{"".join(parts)}</nav>'


def page(title, side, text, depth=''):
    "A whole page."
    search = (
        f'<link href="{depth}pagefind/pagefind-component-ui.css" rel="stylesheet">'
        f'<script type="module" src="{depth}pagefind/pagefind-component-ui.js"></script>'
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{html.escape(title)} – {PROJECT["lib_name"]}</title>'
        f'{search if find_spec("pagefind") else ""}<link href="{depth}site.css" rel="stylesheet"></head>'
        f'<body><div class="page">{side}<main data-pagefind-body>{text}</main></div></body></html>'
    )


def make_site(folder):
    "Write the pages; returns their number."
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    light = HtmlFormatter().get_style_defs('.highlight')
    dark = HtmlFormatter(style='github-dark').get_style_defs('.highlight')
    colours = (
        f'{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n.highlight {{ background: none; }}\n'
    )
    (folder / 'site.css').write_text(STYLE + colours, encoding='utf-8')
    exporter = HTMLExporter(template_name='basic', embed_images=True)
    known = targets()
    # all notebooks, each with the way to the one before and the one after
    order = [one for _, notebooks in contents() for one in notebooks]
    pages = {one: body(exporter, one, known) for one in order}
    titles = {one: title for one, (title, _) in pages.items()}
    for number, one in enumerate(order):
        turn = '<span></span>'
        if number:
            before = order[number - 1]
            turn = f'<a href="{page_name(before)}">← {html.escape(titles[before])}</a>'
        if number + 1 < len(order):
            after = order[number + 1]
            turn += f'<a href="{page_name(after)}">{html.escape(titles[after])} →</a>'
        text = f'{pages[one][1]}<div class="turn">{turn}</div>'
        (folder / page_name(one)).write_text(page(titles[one], sidebar(one), text), encoding='utf-8')
    # a page for the source of every module that a notebook exports
    for one in order:
        source = ROOT / 'pvtblip' / f'{Path(page_name(one)).stem}.py'
        if source.is_file():
            code = highlight(source.read_text(encoding='utf-8'), PythonLexer(), HtmlFormatter())
            text = f'<h1>pvtblip.{source.stem}</h1><div class="source" data-pagefind-ignore>{code}</div>'
            (folder / 'source').mkdir(exist_ok=True)
            there = folder / 'source' / f'{source.stem}.html'
            there.write_text(page(source.name, sidebar(one, '../'), text, '../'), encoding='utf-8')
    if find_spec('pagefind'):
        subprocess.run([sys.executable, '-m', 'pagefind', '--site', str(folder)], check=True)
    return len(order)


if __name__ == '__main__':
    if len(sys.argv) != 2:
        sys.exit('usage: python nbs/make_site.py FOLDER')
    print(f'{make_site(sys.argv[1])} pages in {sys.argv[1]}')
