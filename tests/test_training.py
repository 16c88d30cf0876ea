"""What a notebook cell cannot do: processes that are killed, damaged states, precisions."""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from pvtblip.data import BrokenImage, Collate
from pvtblip.decoder import Captioner, CaptionerConfig, DecoderConfig
from pvtblip.pvt_encoder import EncoderConfig, image_transform
from pvtblip.shapes import ShapesDataset
from pvtblip.training import (TrainingConfig, learning_rate_factor, parameter_groups, plot_history, saved_states, seed_step, train,
                              training_step)

CONFIG = TrainingConfig(max_steps=10, batch_size=2, gradient_accumulation_steps=2, learning_rate=3e-3, logging_steps=3, save_steps=1, seed=5)


@pytest.fixture(autouse=True)
def on_the_processor(monkeypatch):
    "Bit for bit is promised on the processor (some GPU kernels add in any order), whatever other tests have chosen in this process."
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)


def make_model(seed=0, dropout=0.1, **changes):
    torch.manual_seed(seed)
    decoder = DecoderConfig.tiny(hidden_size=32, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
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
    return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def without_speed(history):
    return [{k: v for k, v in entry.items() if k != "captions_per_second"} for entry in history]


CHILD = """
import sys, time, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_training import CONFIG, fit, make_model, replace, saved_states
def slowly(model, step):
    time.sleep(0.05)
    return dict(seen=step)
model = make_model(seed=99 if saved_states(sys.argv[2]) else 0)   # resumed weights must come from the state
fit(replace(CONFIG, eval_steps=1), sys.argv[2], model, resume=True, evaluate=slowly)
"""


def newest(folder):
    return int(saved_states(folder)[-1].name.split("-")[1]) if saved_states(folder) else 0


def run_child(folder, kill_at=None):
    "Train in another process; kill it once it has written state `kill_at`. Returns its exit code."
    child = subprocess.Popen([sys.executable, "-c", CHILD, os.path.dirname(__file__), str(folder)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    while child.poll() is None:
        if kill_at and newest(folder) >= kill_at: child.send_signal(signal.SIGKILL)
        time.sleep(0.002)
    return child.returncode


def test_killed_three_times_it_ends_bit_for_bit_the_same(tmp_path):
    whole, history = fit(replace(CONFIG, eval_steps=1), tmp_path / "whole", evaluate=lambda model, step: dict(seen=step))
    folder = tmp_path / "killed"
    for kill_at in (2, 5, 8):
        assert run_child(folder, kill_at) == -signal.SIGKILL
        assert kill_at <= newest(folder) < CONFIG.max_steps
    assert run_child(folder) == 0
    ours, theirs = (load_file(path / "checkpoint-10" / "state.safetensors") for path in (tmp_path / "whole", folder))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert all(torch.equal(v, ours[f"model.{k}"]) for k, v in whole.state_dict().items())
    saved = json.loads((folder / "checkpoint-10" / "state.json").read_text())["history"]
    assert without_speed(saved) == without_speed(history)


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
(folder / f"{accelerator.process_index}-of-{accelerator.num_processes}").write_text(f"{same_weights(whole, resumed)} {sum(p.double().sum() for p in whole.parameters()).item()}")
"""


def test_two_processes_stay_together_and_resume(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, os.path.dirname(__file__), tmp_path]
    subprocess.run(command, check=True, timeout=300, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    reports = [(tmp_path / f"{i}-of-2").read_text() for i in range(2)]
    assert reports[0] == reports[1] and reports[0].startswith("True "), reports
    with pytest.raises(ValueError, match="data processes: 2 then, 1 now"): fit(replace(CONFIG, max_steps=4), tmp_path, data=make_data(9), resume=True)


def test_the_same_comparison_sees_a_resume_that_forgets(tmp_path):
    "Without AdamW's moments the same comparison fails: the test can fail."
    whole, _ = fit(folder=tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-10")
    file = tmp_path / "checkpoint-9" / "state.safetensors"
    tensors = load_file(file)
    save_file({k: torch.zeros_like(v) if "exp_avg" in k else v for k, v in tensors.items()}, file)
    assert not same_weights(whole, fit(folder=tmp_path, model=make_model(seed=1), resume=True)[0])


def test_workers_and_looking_do_not_change_the_run():
    plain, _ = fit(replace(CONFIG, max_steps=4))
    with_workers, _ = fit(replace(CONFIG, max_steps=4, dataloader_num_workers=1))
    looked_at, _ = fit(replace(CONFIG, max_steps=4, eval_steps=1), evaluate=lambda model, step: dict(random=float(torch.rand(()))))
    assert same_weights(plain, with_workers) and same_weights(plain, looked_at)


def test_another_run_is_refused_with_the_difference(tmp_path):
    fit(replace(CONFIG, max_steps=2), tmp_path)
    same = replace(CONFIG, max_steps=2)
    for config, message in ((replace(same, learning_rate=1e-4), "training learning_rate: 0.003 then, 0.0001 now"),
                            (replace(same, seed=6), "training seed: 5 then, 6 now"), (CONFIG, "training max_steps: 2 then, 10 now")):
        with pytest.raises(ValueError, match=message): fit(config, tmp_path, resume=True)
    with pytest.raises(ValueError, match="captioner prompt: 'a picture of' then, 'a photo of' now"):
        fit(same, tmp_path, make_model(prompt="a photo of"), resume=True)
    with pytest.raises(ValueError, match="data images: 7 then, 9 now"): fit(same, tmp_path, data=make_data(9), resume=True)
    with pytest.raises(ValueError, match="holds checkpoint-2 of an earlier run"): fit(same, tmp_path)
    before = make_model(seed=3)
    with pytest.raises(ValueError, match="other settings"): fit(replace(same, seed=6), tmp_path, before, resume=True)
    assert same_weights(before, make_model(seed=3)), "a refused resume must not touch the model"
    fit(replace(same, logging_steps=1, save_total_limit=5), tmp_path, resume=True)   # how often to log or save is free


def test_older_states_go_and_half_written_ones_are_ignored(tmp_path):
    (tmp_path / ".checkpoint-9.tmp").mkdir()
    (tmp_path / ".checkpoint-9.tmp" / "state.json").write_text('{"step"')
    (tmp_path / "checkpoint-best").mkdir()
    whole, _ = fit(replace(CONFIG, max_steps=4, save_total_limit=2), tmp_path, resume=True)
    assert [path.name for path in saved_states(tmp_path)] == ["checkpoint-3", "checkpoint-4"]
    assert sorted(path.name for path in (tmp_path / "checkpoint-4").iterdir()) == ["state.json", "state.safetensors"]
    shutil.rmtree(tmp_path / "checkpoint-4")
    (tmp_path / ".checkpoint-4.tmp").mkdir()                                          # killed while it wrote the fourth
    assert same_weights(whole, fit(replace(CONFIG, max_steps=4), tmp_path, make_model(seed=1), resume=True)[0])


@pytest.mark.parametrize("file", ["state.safetensors", "state.json"])
def test_a_damaged_state_is_named(tmp_path, file):
    config = replace(CONFIG, max_steps=1)
    fit(config, tmp_path)
    damaged = tmp_path / "checkpoint-1" / file
    damaged.write_bytes(damaged.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"checkpoint-1: not a whole training state .*; remove it"): fit(config, tmp_path, resume=True)


def test_a_finished_run_is_finished(tmp_path):
    config = replace(CONFIG, max_steps=2)
    whole, history = fit(config, tmp_path)
    again, same = fit(config, tmp_path, make_model(seed=1), resume=True)
    assert same_weights(whole, again) and same == history


def accumulate(step, micro_batches):
    "Gradients of the step, read off a plain SGD with rate 1."
    model = make_model(dropout=0.0)
    before = {k: v.clone() for k, v in model.named_parameters()}
    step(Accelerator(cpu=True), model, micro_batches, torch.optim.SGD(model.parameters(), lr=1.0), TrainingConfig(max_grad_norm=1e9))
    return {k: before[k] - v.detach() for k, v in model.named_parameters()}


def mean_of_means(accelerator, model, batches, optimizer, config):
    for batch in batches: (model(batch["pixel_values"], batch["input_ids"], batch["labels"]).loss / len(batches)).backward()
    optimizer.step()


def test_accumulated_gradients_are_those_of_the_big_batch():
    tokenizer, data = make_model().tokenizer, make_data()
    captions = ["a dog", "a cat", "two birds sit on a wire above a very busy street in the rain", "a man", "one", "a red and a green bus at a stop"]
    items = [data[i] | dict(captions=captions[i:i+1]) for i in range(6)]
    collate = Collate(tokenizer)
    whole = accumulate(training_step, [collate(items)])
    for cuts in ((0, 2, 6), (0, 1, 3, 6), (0, 5, 6)):
        pieces = [collate(items[a:b]) for a, b in zip(cuts, cuts[1:])]
        for name, gradient in accumulate(training_step, [*pieces, dict(broken=[])]).items():
            assert_close(gradient, whole[name], rtol=0, atol=1e-6)
        naive = accumulate(mean_of_means, pieces)
        assert max((naive[k] - whole[k]).abs().max().item() for k in whole) > 1e-3, "the naive mean must fail this check"


def test_bf16_stays_finite_and_leaves_the_model_as_it_was():
    model, history = fit(replace(CONFIG, mixed_precision="bf16"))
    assert all(math.isfinite(entry["loss"]) for entry in history)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())
    assert history[-1]["loss"] < history[0]["loss"]
    assert not model.training and "forward" not in vars(model), "accelerate's autocast wrapper must not stay on the model"
    reference = fit()[1]                                                              # a second precision in one process
    assert history[-1]["loss"] != reference[-1]["loss"]
    assert abs(history[-1]["loss"] - reference[-1]["loss"]) < 0.2


def test_fp16_without_a_gpu_is_one_clear_line():
    with pytest.raises(ValueError) as caught: fit(replace(CONFIG, mixed_precision="fp16"))
    assert "\n" not in str(caught.value) and "GPU" in str(caught.value)


class WithBroken(ShapesDataset):
    "Photos 0 and 3 cannot be read."
    def __getitem__(self, item):
        return BrokenImage(f"{item[1]}.jpg", "the file is empty") if item[1] in (0, 3) else super().__getitem__(item)


def test_broken_photos_are_reported_and_passed_over(tmp_path):
    data = WithBroken(make_data().transform, length=7, captions_per_image=2, image_size=32)
    model, history = fit(replace(CONFIG, max_steps=6), tmp_path, data=data)
    reported = {file: reason for entry in history for file, reason in entry["broken"].items()}
    assert reported == {"0.jpg": "the file is empty", "3.jpg": "the file is empty"}
    assert json.loads((tmp_path / "checkpoint-6" / "state.json").read_text())["history"] == history
    assert not same_weights(model, make_model())


def test_nothing_but_broken_photos_changes_nothing():
    data = WithBroken(make_data().transform, length=1, image_size=32)
    config = TrainingConfig(max_steps=3, batch_size=1, logging_steps=3, weight_decay=0.5)
    model, history = fit(config, data=data)
    assert history[0]["loss"] is None and history[0]["captions_per_second"] == 0 and same_weights(model, make_model())
    plot_history(history)


def test_a_loss_that_is_no_number_ends_the_run_before_it_is_saved(tmp_path):
    model = make_model()
    with torch.no_grad(): model.decoder.word_embedding[2003] = math.nan              # "is", which the captions use
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1"): fit(folder=tmp_path, model=model)
    assert saved_states(tmp_path) == []


def test_frozen_weights_stay(tmp_path):
    model = make_model()
    model.encoder.requires_grad_(False)
    eyes = {k: v.clone() for k, v in model.encoder.state_dict().items()}
    whole, _ = fit(replace(CONFIG, max_steps=4), tmp_path, model)
    assert all(torch.equal(eyes[k], v) for k, v in whole.encoder.state_dict().items())
    shutil.rmtree(tmp_path / "checkpoint-4")
    other = make_model(seed=1)
    other.encoder.requires_grad_(False)
    assert same_weights(whole, fit(replace(CONFIG, max_steps=4), tmp_path, other, resume=True)[0])


def test_schedule_for_many_lengths():
    for total in (1, 2, 3, 10, 1000):
        for warmup in {0, 1, total // 20, total // 2, total - 1}:
            factors = [learning_rate_factor(step, warmup, total) for step in range(total)]
            assert min(factors) > 0 and max(factors) <= 1
            assert factors[:warmup] == sorted(factors[:warmup]) and factors[warmup:] == sorted(factors[warmup:], reverse=True)


def test_every_trained_weight_is_in_one_group():
    model = make_model()
    groups = parameter_groups(model, 0.1)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    norms = {id(p) for module in model.modules() if isinstance(module, torch.nn.LayerNorm) for p in module.parameters()}
    assert norms <= {id(p) for p in groups[1]["params"]} and groups[1]["weight_decay"] == 0


def test_what_a_config_cannot_be():
    for change, message in ((dict(max_steps=0), "max_steps is 0"), (dict(learning_rate=-1), "learning_rate is -1"), (dict(learning_rate=math.nan), "learning_rate is nan"),
                            (dict(save_steps=-1), "save_steps is -1"), (dict(mixed_precision="bfloat16"), "choose 'no', 'bf16' or 'fp16'")):
        with pytest.raises(ValueError, match=message): TrainingConfig(**change)


def test_seeds_of_steps_and_processes_differ():
    def draw(*address):
        seed_step(*address)
        return float(torch.rand(()))
    assert draw(0, 1) == draw(0, 1)
    assert len({draw(seed, step, process) for seed in range(2) for step in range(5) for process in range(2)}) == 20
