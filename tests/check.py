"The whole check: `python tests/check.py`. With --fix it first exports, cleans and renders the README."

import argparse, filecmp, os, re, shutil, subprocess, sys, sysconfig, tempfile, time, venv
from pathlib import Path

import glossary, house
from matplotlib import get_data_path
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
COPIED = ('nbs', 'pvtblip', 'settings.ini')


def run(*command, cwd=ROOT, **variables):
    "Run a command of this environment; stop the check where it fails."
    threads = dict(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', PYTHONDONTWRITEBYTECODE='1')
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    subprocess.run(
        list(map(str, command)), cwd=cwd, check=True, env={**os.environ, **threads, 'PATH': path, **variables}
    )


def differing(folder, pattern):
    "Files that a fresh copy of the tree has otherwise than we do."
    names = {file.name for place in (ROOT, folder.parent) for file in (place / folder.name).glob(pattern)}
    return sorted(
        name
        for name in names
        if not all((place / folder.name / name).exists() for place in (ROOT, folder.parent))
        or not filecmp.cmp(ROOT / folder.name / name, folder / name, shallow=False)
    )


def in_a_copy(command, folder, pattern, remedy):
    "Run a command in a copy of the tree and see that it changes nothing."
    with tempfile.TemporaryDirectory() as place:
        for name in COPIED:
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, Path(place) / name)
        run(command, cwd=place)
        if files := differing(Path(place) / folder, pattern):
            sys.exit(f'{folder}: {", ".join(files)} out of step; {remedy}')


def readme():
    "README.md as nbs/index.ipynb renders: its text; pictures are drawn in the notebook only."
    exporter = MarkdownExporter(exclude_input=True, exclude_output=True)
    text, _ = exporter.from_filename(str(ROOT / 'nbs/index.ipynb'))
    return re.sub(r'\n{3,}', '\n\n', text.strip()) + '\n'


def exported():
    in_a_copy('nbdev_export', 'pvtblip', '*.py', 'run nbdev_export')


def clean():
    in_a_copy('nbdev_clean', 'nbs', '*.ipynb', 'run nbdev_clean')


def readme_in_sync():
    if (ROOT / 'README.md').read_text(encoding='utf-8') != readme():
        sys.exit('README.md is not what nbs/index.ipynb says; run python tests/check.py --fix')


def style():
    "One formatter for notebooks, tests and benchmarks; no line over 120; no import that a module does not need."
    written = ('nbs', 'tests', 'benchmarks', 'setup.py')
    run('ruff', 'format', '--check', '--quiet', *written)
    run('ruff', 'check', '--quiet', *written)
    run('ruff', 'check', '--quiet', '--isolated', '--select', 'F401,F821', 'pvtblip')


def notebooks():
    run(sys.executable, ROOT / 'tests/notebooks.py', '--n_workers', min(2, os.cpu_count()), '--do_print')


def tests():
    # two processes, a test file in one of them
    workers = min(2, os.cpu_count())
    run(sys.executable, '-m', 'pytest', '-q', '-n', workers, '--dist', 'loadfile', 'tests')


def wheel():
    """Build the wheel, install it in an environment of its own (dependencies are borrowed), and use it away
    from the repository.
    """
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        source, away, environment = place / 'source', place / 'away', place / 'environment'
        shutil.copytree(
            ROOT, source, ignore=shutil.ignore_patterns('.git', '.venv', 'build', '*.egg-info', '__pycache__')
        )
        away.mkdir()
        run(
            sys.executable,
            '-m',
            'pip',
            'wheel',
            '--quiet',
            '--no-deps',
            '--no-build-isolation',
            '--wheel-dir',
            place,
            source,
        )
        venv.create(environment)
        python = environment / ('Scripts' if os.name == 'nt' else 'bin') / 'python'
        site = subprocess.run(
            [python, '-c', "import sysconfig; print(sysconfig.get_path('purelib'))"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        (Path(site) / 'borrowed.pth').write_text(sysconfig.get_path('purelib') + '\n')
        run(
            sys.executable,
            '-m',
            'pip',
            '--python',
            python,
            'install',
            '--quiet',
            '--no-deps',
            '--force-reinstall',
            *place.glob('*.whl'),
        )
        pvtblip = python.parent / 'pvtblip'
        run(
            python,
            '-c',
            f'import pvtblip; assert pvtblip.__file__.startswith({site!r}), pvtblip.__file__',
            cwd=away,
        )
        run(pvtblip, '--help', cwd=away)
        # the captioner that comes with the package, on a photo that Matplotlib brings
        photo = Path(get_data_path()) / 'sample_data/grace_hopper.jpg'
        run(pvtblip, 'models', cwd=away)
        run(pvtblip, 'caption', photo, '--attention', 'hopper.png', cwd=away)
        run(pvtblip, 'demo', '--out', 'demo', '--max-steps', '4', '--scenes', '20', cwd=away)
        run(
            pvtblip,
            'caption',
            'demo/scene.png',
            '--model',
            'demo',
            '--json',
            '--attention',
            'look.png',
            cwd=away,
        )
        (away / 'photos').mkdir()
        shutil.copy(away / 'demo/scene.png', away / 'photos')
        (away / 'captions.json').write_text('{"scene.png": ["a small red ring", "one ring"]}')
        run(
            pvtblip,
            'evaluate',
            '--model',
            'demo',
            '--images',
            'photos',
            '--captions',
            'captions.json',
            '--json',
            'scores.json',
            cwd=away,
        )
        run(pvtblip, 'score', 'captions.json', 'scores.results.json', '--go-on', cwd=away)
        run(
            python,
            '-c',
            'from pvtblip import load_model, generate_caption; '
            "print(generate_caption(load_model('demo'), 'demo/scene.png'))",
            cwd=away,
        )


def fix():
    "Bring what is made from the notebooks into step."
    run('ruff', 'format', '--quiet', 'nbs', 'tests', 'benchmarks', 'setup.py')
    run('nbdev_export')
    run('nbdev_clean')
    (ROOT / 'README.md').write_text(readme(), encoding='utf-8')
    contributing = ROOT / 'CONTRIBUTING.md'
    contributing.write_text(house.with_map(contributing.read_text(encoding='utf-8')), encoding='utf-8')
    (ROOT / 'nbs/sidebar.yml').write_text(house.sidebar(), encoding='utf-8')
    (ROOT / 'nbs/glossary.ipynb').write_text(glossary.notebook(), encoding='utf-8')
    import symptoms  # made from the doctor that was just exported

    (ROOT / 'nbs/symptoms.ipynb').write_text(symptoms.notebook(), encoding='utf-8')


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--fix', action='store_true', help='export, clean and render first')
    if parser.parse_args().fix:
        fix()
    start = time.perf_counter()
    for step in (style, exported, clean, readme_in_sync, notebooks, tests, wheel):
        print(f'== {step.__name__} ({time.perf_counter() - start:.0f} s)', flush=True)
        step()
    print(f'all checks passed in {time.perf_counter() - start:.0f} s')


if __name__ == '__main__':
    main()
