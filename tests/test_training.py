"""What a notebook cell cannot do: processes that are killed, damaged states, precisions."""

import errno
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import BertConfig, BertLMHeadModel

from pvtblip.pvt_encoder import BrokenImage
from pvtblip.training import Collate
from pvtblip.decoder import Captioner, CaptionerConfig, DecoderConfig
from pvtblip.files import only_writer
from pvtblip.pvt_encoder import EncoderConfig, image_transform
from pvtblip.shapes import ShapesDataset
from pvtblip.training import (
    Callback,
    TrainingConfig,
    _checksums,
    check_state,
    learning_rate_factor,
    newest_state,
    parameter_groups,
    plot_history,
    read_facts,
    read_tensors,
    save_state,
    saved_states,
    seed_step,
    train,
    training_step,
)

CONFIG = TrainingConfig(
    max_steps=10,
    batch_size=2,
    gradient_accumulation_steps=2,
    learning_rate=3e-3,
    logging_steps=3,
    save_steps=1,
    seed=5,
)


@pytest.fixture(autouse=True)
def on_the_processor(monkeypatch):
    """Bit for bit is promised on the processor (some GPU kernels add in any order), whatever other tests have
    chosen in this process.
    """
    monkeypatch.setenv('ACCELERATE_USE_CPU', 'true')
    AcceleratorState._reset_state(reset_partial_state=True)


def make_model(seed=0, dropout=0.1, **changes):
    torch.manual_seed(seed)
    decoder = DecoderConfig.tiny(
        hidden_size=32, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout
    )
    encoder = EncoderConfig.tiny(image_size=32, stages=(0,))
    return Captioner(CaptionerConfig.tiny(encoder=encoder, decoder=decoder, **changes))


def make_data(length=7, **changes):
    "Few scenes: the runs below go over them several times."
    transform = image_transform(EncoderConfig.tiny(image_size=32))
    return ShapesDataset(transform, length=length, captions_per_image=2, image_size=32, **changes)


def fit(config=CONFIG, folder=None, model=None, data=None, **kwargs):
    model = model or make_model()
    return model, train(model, data or make_data(), config, folder, progress=False, **kwargs)


def same_weights(model, other):
    return all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    )


def without_speed(history):
    return [{k: v for k, v in entry.items() if k != 'captions_per_second'} for entry in history]


CHILD = """
import sys, time, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_training import CONFIG, Slowly, fit, make_model, replace, saved_states
config = replace(CONFIG, max_steps=int(sys.argv[3]), eval_steps=1)
model = make_model(seed=99 if saved_states(sys.argv[2]) else 0)   # resumed weights must come from the state
seen = lambda model, step: dict(seen=step)
fit(config, sys.argv[2], model, resume=True, evaluate=seen, callbacks=[Slowly()], log=print)
"""


class Slowly(Callback):
    "Steps that can be hit; it counts them, in a number and in a tensor."

    def on_train_begin(self, run):
        if run.step == 0:
            self.steps = 0
            self.sum = torch.zeros(1)

    def on_step_end(self, run):
        self.steps += 1
        self.sum += run.loss
        time.sleep(0.02)

    def state_dict(self):
        return dict(steps=self.steps, sum=self.sum)

    def load_state_dict(self, state):
        self.steps, self.sum = state['steps'], state['sum']


def test_loss_and_gradients_are_those_of_the_original_library():
    "The plain way: each image encoded once per caption, all rows padded to 64, all logits."
    ours, data = make_model(dropout=0.0), make_data()
    config = BertConfig(**asdict(ours.config.decoder), is_decoder=True, add_cross_attention=True)
    theirs = BertLMHeadModel(config)
    theirs.loss_type = 'ForCausalLM'
    loaded = theirs.load_state_dict(ours.decoder.state_dict(), strict=False)
    assert not loaded.unexpected_keys
    tied = {'cls.predictions.decoder.weight', 'cls.predictions.decoder.bias'}
    assert set(loaded.missing_keys) <= tied, loaded.missing_keys
    # our way
    items = [data[0, i] for i in range(3)]
    batch = Collate(ours.tokenizer)(items)
    assert len({item['captions'][0] for item in items}) == 3
    mine = ours(batch['pixel_values'], batch['input_ids'], batch['labels']).loss
    mine.backward()
    gradients = {name: p.grad.clone() for name, p in ours.named_parameters()}
    ours.zero_grad()
    # the plain way
    fill = dict(input_ids=0, attention_mask=0, labels=-100)
    more = (0, 64 - batch['labels'].shape[1])
    padded = {name: F.pad(batch[name], more, value=value) for name, value in fill.items()}
    images = ours.encode_image(batch['pixel_values'].repeat_interleave(2, 0))
    plain = theirs(encoder_hidden_states=images, **padded).loss
    assert_close(mine, plain, rtol=1e-5, atol=1e-5)
    plain.backward()
    # the decoder is theirs, the encoder before it ours
    behind = {f'decoder.{name}': p for name, p in theirs.named_parameters()}
    for name, p in {**dict(ours.named_parameters()), **behind}.items():
        assert_close(p.grad, gradients[name], rtol=1e-3, atol=1e-5)


def listed(folder):
    "What lies in a folder of states, beside the lock."
    return sorted(path.name for path in folder.iterdir() if path.name != '.checkpoint.lock')


def newest(folder):
    return int(saved_states(folder)[-1].name.split('-')[1]) if saved_states(folder) else 0


def run_child(folder, kill_at=None, after=0.0, max_steps=CONFIG.max_steps):
    """Train in another process; kill it `after` seconds after it has written state `kill_at`. Returns its
    exit code.
    """
    command = [sys.executable, '-c', CHILD, os.path.dirname(__file__), str(folder), str(max_steps)]
    child = subprocess.Popen(command, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    while kill_at is not None and child.poll() is None and newest(folder) < kill_at:
        time.sleep(0.005)
    if kill_at is not None:
        time.sleep(after)
        child.send_signal(signal.SIGKILL)
    return child.wait()


@pytest.mark.parametrize('kills', [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_bit_for_bit_the_same(tmp_path, kills):
    steps = 4 * kills
    moments = random.Random(kills)
    config = replace(CONFIG, max_steps=steps, eval_steps=1)
    counted = Slowly()
    whole, history = fit(
        config, tmp_path / 'whole', evaluate=lambda model, step: dict(seen=step), callbacks=[counted]
    )
    folder = tmp_path / 'killed'
    killed = 0
    while killed < kills:
        # 0: perhaps before it has done anything
        kill_at = newest(folder) + moments.randint(0 if killed % 4 else 1, 3)
        assert run_child(folder, min(kill_at, steps - 1), moments.uniform(0, 0.06), steps) == -signal.SIGKILL
        assert newest(folder) < steps, 'the run was over before the kill; make it longer'
        killed += 1
    assert run_child(folder, max_steps=steps) == 0
    ours, theirs = (
        load_file(path / f'checkpoint-{steps}' / 'state.safetensors') for path in (tmp_path / 'whole', folder)
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert all(torch.equal(v, ours[f'model.{k}']) for k, v in whole.state_dict().items())
    facts = json.loads((folder / f'checkpoint-{steps}' / 'state.json').read_text())
    assert (
        without_speed(facts['history']) == without_speed(history)
        and facts['pieces']['Slowly']['steps'] == steps
    )
    assert torch.equal(theirs['Slowly.sum'], counted.sum)


TWO = """
import shutil, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from accelerate import Accelerator
from test_training import CONFIG, fit, make_data, make_model, replace, same_weights
config, folder = replace(CONFIG, max_steps=4, save_steps=2), Path(sys.argv[2])
whole, _ = fit(config, folder, data=make_data(9))
accelerator = Accelerator()
if accelerator.is_main_process: shutil.rmtree(folder / "checkpoint-4")
accelerator.wait_for_everyone()
resumed, _ = fit(config, folder, make_model(seed=1), make_data(9), resume=True)
total = sum(p.double().sum() for p in whole.parameters()).item()
report = folder / f"{accelerator.process_index}-of-{accelerator.num_processes}"
report.write_text(f"{same_weights(whole, resumed)} {total}")
"""


def test_two_processes_stay_together_and_resume(tmp_path, run_in_two):
    run_in_two(TWO, timeout=300)
    reports = [(tmp_path / f'{i}-of-2').read_text() for i in range(2)]
    assert reports[0] == reports[1] and reports[0].startswith('True '), reports
    with pytest.raises(ValueError, match='data processes: 2 then, 1 now'):
        fit(replace(CONFIG, max_steps=4), tmp_path, data=make_data(9), resume=True)


def test_the_same_comparison_sees_a_resume_that_forgets(tmp_path):
    "Without AdamW's moments the same comparison fails: the test can fail."
    whole, _ = fit(folder=tmp_path)
    shutil.rmtree(tmp_path / 'checkpoint-10')
    file = tmp_path / 'checkpoint-9' / 'state.safetensors'
    tensors = load_file(file)
    save_file({k: torch.zeros_like(v) if 'exp_avg' in k else v for k, v in tensors.items()}, file)
    (file.parent / 'checksums.json').write_text(json.dumps(_checksums(file.parent)))
    assert not same_weights(whole, fit(folder=tmp_path, model=make_model(seed=1), resume=True)[0])


def test_workers_and_looking_do_not_change_the_run():
    plain, _ = fit(replace(CONFIG, max_steps=4))
    with_workers, _ = fit(replace(CONFIG, max_steps=4, dataloader_num_workers=1))
    looked_at, _ = fit(
        replace(CONFIG, max_steps=4, eval_steps=1),
        evaluate=lambda model, step: dict(random=float(torch.rand(()))),
    )
    assert same_weights(plain, with_workers) and same_weights(plain, looked_at)


def test_another_run_is_refused_with_the_difference(tmp_path):
    fit(replace(CONFIG, max_steps=2), tmp_path)
    same = replace(CONFIG, max_steps=2)
    for config, message in (
        (replace(same, learning_rate=1e-4), 'training learning_rate: 0.003 then, 0.0001 now'),
        (replace(same, seed=6), 'training seed: 5 then, 6 now'),
        (CONFIG, 'training max_steps: 2 then, 10 now'),
    ):
        with pytest.raises(ValueError, match=message):
            fit(config, tmp_path, resume=True)
    with pytest.raises(ValueError, match="captioner prompt: 'a picture of' then, 'a photo of' now"):
        fit(same, tmp_path, make_model(prompt='a photo of'), resume=True)
    with pytest.raises(ValueError, match='data images: 7 then, 9 now'):
        fit(same, tmp_path, data=make_data(9), resume=True)
    with pytest.raises(ValueError, match='holds checkpoint-2 of an earlier run'):
        fit(same, tmp_path)
    before = make_model(seed=3)
    with pytest.raises(ValueError, match='other settings'):
        fit(replace(same, seed=6), tmp_path, before, resume=True)
    assert same_weights(before, make_model(seed=3)), 'a refused resume must not touch the model'
    # how often to log or save is free
    fit(replace(same, logging_steps=1, save_total_limit=5), tmp_path, resume=True)


def test_older_states_go_and_half_written_ones_are_ignored(tmp_path):
    (tmp_path / '.checkpoint-9.tmp').mkdir()
    (tmp_path / '.checkpoint-9.tmp' / 'state.json').write_text('{"step"')
    (tmp_path / 'checkpoint-best').mkdir()
    whole, _ = fit(replace(CONFIG, max_steps=4, save_total_limit=2), tmp_path, resume=True)
    assert [path.name for path in saved_states(tmp_path)] == ['checkpoint-3', 'checkpoint-4']
    assert sorted(path.name for path in (tmp_path / 'checkpoint-4').iterdir()) == [
        'checksums.json',
        'state.json',
        'state.safetensors',
    ]
    assert listed(tmp_path) == ['checkpoint-3', 'checkpoint-4', 'checkpoint-best']
    shutil.rmtree(tmp_path / 'checkpoint-4')
    (tmp_path / '.checkpoint-4.tmp').mkdir()  # killed while it wrote the fourth
    assert same_weights(
        whole, fit(replace(CONFIG, max_steps=4), tmp_path, make_model(seed=1), resume=True)[0]
    )


OTHER_JSON = (
    '[]',
    '{}',
    'null',
    '5',
    '"text"',
    '[' * 100_000,
    '{"state.json": [], "state.safetensors": {}}',
    '',
    '\ud83d'.encode('utf-8', 'surrogatepass'),
)


def damage(file, how):
    content = b'' if how == 'a folder' else file.read_bytes()
    if how == 'cut':
        file.write_bytes(content[:50])
    elif how == 'emptied':
        file.write_bytes(b'')
    elif how == 'a folder':
        file.unlink()
        file.mkdir()
    elif how == 'dangling link':
        file.unlink()
        file.symlink_to('nowhere')
    elif not isinstance(how, str):
        file.write_bytes(how)
    elif how == 'one bit':
        file.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    else:
        file.unlink()


@pytest.fixture(scope='module')
def three_steps(tmp_path_factory):
    "A run of three steps, its states 2 and 3, and its model."
    folder = tmp_path_factory.mktemp('three')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('ACCELERATE_USE_CPU', 'true')
        AcceleratorState._reset_state(reset_partial_state=True)
        return folder, fit(replace(CONFIG, max_steps=3), folder)[0]


def resume_three(folder, **kwargs):
    "(the resumed model, what it said)"
    lines = []
    return fit(
        replace(CONFIG, max_steps=3), folder, make_model(seed=1), resume=True, log=lines.append, **kwargs
    )[0], lines


@pytest.mark.parametrize('how', ['cut', 'one bit', 'gone', 'emptied', 'a folder', 'dangling link'])
@pytest.mark.parametrize('file', ['state.safetensors', 'state.json', 'checksums.json'])
def test_a_damaged_state_is_put_aside_for_the_one_before(three_steps, tmp_path, file, how):
    whole = three_steps[1]
    folder = shutil.copytree(three_steps[0], tmp_path / 'states')
    damage(folder / 'checkpoint-3' / file, how)
    resumed, lines = resume_three(folder)
    assert same_weights(whole, resumed)
    assert (
        len(lines) == 1
        and 'checkpoint-3: not a whole training state' in lines[0]
        and 'the one before it is looked at' in lines[0]
    )
    assert lines[0].count(str(folder)) == 1 and len(lines[0]) < 250 and '\n' not in lines[0]
    assert listed(folder) == ['checkpoint-2', 'checkpoint-3', 'damaged-checkpoint-3']


@pytest.mark.parametrize('content', OTHER_JSON, ids=range(len(OTHER_JSON)))
def test_whatever_else_the_small_files_hold_is_damage(three_steps, tmp_path, content):
    content = content if isinstance(content, bytes) else content.encode()
    for file in ('checksums.json', 'state.json'):
        folder = shutil.copytree(three_steps[0], tmp_path / file)
        damage(folder / 'checkpoint-3' / file, content)
        lines = []
        assert (
            newest_state(folder, lines.append).name == 'checkpoint-2'
            and len(lines) == 1
            and '\n' not in lines[0]
        ), lines


def test_facts_that_are_not_ours_are_one_line(three_steps, tmp_path):
    "Even where the checksums were made anew."
    for i, content in enumerate(
        ('[]', '{}', '{"step": "3", "param_groups": [], "pieces": {}, "versions": {}}')
    ):
        folder = shutil.copytree(three_steps[0], tmp_path / str(i))
        (folder / 'checkpoint-3' / 'state.json').write_text(content)
        (folder / 'checkpoint-3' / 'checksums.json').write_text(
            json.dumps(_checksums(folder / 'checkpoint-3'))
        )
        with pytest.raises(ValueError, match='checkpoint-3: not a whole training state'):
            resume_three(folder)
    (tmp_path / '0' / 'checkpoint-3' / 'state.safetensors').write_bytes(b'cut')
    with pytest.raises(ValueError, match='checkpoint-3: not a whole training state .state.safetensors'):
        read_tensors(tmp_path / '0' / 'checkpoint-3', 'model')


def test_what_else_lies_there_does_no_harm(three_steps, tmp_path):
    """A file manager's notes, folders, links, plain files with the names of states, things put aside before:
    the run resumes, saves and removes.
    """
    folder = shutil.copytree(three_steps[0], tmp_path / 'states')
    moved = tmp_path / 'moved'
    shutil.rmtree(folder / 'checkpoint-3')
    state = folder / 'checkpoint-2'
    shutil.copytree(state, moved)
    (state / '.DS_Store').write_bytes(b'x')
    (state / 'a folder').mkdir()
    (state / 'a link').symlink_to('nowhere')
    (folder / 'checkpoint-1').symlink_to(moved)  # an older one, moved to a bigger disk
    (folder / 'checkpoint-0').write_bytes(b'a file')
    (folder / 'checkpoint-9').write_bytes(b'a file')
    (folder / 'checkpoint-8').symlink_to('nowhere')
    (folder / 'damaged-checkpoint-9').mkdir()
    (folder / 'damaged-checkpoint-8').write_bytes(b'')
    (folder / '.checkpoint-7.tmp').write_bytes(b'')
    (folder / '.checkpoint-6.tmp').symlink_to(moved)
    (folder / '.checkpoint-3.tmp').write_bytes(b'')
    (folder / 'notes.txt').write_text('mine')
    resumed, lines = resume_three(folder)
    assert same_weights(three_steps[1], resumed) and len(lines) == 2, lines
    assert listed(folder) == [
        'checkpoint-2',
        'checkpoint-3',
        'damaged-checkpoint-8',
        'damaged-checkpoint-9',
        'notes.txt',
    ]
    assert (moved / 'state.safetensors').is_file(), 'what a link leads to is not ours to remove'


@pytest.mark.parametrize('how', ['cut', 'gone', 'a folder'])
def test_a_damaged_older_state_does_not_stop_a_healthy_run(tmp_path, how):
    class Damage(Callback):
        def on_save(self, run):
            if run.step == 3:
                for file in ('state.json', 'checksums.json', 'state.safetensors'):
                    damage(tmp_path / 'checkpoint-2' / file, how)

    fit(replace(CONFIG, max_steps=5), tmp_path, callbacks=[Damage()])
    assert listed(tmp_path) == ['checkpoint-4', 'checkpoint-5']


def test_an_old_state_that_cannot_be_removed_is_told(three_steps, tmp_path, monkeypatch):
    folder = shutil.copytree(three_steps[0], tmp_path / 'states')
    remove = shutil.rmtree
    shutil.rmtree(folder / 'checkpoint-3')
    os.rename(folder / 'checkpoint-2', folder / 'checkpoint-1')
    shutil.copytree(folder / 'checkpoint-1', folder / 'checkpoint-2')

    def busy(path, *args, **kwargs):
        if '.old.' in str(path):
            raise OSError(errno.EBUSY, 'Device or resource busy')
        return remove(path, *args, **kwargs)

    monkeypatch.setattr(shutil, 'rmtree', busy)
    resumed, lines = resume_three(folder)
    assert same_weights(three_steps[1], resumed) and len(lines) == 1
    assert (
        'checkpoint-1: cannot be removed (Device or resource busy); remove it by hand' in lines[0]
        or '.checkpoint-1.old.tmp' in lines[0]
    )


def test_a_state_is_written_over_one_of_its_name(tmp_path):
    from torch import nn

    toy = nn.Linear(2, 2)
    for value in (1, 2):
        save_state(tmp_path, 5, toy, torch.optim.AdamW(toy.parameters()), value=value)
        check_state(tmp_path / 'checkpoint-5')
    assert read_facts(tmp_path / 'checkpoint-5')['value'] == 2 and listed(tmp_path) == ['checkpoint-5']


@pytest.mark.parametrize('how', ['cut', 'emptied', 'gone'])
def test_nothing_but_damaged_states_is_refused_every_time(three_steps, tmp_path, how):
    folder = shutil.copytree(three_steps[0], tmp_path / 'states')
    for state in saved_states(folder):
        damage(state / 'state.safetensors', how)
    before = listed(folder)
    model = make_model(seed=1)
    for _ in range(3):
        lines = []
        with pytest.raises(
            ValueError,
            match=r'every training state is damaged \(checkpoint-3 and 1 more\); .* begin at step 0',
        ):
            fit(replace(CONFIG, max_steps=3), folder, model, resume=True, log=lines.append)
        assert [line.split(': ')[0] for line in lines] == [
            f'{folder}/checkpoint-3',
            f'{folder}/checkpoint-2',
        ] and listed(folder) == before
    assert same_weights(model, make_model(seed=1))
    with pytest.raises(ValueError, match='of an earlier run'):
        fit(replace(CONFIG, max_steps=3), folder)
    for state in saved_states(folder):
        state.rename(folder / f'damaged-{state.name}')  # as an earlier fallback leaves them
    for resume in (True, False):
        with pytest.raises(ValueError, match='every training state is damaged'):
            fit(replace(CONFIG, max_steps=3), folder, resume=resume)
    for name in before:
        shutil.rmtree(folder / f'damaged-{name}')
    resumed, lines = resume_three(folder)  # as the error says
    assert len(lines) == 1 and 'no training state to go on from; the run begins at step 0' in lines[0]


def test_the_best_state_is_never_removed(tmp_path):
    class Second(Callback):
        def on_evaluate(self, run, measures):
            run.best = 2 if run.step >= 2 else None

    fit(
        replace(CONFIG, max_steps=6, eval_steps=1),
        tmp_path,
        evaluate=lambda model, step: {},
        callbacks=[Second()],
    )
    assert [path.name for path in saved_states(tmp_path)] == ['checkpoint-2', 'checkpoint-5', 'checkpoint-6']


FULL = """
import resource, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_training import CONFIG, Callback, fit, replace
class Fill(Callback):
    def on_save(self, run):
        if run.step == 2: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
fit(CONFIG, sys.argv[2], callbacks=[Fill()])
"""


def test_a_write_that_fails_leaves_the_last_state(tmp_path):
    "The system refuses to let a file grow, in the middle of a state."
    child = subprocess.run(
        [sys.executable, '-c', FULL, os.path.dirname(__file__), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )
    last = child.stderr.strip().splitlines()[-1]
    assert (
        child.returncode == 1 and last.startswith('OSError: ') and 'checkpoint-2: cannot be written' in last
    ), child.stderr
    assert 'make room, then resume' in last and listed(tmp_path) == ['checkpoint-1']
    whole, _ = fit(CONFIG, tmp_path / 'whole')
    assert same_weights(whole, fit(CONFIG, tmp_path, make_model(seed=1), resume=True)[0]), (
        'there is room again'
    )


@pytest.mark.parametrize('file', ['state.safetensors', 'state.json', 'checksums.json'])
def test_a_full_disk_leaves_no_half_of_a_state(three_steps, tmp_path, monkeypatch, file):
    import pvtblip.decoder

    folder = shutil.copytree(three_steps[0], tmp_path / 'states')
    write = Path.write_text
    save = pvtblip.decoder.save_file
    shutil.rmtree(folder / 'checkpoint-3')

    def full(path, text, *args, **kwargs):
        if path.name != file:
            return write(path, text, *args, **kwargs)
        write(path, text[:9])
        raise OSError(errno.ENOSPC, 'No space left on device')

    def full_save(tensors, path, metadata):
        save(tensors, path)
        if path.name == file:
            raise SafetensorError('I/O error: No space left on device (os error 28)')

    with monkeypatch.context() as patch:
        patch.setattr(Path, 'write_text', full)
        patch.setattr(pvtblip.decoder, 'save_file', full_save)
        with pytest.raises(
            OSError,
            match=r'checkpoint-3: cannot be written \(.*No space left on device.*\); '
            r'make room',
        ):
            resume_three(folder)
    assert listed(folder) == ['checkpoint-2']
    assert same_weights(three_steps[1], resume_three(folder)[0])


def test_one_run_at_a_time_writes_into_a_folder(three_steps, tmp_path):
    from pvtblip.training import only_run

    folder = shutil.copytree(three_steps[0], tmp_path / 'states')
    (tmp_path / 'link').symlink_to(folder)
    with (
        only_run(folder / 'checkpoint'),
        pytest.raises(OSError, match='another process is writing it; wait for it'),
    ):
        resume_three(tmp_path / 'link' / '..' / 'link')
    resume_three(tmp_path / 'link')


LOCKED = """
import sys
sys.path.insert(0, sys.argv[1])
from pvtblip.training import only_run, processes
try:
    with only_run(f"{sys.argv[2]}/mine/run"): text = "free"
    with only_run(f"{sys.argv[2]}/taken/run"): text = "both free"
except OSError as error: text += f", then {error}"
open(f"{sys.argv[2]}/{processes().process_index}", "w").write(text)
"""


def test_the_processes_of_a_run_share_one_lock(tmp_path, run_in_two):
    with only_writer(tmp_path / 'taken' / 'run'):
        run_in_two(LOCKED, timeout=120)
    for process in range(2):
        assert (tmp_path / str(process)).read_text().startswith('free, then ') and 'another process' in (
            tmp_path / str(process)
        ).read_text()


def test_no_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    fit(replace(CONFIG, max_steps=1), tmp_path)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=1e6))
    with pytest.raises(OSError, match=r'checkpoint-1: .*MB needed, 1 MB free\); make room'):
        fit(replace(CONFIG, max_steps=1), tmp_path / 'other')
    assert listed(tmp_path / 'other') == []


def test_a_folder_that_cannot_be_written_ends_the_run_before_the_first_step(tmp_path):
    seen = []

    class Count(Callback):
        def on_step_end(self, run):
            seen.append(run.step)

    (tmp_path / 'file').write_text('')
    with pytest.raises(OSError, match='states cannot be written here'):
        fit(folder=tmp_path / 'file' / 'states', callbacks=[Count()])
    if os.geteuid():  # root may write anywhere
        (tmp_path / 'locked').mkdir(mode=0o500)
        with pytest.raises(OSError, match='states cannot be written here'):
            fit(folder=tmp_path / 'locked', callbacks=[Count()])
    assert seen == []


def test_other_versions_are_told(tmp_path):
    config = replace(CONFIG, max_steps=1)
    lines = []
    fit(config, tmp_path)
    facts = json.loads((tmp_path / 'checkpoint-1' / 'state.json').read_text())
    facts['versions']['torch'] = '2.0'
    (tmp_path / 'checkpoint-1' / 'state.json').write_text(json.dumps(facts))
    (tmp_path / 'checkpoint-1' / 'checksums.json').write_text(
        json.dumps(_checksums(tmp_path / 'checkpoint-1'))
    )
    fit(config, tmp_path, resume=True, log=lines.append)
    assert len(lines) == 1 and "torch: '2.0' then, '" in lines[0]


def test_a_finished_run_is_finished(tmp_path):
    config = replace(CONFIG, max_steps=2)
    whole, history = fit(config, tmp_path)
    again, same = fit(config, tmp_path, make_model(seed=1), resume=True)
    assert same_weights(whole, again) and same == history


def accumulate(step, micro_batches):
    "Gradients of the step, read off a plain SGD with rate 1."
    model = make_model(dropout=0.0)
    before = {k: v.clone() for k, v in model.named_parameters()}
    step(
        Accelerator(cpu=True),
        model,
        micro_batches,
        torch.optim.SGD(model.parameters(), lr=1.0),
        TrainingConfig(max_grad_norm=1e9),
    )
    return {k: before[k] - v.detach() for k, v in model.named_parameters()}


def mean_of_means(accelerator, model, batches, optimizer, config):
    for batch in batches:
        (model(batch['pixel_values'], batch['input_ids'], batch['labels']).loss / len(batches)).backward()
    optimizer.step()


def test_accumulated_gradients_are_those_of_the_big_batch():
    tokenizer = make_model().tokenizer
    data = make_data()
    captions = [
        'a dog',
        'a cat',
        'two birds sit on a wire above a very busy street in the rain',
        'a man',
        'one',
        'a red and a green bus at a stop',
    ]
    items = [data[i] | dict(captions=captions[i : i + 1]) for i in range(6)]
    collate = Collate(tokenizer)
    whole = accumulate(training_step, [collate(items)])
    for cuts in ((0, 2, 6), (0, 1, 3, 6), (0, 5, 6)):
        pieces = [collate(items[a:b]) for a, b in zip(cuts, cuts[1:])]
        for name, gradient in accumulate(training_step, [*pieces, dict(broken=[])]).items():
            assert_close(gradient, whole[name], rtol=0, atol=1e-6)
        naive = accumulate(mean_of_means, pieces)
        assert max((naive[k] - whole[k]).abs().max().item() for k in whole) > 1e-3, (
            'the naive mean must fail this check'
        )


def test_bf16_stays_finite_and_leaves_the_model_as_it_was():
    model, history = fit(replace(CONFIG, mixed_precision='bf16'))
    assert all(math.isfinite(entry['loss']) for entry in history)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())
    assert history[-1]['loss'] < history[0]['loss']
    assert not model.training and 'forward' not in vars(model), (
        "accelerate's autocast wrapper must not stay on the model"
    )
    reference = fit()[1]  # a second precision in one process
    assert history[-1]['loss'] != reference[-1]['loss']
    assert abs(history[-1]['loss'] - reference[-1]['loss']) < 0.2


def test_fp16_without_a_gpu_is_one_clear_line():
    with pytest.raises(ValueError) as caught:
        fit(replace(CONFIG, mixed_precision='fp16'))
    assert '\n' not in str(caught.value) and 'GPU' in str(caught.value)


GRADIENTS = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from accelerate import Accelerator
from safetensors.torch import save_file
from test_training import TrainingConfig, make_model, step_batches, training_step
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
plain = make_model(dropout=0.0)
before = {k: v.clone() for k, v in plain.named_parameters()}
model, optimizer = accelerator.prepare(plain, torch.optim.SGD(plain.parameters(), lr=1.0))
for case in ("unequal", "broken", "all broken"):
    plain.load_state_dict(before)
    batches = step_batches(case, accelerator.process_index)
    loss = training_step(accelerator, model, batches, optimizer, TrainingConfig(max_grad_norm=1e9))
    gradients = {k: before[k] - v.detach() for k, v in plain.named_parameters()}
    found = gradients | ({} if loss is None else dict(loss=loss))
    save_file(found, f"{sys.argv[2]}/{case}-{accelerator.process_index}.safetensors")
"""
UNEQUAL = [
    'a dog',
    'a cat',
    'two birds sit on a wire above a very busy street in the rain',
    'a man',
    'one',
    'a red and a green bus at a stop',
]


def step_batches(case, process=None):
    "The micro-batches of one process of two; None: all in one batch."
    data = make_data()
    collate = Collate(make_model().tokenizer)
    items = [data[i] | dict(captions=UNEQUAL[i : i + 1]) for i in range(6)]
    shares = dict(
        unequal=[[items[:1], items[1:2]], [items[2:5], items[5:]]],
        broken=[[[BrokenImage('x.jpg', 'empty')]] * 2, [items[:4], items[4:]]],
    )
    shares['all broken'] = [[[BrokenImage('x.jpg', 'empty')]] * 2] * 2
    if process is None:
        return [collate([item for share in shares[case] for batch in share for item in batch])]
    return [collate(batch) for batch in shares[case][process]]


def test_two_processes_give_the_gradients_of_one(tmp_path, run_in_two):
    """1 and 1 captions here, 3 and 1 there, of 2 to 15 words; then one process whose photos are all broken;
    then nothing but broken photos.
    """
    run_in_two(GRADIENTS, timeout=120)
    for case in ('unequal', 'broken'):
        whole = accumulate(training_step, step_batches(case))
        for process in range(2):
            gradients = load_file(tmp_path / f'{case}-{process}.safetensors')
            assert gradients.pop('loss').isfinite() and gradients.keys() == whole.keys()
            for name in whole:
                assert_close(gradients[name], whole[name], rtol=0, atol=1e-6)
    for process in range(2):
        gradients = load_file(tmp_path / f'all broken-{process}.safetensors')
        assert 'loss' not in gradients and not any(gradient.any() for gradient in gradients.values())


class WithBroken(ShapesDataset):
    "Photos 0 and 3 cannot be read."

    def __getitem__(self, item):
        return (
            BrokenImage(f'{item[1]}.jpg', 'the file is empty')
            if item[1] in (0, 3)
            else super().__getitem__(item)
        )


def test_broken_photos_are_reported_and_passed_over(tmp_path):
    data = WithBroken(make_data().transform, length=7, captions_per_image=2, image_size=32)
    model, history = fit(replace(CONFIG, max_steps=6), tmp_path, data=data)
    reported = {file: reason for entry in history for file, reason in entry['broken'].items()}
    assert reported == {'0.jpg': 'the file is empty', '3.jpg': 'the file is empty'}
    assert json.loads((tmp_path / 'checkpoint-6' / 'state.json').read_text())['history'] == history
    assert not same_weights(model, make_model())


def test_nothing_but_broken_photos_changes_nothing():
    data = WithBroken(make_data().transform, length=1, image_size=32)
    config = TrainingConfig(max_steps=3, batch_size=1, logging_steps=3, weight_decay=0.5)
    model, history = fit(config, data=data)
    assert (
        history[0]['loss'] is None
        and history[0]['captions_per_second'] == 0
        and same_weights(model, make_model())
    )
    plot_history(history)


def test_a_loss_that_is_no_number_ends_the_run_before_it_is_saved(tmp_path):
    model = make_model()
    with torch.no_grad():
        model.decoder.word_embedding[2003] = math.nan  # "is", which the captions use
    with pytest.raises(
        FloatingPointError, match=r'\(loss nan\) at step 1; the names of its photos are in .*nonfinite-1.json'
    ):
        fit(folder=tmp_path, model=model)
    assert saved_states(tmp_path) == []
    with pytest.raises(FloatingPointError, match=r"at step 1; its photos: 'train \d+', "):
        fit(model=model)


class Poisoned(ShapesDataset):
    "In the second pass scene 3 has a pixel that is no number."

    def __getitem__(self, item):
        made = super().__getitem__(item)
        if item == (1, 3):
            made['pixel_values'][0, 5, 5] = math.nan
        return made | dict(file=f'{item[1]}.jpg')


@pytest.mark.parametrize('logging_steps', [1, 100])
def test_the_photo_that_broke_the_loss_is_named(tmp_path, logging_steps):
    data = Poisoned(make_data().transform, length=7, captions_per_image=2, image_size=32)
    with pytest.raises(FloatingPointError) as caught:
        fit(replace(CONFIG, logging_steps=logging_steps), tmp_path, data=data)
    (step,) = (int(path.stem.split('-')[1]) for path in tmp_path.glob('nonfinite-*.json'))
    saved = json.loads((tmp_path / f'nonfinite-{step}.json').read_text())
    assert (
        '3.jpg' in saved['files']
        and len(saved['files']) == 4
        and saved['step'] == step
        and f'at step {step};' in str(caught.value)
    )
    assert newest(tmp_path) == step - 1
    assert all(
        tensor.isfinite().all()
        for tensor in load_file(saved_states(tmp_path)[-1] / 'state.safetensors').values()
    )


def test_a_gradient_that_is_no_number_is_seen_in_its_own_step():
    class Explode(Callback):
        def on_train_begin(self, run):
            run.model.decoder.word_embedding.register_hook(lambda gradient: gradient * math.inf)

    with pytest.raises(FloatingPointError, match=r'a gradient is no number any more .* at step 1;'):
        fit(callbacks=[Explode()])


def test_frozen_weights_stay(tmp_path):
    model = make_model()
    model.encoder.requires_grad_(False)
    eyes = {k: v.clone() for k, v in model.encoder.state_dict().items()}
    whole, _ = fit(replace(CONFIG, max_steps=4), tmp_path, model)
    assert all(torch.equal(eyes[k], v) for k, v in whole.encoder.state_dict().items())
    shutil.rmtree(tmp_path / 'checkpoint-4')
    other = make_model(seed=1)
    other.encoder.requires_grad_(False)
    assert same_weights(whole, fit(replace(CONFIG, max_steps=4), tmp_path, other, resume=True)[0])


def test_schedule_for_many_lengths():
    for total in (1, 2, 3, 10, 1000):
        for warmup in {0, 1, total // 20, total // 2, total - 1}:
            factors = [learning_rate_factor(step, warmup, total) for step in range(total)]
            assert min(factors) > 0 and max(factors) <= 1
            assert factors[:warmup] == sorted(factors[:warmup]) and factors[warmup:] == sorted(
                factors[warmup:], reverse=True
            )


def test_every_trained_weight_is_in_one_group():
    model = make_model()
    groups = parameter_groups(model, 0.1)
    grouped = [id(p) for group in groups for p in group['params']]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    norms = {
        id(p)
        for module in model.modules()
        if isinstance(module, torch.nn.LayerNorm)
        for p in module.parameters()
    }
    assert norms <= {id(p) for p in groups[1]['params']} and groups[1]['weight_decay'] == 0


def test_what_a_config_cannot_be():
    for change, message in (
        (dict(max_steps=0), 'max_steps is 0'),
        (dict(learning_rate=-1), 'learning_rate is -1'),
        (dict(learning_rate=math.nan), 'learning_rate is nan'),
        (dict(save_steps=-1), 'save_steps is -1'),
        (dict(mixed_precision='bfloat16'), "must be 'no' or 'bf16' or 'fp16'"),
        (dict(seed=2**32), 'seed is 4294967296'),
        (dict(batch_size='8'), "batch_size is '8'"),
        (dict(torch_compile=1), 'torch_compile is 1'),
        (dict(seed=10**22), 'seed is 10000000000000000000000; it must be a whole number'),
        (dict(seed=10**4000), 'seed is 1000'),
        (dict(batch_size=10**20), 'batch_size is 1'),
        (dict(batch_size=1e3), 'batch_size is 1000.0; it must be a whole number'),
        (dict(dataloader_num_workers=10**11), 'from 0 to 512'),
        (dict(max_steps=10**12), 'max_steps'),
        (dict(max_steps=True), 'max_steps is True'),
        (dict(eval_steps=-1), 'eval_steps'),
        (dict(gradient_accumulation_steps=10**9), 'gradient_acc'),
        (dict(learning_rate=math.inf), 'learning_rate is inf'),
        (dict(learning_rate='fast'), "learning_rate is 'fast'; it must be a number"),
        (dict(learning_rate=10**400), 'learning_rate is 1000'),
        (dict(adam_beta2=1.0), 'adam_beta2 is 1.0; it must be a number from 0 to 0.999999'),
        (dict(warmup_ratio=2.0), 'warmup_ratio'),
        (dict(weight_decay=math.nan), 'weight_decay is nan'),
        (dict(encoder_lr_scale=math.inf), 'encoder_lr_scale'),
        (dict(max_grad_norm=0.0), 'max_grad_norm is 0.0; it must be a number above 0'),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            TrainingConfig(**change)
        assert len(str(caught.value)) < 250
    TrainingConfig(eval_steps=0, max_grad_norm=1e9, seed=1, dataloader_num_workers=512, learning_rate=1)


def test_seeds_of_steps_and_processes_differ():
    def draw(*address):
        seed_step(*address)
        return float(torch.rand(()))

    assert draw(0, 1) == draw(0, 1)
    assert (
        len({draw(seed, step, process) for seed in range(2) for step in range(5) for process in range(2)})
        == 20
    )
