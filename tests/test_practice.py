"""What a notebook cell cannot do for the pieces around the loop: real signals, several processes, a wheel
without peft, odd config files.
"""

import copy
import datetime
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_training import (
    CONFIG,
    UNEQUAL,
    damage,
    fit,
    make_data,
    make_model,
    newest,
    on_the_processor,  # noqa: F401 (a fixture)
    same_weights,
    without_speed,
)  # noqa: F401 (a fixture)
from torch.testing import assert_close

from pvtblip.pvt_encoder import BrokenImage
from pvtblip.training import Collate
from pvtblip.files import printable, setting_names, write_whole
from pvtblip.generation import GenerationConfig
from pvtblip.photo_training import PhotoRun
from pvtblip.decoder import Captioner, CaptionerConfig, DecoderConfig
from pvtblip.truth import gap_of, shuffled_losses
from pvtblip.config import change_config, read_config, to_toml
from pvtblip.practice import (
    HeldOutLoss,
    KeepBest,
    LoraSettings,
    PracticeConfig,
    StopOnSignal,
    HeldOutCaptions,
    WeightAverage,
    add_lora,
    checkpoint_gradients,
    dry_run,
    load_best,
    measures,
    merge_lora,
    run_training,
)
from pvtblip.pvt_encoder import EncoderConfig
from pvtblip.training import (
    Callback,
    TrainingConfig,
    load_state,
    save_state,
    saved_states,
    train,
    training_loader,
)

CHILD = """
import sys, time, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_practice import *
model = make_model(seed=99 if saved_states(sys.argv[2]) else 0)
options = dict(resume=True, evaluate=held_out, progress=False, callbacks=[Sleep()])
run_training(model, make_data(), WITH_PIECES, PIECES, sys.argv[2], **options)
"""
WITH_PIECES = replace(CONFIG, max_steps=24, save_steps=0, eval_steps=2, dataloader_num_workers=1)


@dataclass
class RunConfig:
    "Everything that makes a run."

    captioner: CaptionerConfig = field(default_factory=CaptionerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    practice: PracticeConfig = field(default_factory=PracticeConfig)


def write_config(config, file):
    text = to_toml(config) if file.suffix == '.toml' else json.dumps(asdict(config), indent=2)
    write_whole(file, text)


PIECES = PracticeConfig(save_minutes=0.001, metric_for_best_model='validation_loss', ema_decay=0.9)


def held_out(model, step):
    return HeldOutLoss(make_data(4, split='unseen_scenes'), model.tokenizer)(model, step)


class Sleep(Callback):
    "Steps that can be hit."

    def on_step_end(self, run):
        time.sleep(0.05)


def start_child(folder, code=CHILD, **options):
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'ACCELERATE_USE_CPU': 'true'}
    return subprocess.Popen(
        [sys.executable, '-c', code, os.path.dirname(__file__), str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


def wait_for(child, folder, step):
    while child.poll() is None and newest(folder) < step:
        time.sleep(0.01)
    assert child.poll() is None, child.communicate()


@pytest.mark.parametrize('waits', [(6,), pytest.param((2, 9, 15), marks=pytest.mark.slow)])
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_loses_nothing(tmp_path, number, waits):
    """As a terminal and a scheduler do it: the processes that read photos get it, too. Average, best and
    history resume with the rest.
    """
    folder = tmp_path / 'stopped'
    moment = random.Random(int(number))
    for wait in waits:
        child = start_child(folder, start_new_session=True)
        wait_for(child, folder, wait)
        time.sleep(moment.uniform(0, 0.1))
        os.killpg(child.pid, number)
        out, err = child.communicate(timeout=60)
        step = newest(folder)
        assert child.returncode == 128 + number, err
        assert (
            f'stopped by {number.name} after step {step} of 24; the state is '
            f'{folder}/checkpoint-{step}: resume to go on' in out
        )
        assert 'Error' not in err and wait <= step < 24
    child = start_child(folder)
    out, err = child.communicate(timeout=120)
    assert child.returncode == 0 and 'the best by validation_loss' in out, err
    whole = make_model()
    history = run_training(
        whole,
        make_data(),
        WITH_PIECES,
        PIECES,
        tmp_path / 'whole',
        evaluate=held_out,
        progress=False,
        log=lambda line: None,
    )
    resumed = make_model(seed=1)
    assert load_best(folder, resumed) == load_best(
        tmp_path / 'whole', copy.deepcopy(resumed)
    ) and same_weights(whole, resumed)
    facts = json.loads((folder / 'checkpoint-24' / 'state.json').read_text())
    assert without_speed(facts['history']) == without_speed(history)


def test_a_second_signal_ends_at_once(tmp_path):
    code = CHILD.replace('Sleep()', 'Sleep(), Stuck()').replace(
        'model = make_model',
        """
class Stuck(Callback):
    def on_step_end(self, run):
        if run.step == 3:
            print('stuck', flush=True)
            time.sleep(60)
model = make_model""",
    )
    child = start_child(tmp_path, code)
    assert any('stuck' in line for line in iter(child.stdout.readline, ''))
    for _ in range(2):
        child.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    assert child.wait(timeout=20) == 128 + signal.SIGTERM


def test_signals_are_given_back_after_an_error():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), StopOnSignal():
        1 / 0
    lines = []
    with pytest.raises(SystemExit, match='130'), StopOnSignal(lines.append):
        os.kill(os.getpid(), signal.SIGINT)  # before the first step
    assert lines == ['stopped by SIGINT before the first step was done: there is nothing to resume']
    assert signal.getsignal(signal.SIGINT) is before


TOGETHER = """
import os, signal, sys, torch
from pvtblip.training import make_accelerator
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_practice import *
class Press(Callback):
    def on_step_end(self, run):
        if run.step == 3 and run.accelerator.process_index == 1: os.kill(os.getpid(), signal.SIGTERM)
config = replace(CONFIG, max_steps=8, save_steps=0, eval_steps=2)
options = dict(evaluate=held_out, progress=False, callbacks=[Press()])
try: run_training(make_model(), make_data(9), config, PracticeConfig(), sys.argv[2], **options)
except SystemExit as end: open(f"{sys.argv[2]}/exit-{make_accelerator(config).process_index}", "w").write(str(end.code))
"""


def test_two_processes_stop_together(tmp_path, run_in_two):
    "Only one of them gets the signal; it is seen one step later, since the piece that sends it comes last."
    done = run_in_two(TOGETHER, timeout=120)
    assert [(tmp_path / f'exit-{i}').read_text() for i in range(2)] == ['143', '143'] and newest(
        tmp_path
    ) == 4
    assert done.stdout.count('stopped by SIGTERM after step 4 of 8') == 1


SPLIT = """
import shutil, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from test_practice import *
class Split(Accelerator):
    "What Accelerate does for FSDP2 on a GPU: split the model in place, give the optimizer the new weights."
    def prepare(self, *things):
        if len(things) == 1: return super().prepare(*things)
        model, optimizer = things
        names = {p: name for name, p in model.named_parameters()}
        mesh = init_device_mesh("cpu", (2,))
        for block in model.encoder.backbone.stages[0].blocks: fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        now = dict(model.named_parameters())
        for group in optimizer.param_groups: group["params"] = [now[names[p]] for p in group["params"]]
        return model, super().prepare(optimizer)
    def clip_grad_norm_(self, parameters, most): return torch.nn.utils.clip_grad_norm_(parameters, most)
folder = Path(sys.argv[2])
config = replace(CONFIG, max_steps=6, save_steps=3, eval_steps=2)
def go(seed, callbacks=(), **kwargs):
    model = make_model(seed)
    kwargs |= dict(accelerator=Split(cpu=True), callbacks=[WeightAverage(0.9)])
    return model, train(model, make_data(9), config, folder, evaluate=held_out, progress=False, **kwargs)
model, history = go(0)
assert type(model.decoder.word_embedding).__name__ == "DTensor" or hasattr(model.decoder.word_embedding, "full_tensor")
main = Split(cpu=True).is_main_process
if main:
    shutil.copytree(folder / "checkpoint-6", folder / "whole")
    shutil.rmtree(folder / "checkpoint-6")
Split(cpu=True).wait_for_everyone()
again, history_again = go(1, resume=True)
assert without_speed(history) == without_speed(history_again)
"""


def test_weights_that_are_split_over_processes_resume(tmp_path, run_in_two):
    "FSDP2 (torch's `fully_shard`) on two processors; Accelerate itself splits on GPUs only."
    from safetensors.torch import load_file

    run_in_two(SPLIT, timeout=200)
    ours, theirs = (load_file(tmp_path / name / 'state.safetensors') for name in ('whole', 'checkpoint-6'))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert {k.removeprefix('model.'): v.shape for k, v in ours.items() if k.startswith('model.')} == {
        k: v.shape for k, v in make_model().state_dict().items()
    }
    fresh = make_model(seed=2)
    assert load_best(tmp_path, fresh) == 6 and not same_weights(fresh, make_model(seed=2))


def test_held_out_loss_is_that_of_one_big_batch():
    model = make_model()
    data = make_data(11)
    whole = Collate(model.tokenizer)([data[i] for i in range(11)])
    with torch.no_grad():
        expected = model.eval()(whole['pixel_values'], whole['input_ids'], whole['labels']).loss
    found = HeldOutLoss(data, model.tokenizer, batch_size=4)(model)
    assert abs(found['validation_loss'] - expected.item()) < 1e-5
    smoothed = Captioner(replace(model.config, label_smoothing=0.5))
    smoothed.load_state_dict(model.state_dict())
    assert abs(HeldOutLoss(data, model.tokenizer)(smoothed)['validation_loss'] - expected.item()) < 1e-5
    assert HeldOutLoss(data, model.tokenizer, batch_size=5)(model) == HeldOutLoss(
        data, model.tokenizer, batch_size=5, images=10
    )(model)  # the eleventh has none to be exchanged with
    with pytest.raises(ValueError, match='at least two'):
        HeldOutLoss(make_data(1), model.tokenizer)
    broken = [BrokenImage('a.jpg', 'empty')] * 3
    with pytest.raises(ValueError, match='no held-out photo could be read'):
        HeldOutLoss(broken, model.tokenizer)(model)
    with pytest.raises(ValueError, match='no held-out photo could be read'):
        HeldOutCaptions(broken, model.tokenizer, None)(model)


def test_held_out_loss_leaves_out_what_the_model_cannot_say():
    model = make_model()
    batch = Collate(model.tokenizer)([make_data(4)[i] for i in range(4)])
    ids, labels = batch['input_ids'], batch['labels']
    known = [i for i in labels.unique().tolist() if i >= 0]
    model.set_output_vocabulary(known[::2])
    allowed = torch.isin(labels, model.output_ids)
    found = shuffled_losses(model.eval(), batch['pixel_values'], ids, labels)
    assert found[2] == allowed.sum() < (labels >= 0).sum()
    with torch.inference_mode():
        expected = model(batch['pixel_values'], ids, labels.masked_fill(~allowed, -100)).loss
    assert abs(gap_of(found)['real'] - expected.item()) < 1e-5


def test_a_run_that_ended_early_stays_ended(tmp_path):
    worse = lambda model, step: dict(validation_loss=float(step))
    config = replace(CONFIG, eval_steps=1)
    pieces = PracticeConfig(metric_for_best_model='validation_loss', early_stopping_patience=3)
    first, again = make_model(), make_model(seed=1)
    history = run_training(
        first, make_data(), config, pieces, tmp_path, evaluate=worse, progress=False, log=lambda line: None
    )
    assert newest(tmp_path) == 4
    lines = []
    assert (
        run_training(
            again,
            make_data(),
            config,
            pieces,
            tmp_path,
            resume=True,
            evaluate=worse,
            progress=False,
            log=lines.append,
        )
        == history
    )
    assert same_weights(first, again) and lines == [
        'the model is that of step 1, the best by validation_loss'
    ]


def test_a_run_without_a_best_state_says_so(tmp_path):
    lines = []
    pieces = PracticeConfig(metric_for_best_model='validation_loss')
    run_training(
        make_model(),
        make_data(),
        replace(CONFIG, eval_steps=5),
        pieces,
        tmp_path,
        evaluate=lambda model, step: dict(validation_loss=float('nan')),
        progress=False,
        log=lines.append,
    )
    assert (
        lines[-1]
        == f'the model is that of step {CONFIG.max_steps}, the newest, since no measure was a number'
    )


@pytest.mark.parametrize(
    'file, how',
    [
        ('state.safetensors', 'cut'),
        ('state.safetensors', 'one bit'),
        ('checksums.json', b'[]'),
        ('state.json', 'a folder'),
    ],
)
def test_where_the_best_state_is_damaged_the_newest_is_taken_and_told(tmp_path, file, how):
    class Damage(Callback):
        def on_train_end(self, run):
            damage(tmp_path / 'checkpoint-1' / file, how)

    lines, worse = [], lambda model, step: dict(validation_loss=float(step))
    config = replace(CONFIG, max_steps=3, eval_steps=1)
    pieces = PracticeConfig(metric_for_best_model='validation_loss')
    model = make_model()
    run_training(
        model,
        make_data(),
        config,
        pieces,
        tmp_path,
        evaluate=worse,
        progress=False,
        log=lines.append,
        callbacks=[Damage()],
    )
    assert (
        len(lines) == 2
        and 'checkpoint-1: not a whole training state' in lines[0]
        and 'the newest is taken in its place' in lines[0]
    )
    assert lines[1] == 'the model is that of step 3, the newest, since the best one is damaged'
    with pytest.warns(UserWarning, match='the newest is taken'):
        assert load_best(tmp_path, make_model(seed=1)) == 3
    for state in saved_states(tmp_path):
        damage(state / 'state.safetensors', 'gone')
    with pytest.raises(ValueError, match='every training state is damaged'):
        load_best(tmp_path, model, log=lines.append)


def test_numbers_out_of_bounds():
    for kind, change, message in (
        (LoraSettings, dict(r=10**9), 'r is 1000000000; it must be a whole number from 0 to 4,096'),
        (LoraSettings, dict(lora_alpha=float('nan')), 'lora_alpha is nan'),
        (LoraSettings, dict(lora_dropout=1.0), 'lora_dropout'),
        (PracticeConfig, dict(save_minutes=float('inf')), 'save_minutes is inf'),
        (PracticeConfig, dict(save_minutes=float('nan')), 'save_minutes is nan'),
        (PracticeConfig, dict(ema_decay=1.0), 'ema_decay is 1.0'),
        (PracticeConfig, dict(early_stopping_patience=-1), 'early_stopping_patience is -1'),
        (PracticeConfig, dict(early_stopping_patience=10**20), 'early_stopping_patience is 1'),
    ):
        with pytest.raises(ValueError, match=message):
            kind(**change)


def test_a_measure_that_is_no_number_is_never_the_best(tmp_path):
    values = {1: float('nan'), 2: 3.0, 3: float('inf'), 4: 4.0}
    fit(
        replace(CONFIG, max_steps=4, eval_steps=1),
        tmp_path,
        evaluate=lambda model, step: dict(score=values[step]),
        callbacks=[KeepBest('score', greater_is_better=True)],
    )
    assert json.loads((tmp_path / 'checkpoint-4' / 'state.json').read_text())['best'] == 4


def test_pieces_are_part_of_the_run(tmp_path):
    config = replace(CONFIG, max_steps=2)
    fit(config, tmp_path, callbacks=[WeightAverage(0.9)])
    with pytest.raises(ValueError, match='WeightAverage decay: 0.9 then, 0.99 now'):
        fit(config, tmp_path, resume=True, callbacks=[WeightAverage(0.99)])
    with pytest.raises(ValueError, match='WeightAverage decay: 0.9 then, None now'):
        fit(config, tmp_path, resume=True)
    with pytest.raises(ValueError, match='lora r: 4 then, 2 now'):
        for r in (4, 2):
            run_training(
                make_model(),
                make_data(),
                config,
                PracticeConfig(lora=LoraSettings(r=r)),
                tmp_path / 'lora',
                resume=True,
                progress=False,
            )


WITHOUT_PEFT = """
import sys, torch
sys.modules["peft"] = None                                                            # importing it raises ImportError
from pvtblip.decoder import Captioner
from safetensors.torch import load_file
inputs = load_file(sys.argv[1] + "/inputs.safetensors")
logits = Captioner.from_pretrained(sys.argv[1] + "/model")(inputs["pixels"], inputs["ids"], inputs["labels"]).logits
torch.testing.assert_close(logits, inputs["logits"], rtol=0, atol=1e-5)
"""


def test_a_merged_model_needs_no_peft(tmp_path):
    from safetensors.torch import save_file

    folder = tmp_path / 'states'
    config = replace(CONFIG, max_steps=6, learning_rate=1e-2)
    whole = add_lora(make_model(), LoraSettings(r=4))
    train(whole, make_data(), config, folder, progress=False)
    frozen = {name for name, p in whole.named_parameters() if not p.requires_grad}
    fresh = add_lora(make_model(), LoraSettings(r=4)).state_dict()
    assert frozen and all(torch.equal(whole.state_dict()[name], fresh[name]) for name in frozen)
    assert (
        not any('crossattention' in name for name in frozen)
        and sum('lora_A' in name for name in fresh) == 2 * 6
    )
    batch = Collate(whole.tokenizer)([make_data()[i] for i in range(3)])
    with torch.no_grad():
        logits = whole(batch['pixel_values'], batch['input_ids'], batch['labels']).logits
    merge_lora(whole).save_pretrained(tmp_path / 'model')
    assert whole.state_dict().keys() == make_model().state_dict().keys()
    save_file(
        dict(pixels=batch['pixel_values'], ids=batch['input_ids'], labels=batch['labels'], logits=logits),
        tmp_path / 'inputs.safetensors',
    )
    subprocess.run([sys.executable, '-c', WITHOUT_PEFT, tmp_path], check=True, timeout=120)


@pytest.mark.parametrize(
    'encoder',
    [
        EncoderConfig.tiny(image_size=32, stages=(0,)),
        EncoderConfig('resnet18', image_size=32, stages=(2,)),
        EncoderConfig('vit_tiny_patch16_224', image_size=32, stages=(2,)),
    ],
)
def test_checkpointing_changes_no_gradient(encoder, dtype=torch.float32):
    torch.manual_seed(0)
    model = Captioner(
        CaptionerConfig.tiny(
            encoder=encoder, decoder=DecoderConfig.tiny(hidden_size=32, hidden_dropout_prob=0.1)
        )
    ).train()
    other = checkpoint_gradients(copy.deepcopy(model))
    rows = model.tokenizer(UNEQUAL)
    pixels = torch.randn(6, 3, 32, 32)
    found = []
    for captioner in (model, other):
        torch.manual_seed(1)
        with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
            captioner(pixels, rows['input_ids'], rows['labels']).loss.backward()
        found.append({name: p.grad for name, p in captioner.named_parameters()})
    for name, gradient in found[0].items():
        assert_close(found[1][name], gradient, rtol=0, atol=0)
    assert model.state_dict().keys() == other.state_dict().keys()


def test_checkpointing_changes_no_gradient_in_bf16():
    test_checkpointing_changes_no_gradient(EncoderConfig.tiny(image_size=32, stages=(0,)), torch.bfloat16)


@pytest.mark.slow
def test_a_compiled_run_is_the_same_but_for_rounding(tmp_path):
    config = replace(CONFIG, max_steps=4, logging_steps=1)
    plain, compiled = (
        fit(replace(config, torch_compile=on), tmp_path / str(on), model=make_model(dropout=0.0))[1]
        for on in (False, True)
    )
    assert [entry['loss'] for entry in compiled] == pytest.approx(
        [entry['loss'] for entry in plain], abs=1e-4
    )


def test_the_scaler_of_fp16_is_part_of_a_state(tmp_path):
    "fp16 itself needs a GPU; its scaler also counts on a processor."
    model = torch.nn.Linear(2, 2)
    scaler = torch.amp.GradScaler('cpu', init_scale=2.0**10, growth_interval=2)
    optimizer = torch.optim.AdamW(model.parameters())
    for scale in (1.0, 1.0, float('inf')):  # it grows, then meets an overflow
        scaler.scale(model(torch.ones(2)).sum() * scale).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    state = save_state(tmp_path, 3, model, optimizer, scaler)
    fresh = torch.amp.GradScaler('cpu')
    load_state(state, model, optimizer, fresh)
    assert fresh.state_dict() == scaler.state_dict() and scaler.get_scale() == 2.0**10


def test_a_dry_run_changes_nothing(tmp_path):
    model = make_model()
    before = copy.deepcopy(model)
    state = torch.get_rng_state()
    python = random.getstate()
    report = dry_run(
        model,
        make_data(),
        CONFIG,
        PracticeConfig(ema_decay=0.9, gradient_checkpointing=True, lora=LoraSettings(r=2)),
    )
    assert (
        same_weights(model, before)
        and torch.equal(state, torch.get_rng_state())
        and python == random.getstate()
    )
    assert all(p.requires_grad for p in model.parameters()) and report['trained_parameters'] < report[
        'parameters'
    ] == sum(p.numel() for p in model.parameters())
    assert (
        report['hours'] == pytest.approx(report['seconds_per_step'] * 10 / 3600)
        and report['seconds_per_step'] > 0
        and report['peak_memory'] > 1e8
    )
    seen, steps = [], []

    class Watch(Callback):
        def on_step_end(self, run):
            steps.append((run.step, run.model, [batch['files'] for batch in run.batches]))

    def pieces(trial):
        seen.append(trial)
        short = partial(training_loader, make_data(), trial.tokenizer, replace(CONFIG, max_steps=2), 0)
        return (lambda step, accelerator: short(accelerator)), [Watch()]

    dry_run(model, make_data(), CONFIG, pieces=pieces)
    assert (
        [step for step, *_ in steps] == [1, 2, 3, 4]
        and seen[0] is steps[0][1] is not model
        and same_weights(model, before)
    )
    assert [files for *_, files in steps[:2]] == [files for *_, files in steps[2:]] and steps[0][2] != steps[
        1
    ][2], "the run's own two batches, again"
    plain = dry_run(model, make_data(), CONFIG)
    fit(replace(CONFIG, max_steps=1), tmp_path, make_model())
    assert plain['state_size'] == pytest.approx(
        (tmp_path / 'checkpoint-1' / 'state.safetensors').stat().st_size, rel=0.05
    )
    assert same_weights(fit()[0], fit(model=model)[0]), 'a run after a dry run is the run without one'


@dataclass
class Part:
    number: int = 1
    share: float = 0.5
    words: list[str] = field(default_factory=list)


@dataclass
class Tree:
    part: Part = field(default_factory=Part)
    text: str = 'a'  # with a "reason" # and more
    maybe: int | None = None  # may be missing
    switch: bool = False
    pair: tuple = (1,)
    table: dict = field(default_factory=dict)


texts = st.text(st.characters(exclude_categories=['Cs']))
trees = st.builds(
    Tree,
    st.builds(
        Part, st.integers(-(2**60), 2**60), st.floats(allow_nan=False, allow_infinity=False), st.lists(texts)
    ),
    texts,
    st.none() | st.integers(-9, 9),
    st.booleans(),
    st.lists(st.integers(-9, 9)).map(tuple),
    st.dictionaries(
        texts, st.lists(st.floats(allow_nan=False, allow_infinity=False)) | texts | st.booleans()
    ),
)


@settings(max_examples=200, deadline=None)
@given(trees)
def test_any_config_round_trips(tmp_path_factory, tree):
    folder = tmp_path_factory.getbasetemp()
    for name in ('any.toml', 'any.json'):
        write_config(tree, folder / name)
        assert read_config(Tree, folder / name) == tree


def test_real_configs_round_trip(tmp_path):
    for config in (
        RunConfig(),
        RunConfig(
            CaptionerConfig.tiny(output_vocabulary=[5, 102]),
            TrainingConfig(learning_rate=1e-5),
            PracticeConfig(lora=LoraSettings(r=8), log_with='tensorboard'),
        ),
    ):
        for name in ('run.toml', 'run.json'):
            write_config(config, tmp_path / name)
            assert read_config(RunConfig, tmp_path / name) == config
    (tmp_path / 'short.toml').write_text('[training]\nmax_steps = 7\nlearning_rate = 1\n')
    assert read_config(RunConfig, tmp_path / 'short.toml') == RunConfig(
        training=TrainingConfig(max_steps=7, learning_rate=1)
    )
    assert 'max_steps = 1000  # optimizer steps, the whole run' in to_toml(RunConfig())


@pytest.mark.parametrize(
    'text, message',
    [
        (
            '[training]\nlearning_rat = 1.0',
            "no setting is called 'training.learning_rat'; did you mean training.learning_rate",
        ),
        ('learning_rate = 1.0', "no setting is called 'learning_rate'; did you mean training.learning_rate?"),
        ('[practise]\nema_decay = 0.9', "no setting is called 'practise'"),
        ('[training]\nmax_steps = true', 'training.max_steps is True; it must be a whole number from 1'),
        ('[training]\nmax_steps = 1.5', 'training.max_steps is 1.5; it must be a whole number'),
        ('[practice]\nlora = 4', 'practice.lora is 4; it must be a table of settings'),
        ('[practice.lora]\nr = -1', 'practice.lora.r is -1'),
        ('[practice]\nearly_stopping_patience = 3', 'early_stopping_patience needs metric_for_best_model'),
        ('[captioner.decoder]\nhidden_sise = 4', 'did you mean captioner.decoder.hidden_size'),
        ('[training\n', 'not TOML'),
        ('a = 1\na = 2', 'not TOML'),
        ('[training]\nlearning_rate = nan', 'training.learning_rate is nan; it must be a number above 0'),
        ('[training]\nlearning_rate = inf', 'learning_rate is inf'),
        ('[training]\nlearning_rate = 2000-01-01', 'learning_rate is datetime.date(2000, 1, 1)'),
        ('[training]\nseed = 1e22', 'seed is 1e+22'),
        ('[training]\nseed = -1', 'seed is -1'),
        ('[training]\ndataloader_num_workers = 100000000000', 'dataloader_num_workers is 100000000000'),
        ('[training]\nbatch_size = [1]', 'batch_size is [1]'),
        (
            '[captioner.decoder]\nnum_hidden_layers = 1000000',
            'num_hidden_layers is 1000000; it must be a whole number from 1 to 1,000',
        ),
        ('[captioner.encoder]\nstages = [[1]]', 'stages is [[1]]'),
        (
            "[captioner.encoder]\nbackbone_kwargs = {checkpoint_path = 'x'}",
            "backbone_kwargs has 'checkpoint_path'",
        ),
        ('x = ' + '[' * 101 + ']' * 101, 'nested more than 100'),
        ('x = ' + '[' * 50_000, 'nested'),
        ('x = ' + '9' * 5000, 'not TOML'),
    ],
)
def test_what_a_config_file_cannot_say(tmp_path, text, message):
    file = tmp_path / 'run.toml'
    file.write_text(text)
    with pytest.raises(ValueError) as caught:
        read_config(RunConfig, file)
    assert message in str(caught.value) and str(file) in str(caught.value) and '\n' not in str(caught.value)


@pytest.mark.parametrize('tree', [RunConfig(), GenerationConfig(), PhotoRun()])
def test_every_setting_refuses_what_it_cannot_be(tree):
    """A value is refused with one line that names the setting, or the tree that comes of it can be written
    and read again.
    """
    values = [
        'x',
        1.5,
        -1,
        0,
        4300,
        2**63,
        10**30,
        -(10**9),
        math.nan,
        math.inf,
        True,
        None,
        [],
        [0, 0],
        [[]],
        [[[]]],
        {},
        {'a': 1},
        datetime.date(2000, 1, 1),
        datetime.datetime(2000, 1, 1),
        datetime.time(),
        'x' * 200_000,
        '\x1b[2J',
        object(),
    ]
    for name in setting_names(type(tree)):
        accepted = 0
        for value in values:
            try:
                config = change_config(tree, {name: value})
            except ValueError as error:
                text = str(error)
                assert name in text and len(text) < 250 and printable(text) == text, (name, value, text)
            else:
                accepted += 1
                assert json.loads(json.dumps(asdict(config))) and config == change_config(config, {}), (
                    name,
                    value,
                )
        assert accepted < 12, name


def test_half_a_letter_is_refused_before_it_is_written(tmp_path):
    config = change_config(RunConfig(), {'captioner.prompt': 'a \udcff'})
    with pytest.raises(ValueError, match='captioner.prompt is .*udcff.*TOML cannot say'):
        write_config(config, tmp_path / 'run.toml')
    assert not (tmp_path / 'run.toml').exists()


def test_settings_from_flags():
    config = change_config(
        RunConfig(),
        {
            'training.max_steps': 5,
            'practice.lora.r': 4,
            'captioner.encoder.stages': [2, 3],
            'practice.log_with': 'tensorboard',
        },
    )
    assert (
        config.training.max_steps,
        config.practice.lora.r,
        config.captioner.encoder.stages,
        config.practice.log_with,
    ) == (5, 4, (2, 3), 'tensorboard')
    assert asdict(change_config(config, {})) == asdict(config)
    with pytest.raises(ValueError, match="no setting is called 'training'"):
        change_config(config, {'training': {}})


def test_measures_that_share_a_name_are_refused():
    with pytest.raises(ValueError, match="two measures are called 'a'"):
        measures(lambda m, s: dict(a=1), lambda m, s: dict(a=2))(None, 0)
    with pytest.raises(ValueError, match='needs a folder for states'):
        run_training(make_model(), make_data(), CONFIG, PracticeConfig(metric_for_best_model='a'))
