"""What is said before a run: the micro-batch that fits, time, memory, disk; and that saying it leaves no trace."""

import dataclasses
import gc
import json
import math
import platform
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from forked import digest_files

from utils.data.blocks import BatchOrder, open_blocks
from utils.errors import UserError
from utils.model.hub import locate_model
from utils.model.layers import use_fast_layers
from utils.model.loading import load_pair
from utils.training import checkpoint, forecast
from utils.training.optim import build_optimizer
from utils.training.setup import TrainingSetup

CPU = torch.device("cpu")
FLAGS = ["--max-steps", 6, "--batch-size", 6, "--learning-rate", "1e-3", "--dtype", "fp32", "--copy-samples", 2,
         "--sample-tokens", 0]  # fmt: skip


def train_losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


@pytest.fixture
def finetune(script, prepared, tmp_path):
    def run(name, *flags, code=0):
        out = tmp_path / name
        result = script("finetune_generative", "--data-dir", prepared, "--output-dir", out, *FLAGS, *flags)
        assert result.code == code, result.err
        return result, out

    return run


def test_micro_batches_give_the_batch_up_to_rounding(finetune):
    whole = train_losses(finetune("whole", "--dropout", 0)[1])
    assert len(whole) == 6
    for size in (1, 4):
        pieces = train_losses(finetune(f"by{size}", "--dropout", 0, "--micro-batch-size", size)[1])
        assert pieces == pytest.approx(whole, abs=1e-5)
    accumulated = finetune("accumulated", "--dropout", 0, "--batch-size", 3, "--grad-accum-steps", 2,
                           "--micro-batch-size", 2)  # fmt: skip
    assert train_losses(accumulated[1]) == pytest.approx(whole, abs=1e-5)


@pytest.fixture
def case(prepared, tiny_model, tmp_path):
    """The parts of a training just before its first step, with dropout so that random numbers are drawn."""
    data = open_blocks(prepared)
    model, _ = load_pair(locate_model(str(tiny_model)))
    setup = TrainingSetup(
        device=CPU, dtype="fp32", autocast=nullcontext, order=BatchOrder(len(data.train), 8, 1, 1), max_steps=50,
        micro_batch_size=8, schedule=lambda step: 1e-3, max_grad_norm=1.0, seed=1, output_dir=tmp_path, eval_every=5,
        eval_batch_size=4, early_stopping_patience=None,
        copy_monitor=SimpleNamespace(prompts=[[1, 2]], new_tokens=5, eos_token_id=0), sample_ids=[0],
        sample_tokens=3, save_every=None, save_dtype="fp32", keep_checkpoints=2, log_every=1, report_to="none",
        num_workers=0,
    )  # fmt: skip
    use_fast_layers(model.train(), CPU)
    return SimpleNamespace(data=data, model=model, setup=setup)


def choose(case, given=None):
    return forecast.choose_micro_batch(case.model, case.data, nullcontext, 8, given)


def forecast_run(case, step=0):
    import finetune_generative

    optimizer = build_optimizer(case.model, 1e-3, 0.01, (0.9, 0.999), 1e-8)
    found = forecast.forecast_run(
        case.setup, case.model, optimizer, case.data, step, finetune_generative.forward_backward
    )
    return found, optimizer


def test_calibrating_leaves_no_trace(case):
    before = {name: value.clone() for name, value in case.model.state_dict().items()}
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    choose(case)
    _, optimizer = forecast_run(case)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, before[name]) for name, value in case.model.state_dict().items())
    assert not optimizer.state
    assert all(parameter.grad is None for parameter in case.model.parameters())
    assert case.model.training


def test_an_apple_gpu_is_waited_for_and_its_random_state_and_memory_are_its_own(case, monkeypatch):
    state, waits = torch.tensor([5], dtype=torch.uint8), []
    fakes = {
        "synchronize": lambda: waits.append(state.fill_(9)),  # as dropout there would change it
        "get_rng_state": lambda device: state.clone(),
        "set_rng_state": lambda new, device: state.copy_(new),
        "driver_allocated_memory": lambda: 3_000_000_000,
        "recommended_max_memory": lambda: 16_000_000_000,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.mps, name, fake)
    case.setup = dataclasses.replace(case.setup, device=torch.device("mps"))
    found, _ = forecast_run(case)
    assert len(waits) >= 3 * forecast.CALIBRATION_STEPS
    assert state.item() == 5
    assert found.peak_bytes == 3_000_000_000
    assert forecast.free_bytes(torch.device("mps")) == 13_000_000_000


def test_warming_up_is_no_part_of_the_forecast(case, monkeypatch):
    """The second step, too, allocates memory: with it, a run of 135 million parameters was forecast a quarter high."""
    times, steps = iter([0, 50, 90, 100, 140, 170, 200, 204, 205, 300, 304, 305]), []
    monkeypatch.setattr(forecast, "read_clock", lambda device: next(times))
    monkeypatch.setattr(forecast, "CALIBRATION_SHARE", 0)
    optimizer = build_optimizer(case.model, 1e-3, 0.01, (0.9, 0.999), 1e-8)
    timed = forecast.time_steps(case.setup, case.model, optimizer, case.data, lambda *_: steps.append(1), 50)
    assert timed == (4 / 8, 1)
    assert len(steps) == 4


def test_a_model_is_measured_as_it_is_trained(finetune, monkeypatch):
    """In eval mode there is no dropout and no gradient checkpointing: both cost time, and the latter saves memory."""
    import finetune_generative

    modes, forward_backward, count = [], finetune_generative.forward_backward, forecast.count_activations
    monkeypatch.setattr(finetune_generative, "forward_backward",
                        lambda net, *args: modes.append(net.training) or forward_backward(net, *args))  # fmt: skip
    monkeypatch.setattr(forecast, "count_activations",
                        lambda net, *args: modes.append(net.training) or count(net, *args))  # fmt: skip
    finetune("modes", "--dry-run")
    assert len(modes) >= 2 + forecast.CALIBRATION_STEPS
    assert all(modes)


def test_a_gradient_that_is_not_finite_is_left_to_the_loop(case):
    with torch.no_grad():
        case.model.transformer.wte.weight[:] = math.nan
    _, optimizer = forecast_run(case)
    assert not optimizer.state
    assert case.model.transformer.h[0].ln_1.weight.isfinite().all()


def test_counting_activations_keeps_none(case):
    def n_tensors():
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    blocks = case.data.train[:2]["input_ids"]
    forecast.count_activations(case.model, blocks, nullcontext)  # what the first call makes for good is there
    before = n_tensors()
    assert forecast.count_activations(case.model, blocks, nullcontext) > 0
    assert n_tensors() == before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the setting")
def test_freed_memory_is_kept():
    def resident_after_freeing(setting):
        code = f"import torch; from utils.training import setup; {setting}; torch.ones(25_000_000); " \
            "print(open('/proc/self/status').read().split('VmRSS:')[1].split()[0])"  # fmt: skip
        return 1024 * int(subprocess.check_output([sys.executable, "-c", code], text=True))

    assert resident_after_freeing("setup.keep_freed_memory()") - resident_after_freeing("pass") > 80e6


def test_micro_batch_is_what_is_of_use_and_what_fits(case, monkeypatch, capsys):
    assert choose(case) == 8
    monkeypatch.setitem(forecast.ENOUGH_TOKENS, "cpu", 5 * case.data.block_size)
    assert choose(case) == 5
    blocks = case.data.train[:4]["input_ids"]
    one, two, four = (forecast.count_activations(case.model, blocks[:n], nullcontext) for n in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one), rel=0.02)
    states = 4 * checkpoint.checkpoint_bytes(case.model) // 3
    room = states + 3.5 * forecast.TEMPORARY * (two - one)
    monkeypatch.setattr(forecast, "free_bytes", lambda device: room / forecast.USABLE)
    assert choose(case) == 3
    assert capsys.readouterr().err == ""
    assert choose(case, 7) == 7
    assert "memory is short" in (said := capsys.readouterr().err)
    assert "--micro-batch-size 3 fits" in said
    monkeypatch.setattr(forecast, "free_bytes", lambda device: 1000)
    assert choose(case) == 1
    assert "memory is short" in capsys.readouterr().err


def test_a_run_that_goes_on_keeps_its_micro_batch(finetune, monkeypatch):
    monkeypatch.setitem(forecast.ENOUGH_TOKENS, "cpu", 2 * 32)
    straight = finetune("straight")[1]
    stopped = finetune("stopped", "--save-every", 3)[1]
    for path in sorted(stopped.glob("checkpoint-6/*")):
        path.unlink()
    monkeypatch.setitem(forecast.ENOUGH_TOKENS, "cpu", 10**6)
    result, out = finetune("stopped", "--save-every", 3)
    assert "resuming from step 3" in result.out
    assert "2 blocks per forward pass" in result.out
    assert train_losses(out) == train_losses(straight)
    path = out / "checkpoint-6/trainer_state.json"
    assert json.loads(path.read_text())["machine"]["micro_batch_size"] == 2


def test_dry_run_writes_nothing(finetune, tmp_path):
    result, out = finetune("new", "--dry-run")
    assert not out.exists()
    assert "forecast" in result.out
    assert "6 steps" in result.out
    _, out = finetune("done")
    before = digest_files(out)
    assert "already complete" in finetune("done", "--dry-run")[0].out
    finetune("done", "--dry-run", "--overwrite", "--learning-rate", "2e-3")
    assert digest_files(out) == before
    refused, _ = finetune("done", "--dry-run", "--learning-rate", "2e-3", code=2)
    assert "but the run has" in refused.err


def test_length_and_disk_of_the_rest_of_a_run(case):
    all_of_it, _ = forecast_run(case)
    rest, _ = forecast_run(case, step=40)
    assert (all_of_it.steps, rest.steps) == (50, 10)
    n_blocks = len(case.data.train)
    assert all_of_it.epochs == pytest.approx(50 / math.ceil(n_blocks / 8), rel=0.05)
    assert rest.epochs < all_of_it.epochs
    assert all_of_it.disk_bytes > rest.disk_bytes * 0.9
    assert rest.seconds > 0
    assert 1e7 < rest.peak_bytes < 1e11


def test_slow_saving_is_done_more_rarely_unless_asked_for(case, monkeypatch):
    assert forecast_run(case)[0].save_every == 5
    monkeypatch.setattr(forecast, "SAVED_BYTES_PER_SECOND", 1e6)  # ten seconds a checkpoint
    rarer = forecast_run(case)[0].save_every
    assert rarer > 5
    assert rarer % 5 == 0
    case.setup = dataclasses.replace(case.setup, save_every=2)
    assert forecast_run(case)[0].save_every == 2


def test_slow_saving_with_no_step_left(case, monkeypatch):
    """Stopped in its last step, a run of a large model evaluates and saves once more; it divided by zero."""
    monkeypatch.setattr(forecast, "SAVED_BYTES_PER_SECOND", 1e6)
    assert forecast_run(case, step=50)[0].steps == 0


def test_the_setup_is_changed_by_nobody(case):
    with pytest.raises(dataclasses.FrozenInstanceError):
        case.setup.save_every = 2


@pytest.mark.parametrize("step", [0, 3, 5])
@pytest.mark.parametrize("interval", [1, 4, 5, 11, 20])
def test_counting_what_is_due(step, interval):
    done = [at for at in range(step + 1, 12) if at % interval == 0 or at == 11]
    assert forecast.count_due(step, 11, interval) == len(done)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.2, "0 s"), (99, "99 s"), (150, "2 min 30 s"), (3599.7, "1 h 0 min"), (12_000, "3 h 20 min")],
)
def test_durations_as_a_person_says_them(seconds, said):
    assert forecast.format_seconds(seconds) == said


def test_micro_batch_size_takes_auto(script, prepared, tmp_path):
    import finetune_generative

    assert finetune_generative.parse_args(["--micro-batch-size", "auto"]).micro_batch_size is None
    with pytest.raises(UserError, match="--micro-batch-size must be 1 or more"):
        finetune_generative.parse_args(["--micro-batch-size", "0"])
