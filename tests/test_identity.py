"""A run that is stopped, resumed, watched or hurt ends equal to the bit, or is refused by name."""

import dataclasses
import functools
import json
import math
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import replace
from counts import record_count
from forked import Workshop, digest_files, digest_run, digest_tensors, fresh, run_child, strays, undisturbed, workshop  # noqa: F401
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import finetune_generative
import utils.evaluation.loss
import utils.training.checkpoint
from utils.storage import describe_files, read_sealed, write_json, write_sealed
from utils.training import optim, setup
from utils.training.metrics import read_metrics

SIGTERM_CODE = 128 + signal.SIGTERM


def stop_in(step):
    """Make a hook that sends SIGTERM in the update that begins at a step; the run is saved after it."""

    def prepare():
        def stopping(*settings, build=optim.build_schedule):
            schedule = build(*settings)
            return lambda now: (now == step and signal.raise_signal(signal.SIGTERM)) or schedule(now)

        replace(optim, "build_schedule", stopping)

    return prepare


def ran(command, prepare=None, code=0):
    ended = run_child(*command, prepare)
    assert ended.code == code, (code, command, ended)
    return ended


def measured(out):
    """All lines of metrics.jsonl but the speed, which no two runs share."""
    return [{key: row[key] for key in row if key != "train/tokens_per_sec"} for row in read_metrics(out)]


def digest_last(out, step=6):
    last = out / f"checkpoint-{step}"
    return digest_tensors(last / "model.safetensors", last / "optimizer.safetensors")


@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_resumed_equals_straight(workshop, tmp_path, amount, workers):  # noqa: F811
    """At whatever step a run is stopped, however its batches are loaded and accumulated."""
    length, n_runs = amount(6, 41), 0
    for accumulation in amount([4 if workers % 4 else 1], [1, 4]):
        flags = ["--max-steps", length, "--num-workers", workers, "--grad-accum-steps", accumulation]
        straight = workshop.folder / f"straight-{length}-{accumulation}"
        if not straight.exists():  # without workers: their number must not matter
            ran(workshop.finetune(straight, *flags, "--num-workers", 0))
        for stop in amount([1 + workers], range(1, length)):
            command = workshop.finetune(fresh(tmp_path / "run"), *flags)
            ran(command, stop_in(stop - 1), SIGTERM_CODE)
            assert (tmp_path / "run" / f"checkpoint-{stop}").is_dir()
            assert f"resuming from step {stop} of" in ran(command).out
            where = f"stopped at {stop} of {length}, {workers} workers, {accumulation} micro-batches"
            assert digest_run(tmp_path / "run", length) == digest_run(straight, length), where
            assert measured(tmp_path / "run") == measured(straight), where
            n_runs += 1
    record_count("resumed", workers=workers, runs=n_runs)


WATCHED = {
    "evaluated at each step": ["--eval-every", 1, "--eval-batch-size", 3],
    "evaluated at the end only": ["--eval-every", 100],
    "samples": ["--sample-tokens", 5, "--sample-prompt", "Ada"],
    "copying measured": ["--copy-samples", 3, "--eval-every", 2],
    "logged seldom": ["--log-every", 5],
    "tensorboard": ["--report-to", "tensorboard"],
    "saved at each step": ["--save-every", 1, "--keep-checkpoints", 1],
    "saved at the end only": ["--save-every", 100, "--save-dtype", "bf16"],
}


@pytest.mark.parametrize("way", WATCHED)
def test_watching_changes_no_bit(workshop, undisturbed, tmp_path, way):  # noqa: F811
    ran(workshop.finetune(tmp_path / "run", *WATCHED[way]))
    assert digest_last(tmp_path / "run") == digest_last(undisturbed)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_interrupted_evaluation_is_made_up_for(workshop, tmp_path, number):  # noqa: F811
    """A signal between two passes of the first, second or last evaluation."""
    flags = ["--eval-batch-size", 1, "--copy-samples", 2]
    straight = workshop.folder / "straight-one-block-a-pass"
    if not straight.exists():
        ran(workshop.finetune(straight, *flags))
    assert ["eval/copy_rate" in row for row in measured(straight) if "eval/loss" in row] == [True] * 3

    def prepare():
        score, calls = utils.evaluation.loss.score_blocks, []

        def score_blocks(model, blocks, batch_size, autocast, progress, stopping):
            assert len(blocks) > 1
            calls.append(0)
            if len(calls) == number:
                progress = lambda _: stopping or signal.raise_signal(signal.SIGTERM)  # noqa: E731
            return score(model, blocks, batch_size, autocast, progress, stopping)

        replace(utils.evaluation.loss, "score_blocks", score_blocks)

    command = workshop.finetune(tmp_path / "run", *flags)
    ran(command, prepare, SIGTERM_CODE)
    step = 3 * (number - 1)
    assert step not in [row["step"] for row in measured(tmp_path / "run") if "eval/loss" in row]
    assert f"resuming from step {step} of 6" in ran(command).out
    assert measured(tmp_path / "run") == measured(straight)
    assert digest_run(tmp_path / "run") == digest_run(straight)


STOPPABLE = """
import signal, sys, finetune_generative
from utils.cli import run
stop, build = int(sys.argv.pop(1)), finetune_generative.build_schedule
def stopping(*settings):
    schedule = build(*settings)
    return lambda now: (now == stop and signal.raise_signal(signal.SIGTERM)) or schedule(now)
finetune_generative.build_schedule = stopping
run(finetune_generative.main, finetune_generative.parse_args())
"""


@pytest.mark.gpu
@pytest.mark.parametrize("flags", [("--dtype", "fp32"), ("--dtype", "bf16"), ("--dtype", "bf16", "--lora-rank", 4)])
def test_resumed_equals_straight_on_a_gpu(workshop, tmp_path, flags):  # noqa: F811
    if not torch.cuda.is_available():
        pytest.skip("no CUDA")

    def run_whole(out, stop, code):  # a process of its own: CUDA does not survive a fork
        _, arguments = workshop.finetune(out, "--device", "cuda", "--deterministic", *flags)
        command = [sys.executable, "-c", STOPPABLE, str(stop), *map(str, arguments)]
        ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, check=False)
        assert ended.returncode == code, ended.stderr

    run_whole(tmp_path / "straight", -1, 0)
    run_whole(tmp_path / "stopped", 2, SIGTERM_CODE)
    run_whole(tmp_path / "stopped", -1, 0)
    assert digest_run(tmp_path / "stopped") == digest_run(tmp_path / "straight")


@pytest.fixture(scope="module")
def stopped_once(workshop):  # noqa: F811
    ran(workshop.finetune(workshop.folder / "stopped"), stop_in(2), SIGTERM_CODE)
    return workshop.folder / "stopped"


@pytest.fixture
def stopped(stopped_once, tmp_path):
    """A run that was stopped after step 3; a copy that lies elsewhere, so --output-dir differs in every test."""
    return Path(shutil.copytree(stopped_once, tmp_path / "stopped"))


MACHINES = {"same": None, "threads": 2, "torch": "1.0", "device": "cuda", "dtype": "bf16", "processor": "abacus"}


@pytest.mark.parametrize("field", MACHINES)
def test_other_machine_is_recorded_and_warned_of(workshop, stopped, undisturbed, field):  # noqa: F811
    path = stopped / "checkpoint-3" / "trainer_state.json"
    state = json.loads(path.read_text())
    recorded, other = state["machine"], MACHINES[field]
    expected = {"threads": torch.get_num_threads(), "torch": torch.__version__, "device": "cpu"}
    assert expected.items() <= recorded.items()
    if field in ("torch", "device", "dtype", "processor"):
        write_json(path, state | {"machine": recorded | {field: other}})
        write_sealed(path.parent, read_sealed(path.parent) | {"files": describe_files(path.parent)})
    ended = ran(workshop.finetune(stopped), functools.partial(torch.set_num_threads, 2) if field == "threads" else None)
    warnings = re.findall(r"warning: not bit-identical from here: (.*)", ended.err)
    now, was = (other, recorded[field]) if field == "threads" else (recorded.get(field), other)
    assert warnings == ([] if field == "same" else [f"{field} {now}, was {was}"])
    after = json.loads((stopped / "checkpoint-6" / "trainer_state.json").read_text())["machine"]
    assert after == (recorded | {"threads": 2} if field == "threads" else recorded)
    if field != "threads":
        assert digest_run(stopped) == digest_run(undisturbed)


# A flag that is in neither table, or in both, fails the first test below.
SHAPING = {
    "model_name": "{copied_model}", "from_scratch": "{config}", "dropout": "0.2", "lora_rank": 4, "epochs": 7,
    "max_steps": 7,
    "batch_size": 3, "grad_accum_steps": 2, "learning_rate": "2e-2", "lr_schedule": "linear", "warmup_ratio": "0.5",
    "weight_decay": "0.1", "adam_beta1": "0.8", "adam_beta2": "0.99", "adam_epsilon": "1e-7", "max_grad_norm": "0.5",
    "seed": 7, "eval_every": 2, "eval_batch_size": 3, "early_stopping_patience": 3, "copy_samples": 3,
    "max_copy_rate": "0.5", "save_dtype": "bf16", "dtype": "bf16", "deterministic": None, "compile": None,
}  # fmt: skip
FREE = {
    "data_dir": "{copied_data}", "output_dir": "{moved}", "overwrite": None, "device": "cpu", "num_workers": 2,
    "save_every": 1, "keep_checkpoints": 1, "log_every": 2, "report_to": "tensorboard", "sample_prompt": "Ada",
    "sample_tokens": 4, "micro_batch_size": 64, "dry_run": None,
    "process_timeout": 9, "gradient_checkpointing": None,
}  # fmt: skip


def test_every_flag_shapes_the_result_or_is_free():
    flags, free = set(vars(finetune_generative.parse_args([]))), setup.FREE_FLAGS
    assert (flags - free - {"lora_alpha"}, free) == (set(SHAPING), set(FREE))  # which needs lora_rank; test_lora.py


def with_flag(workshop, out, name, value):  # noqa: F811
    """The command of the stopped run with one flag changed; what the value names is made beside the run."""
    beside = out.parent
    if value == "{copied_model}":
        value = shutil.copytree(workshop.model, beside / "copied_model")
    elif value == "{copied_data}":
        value = shutil.copytree(workshop.data, beside / "copied_data")
    elif value == "{moved}":
        value = out.rename(beside / "moved")
    elif value == "{config}":
        value = beside / "config.json"
        value.write_text('{"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 1, "n_positions": 48}')
    flag = f"--{name.replace('_', '-')}"
    return workshop.finetune(out, flag, *([] if value is None else [value]))


@pytest.mark.parametrize("name", SHAPING)
def test_other_value_of_a_shaping_flag_is_refused(workshop, stopped, name):  # noqa: F811
    before = digest_files(stopped)
    ended = ran(with_flag(workshop, stopped, name, SHAPING[name]), code=2)
    assert re.fullmatch(rf"error: resume: --{name.replace('_', '-')} .* but the run has .*\n", ended.err)
    assert digest_files(stopped) == before
    assert not strays(stopped)


@pytest.mark.parametrize("name", sorted(FREE.keys() - {"dry_run"}))
def test_other_value_of_a_free_flag_changes_no_bit(workshop, stopped, undisturbed, name):  # noqa: F811
    ended = ran(with_flag(workshop, stopped, name, FREE[name]))
    assert ("resuming from step 3" in ended.out) == (name != "overwrite")
    out = stopped if stopped.exists() else stopped.parent / "moved"
    assert digest_run(out) == digest_run(undisturbed)
    assert "warning" not in ended.err


def test_a_slash_after_the_models_folder_names_no_other_model(workshop, stopped, undisturbed):  # noqa: F811
    assert "resuming from step 3" in ran(workshop.finetune(stopped, "--model-name", f"{workshop.model}/")).out
    assert digest_run(stopped) == digest_run(undisturbed)


def test_tensorboard_has_every_step_of_a_resumed_run_once(workshop, tmp_path):  # noqa: F811
    """The step that a resumed run began with was missing."""
    command = workshop.finetune(tmp_path / "out", "--report-to", "tensorboard")
    ran(command, stop_in(2), SIGTERM_CODE)
    ran(command)
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    for name in ("train/loss", "eval/loss"):
        rows = [row["step"] for row in read_metrics(tmp_path / "out") if name in row]
        assert [event.step for event in events.Scalars(name)] == rows


def test_what_a_stopped_run_with_overwrite_advises_resumes_it(workshop, stopped, undisturbed):  # noqa: F811
    """The advice was to run the same command, which removed the checkpoint that had just been saved."""
    ended = ran(workshop.finetune(stopped, "--overwrite"), stop_in(2), SIGTERM_CODE)
    assert ended.out.endswith("saved; run the same command without --overwrite to resume\n")
    assert "resuming from step 3" in ran(workshop.finetune(stopped)).out
    assert digest_run(stopped) == digest_run(undisturbed)


@pytest.mark.parametrize("what", ["base model", "base model's config", "data"])
def test_other_content_under_the_same_name_is_refused(tmp_path, what):
    here = Workshop(tmp_path)
    ran(here.finetune(tmp_path / "run"), stop_in(2), SIGTERM_CODE)
    if what == "data":
        ran(here.prepare(here.data, "--seed", 7, "--overwrite"))
    elif what == "base model":
        tensors = load_file(here.model / "model.safetensors")
        tensors["transformer.wpe.weight"][0, 0] += 1
        save_file(tensors, here.model / "model.safetensors", metadata={"format": "pt"})
    else:
        path = here.model / "config.json"
        write_json(path, json.loads(path.read_text()) | {"layer_norm_epsilon": 1e-3})
    before = digest_files(tmp_path / "run")
    ended = ran(here.finetune(tmp_path / "run"), code=2)
    kind = what.removesuffix("'s config")
    assert re.fullmatch(rf"error: resume: {kind} differs from the run's \(sha256 \w+ not \w+\); .*\n", ended.err)
    assert digest_files(tmp_path / "run") == before
    assert not strays(tmp_path / "run")


@pytest.mark.parametrize("name", ["full path", "relative path"])
def test_base_that_has_vanished_does_not_stop_a_resume(tmp_path, undisturbed, monkeypatch, name):  # noqa: F811
    """The checkpoint holds all that is needed."""
    here = Workshop(tmp_path)
    monkeypatch.chdir(tmp_path)
    flags = ["--model-name", "model"] if name == "relative path" else []
    ran(here.finetune(tmp_path / "run", *flags), stop_in(2), SIGTERM_CODE)
    here.model.rename(tmp_path / "away")
    assert "resuming from step 3" in ran(here.finetune(tmp_path / "run", *flags)).out
    assert digest_run(tmp_path / "run") == digest_run(undisturbed)


VALUES = [math.nan, math.inf, -math.inf]
UNUSED = 40  # a position that blocks of 16 tokens never reach: a bad value there shows in no loss


def plant(where, step, value):
    """Make a hook that puts a value that is not finite into a run, at a step."""

    def prepare():
        train, evaluate, save = (
            finetune_generative.train,
            finetune_generative.evaluate,
            utils.training.checkpoint.save_checkpoint,
        )

        def spoiled_train(setup, save_every, model, tokenizer, data, optimizer, state):
            schedule, forward = setup.schedule, model.forward
            weight, positions = model.transformer.h[0].mlp.c_fc.weight, model.transformer.wpe.weight

            def spoil(here, index=(0, 0)):
                with torch.no_grad():
                    if state.step == step:
                        here[index] = value

            def spoiled_schedule(now):
                if where == "weight":
                    spoil(weight)
                elif where == "unused weight":
                    spoil(positions, (UNUSED, 0))
                elif where == "average" and now:
                    spoil(optimizer.state[positions]["exp_avg_sq"], (UNUSED, 0))
                return schedule(now)

            def spoiled_forward(*args, **kwargs):
                output = forward(*args, **kwargs)
                if state.step == step and model.training and where == "loss":
                    output.loss = output.loss + value  # its gradient stays finite
                return output

            def spoiled_save(*args):
                if where == "save":
                    spoil(weight)
                return save(*args)

            def spoiled_evaluate(*args):
                if where == "evaluation":
                    spoil(weight)
                return evaluate(*args)

            if where == "gradient":
                weight.register_hook(lambda found: found + value if state.step == step else found)
            setup, model.forward = dataclasses.replace(setup, schedule=spoiled_schedule), spoiled_forward
            utils.training.checkpoint.save_checkpoint, finetune_generative.evaluate = spoiled_save, spoiled_evaluate
            return train(setup, save_every, model, tokenizer, data, optimizer, state)

        finetune_generative.train = spoiled_train

    return prepare


def assert_finite_files(folder):
    def refuse(constant):
        raise AssertionError(f"{path}: {constant}")

    for path in folder.rglob("*"):
        if path.suffix == ".safetensors":
            for name, tensor in load_file(path).items():
                assert tensor.isfinite().all(), f"{path}: {name}"
        elif path.suffix in (".json", ".jsonl"):
            lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            for line in lines:
                json.loads(line, parse_constant=refuse)


def error_line(ended):
    assert "Traceback" not in ended.err
    (line,) = [line for line in re.split(r"[\r\n]", ended.err) if line.startswith("error: ")]
    return line


# What is hurt -> the words for it, and the steps at which it can be.
PLACES = {
    "loss": ("loss is not a finite number at step {next} (lr ", lambda step: step),
    "gradient": ("gradient is not a finite number at step {next} (lr ", lambda step: step),
    "weight": ("loss is not a finite number at step {next} (lr ", lambda step: step),
    "unused weight": ("transformer.wpe.weight has a value that is not a finite number at step ", lambda step: step),
    "average": ("transformer.wpe.weight has a value that is not a finite number at step ", lambda step: max(step, 1)),
    "evaluation": ("validation loss is not a finite number at step {at}; ", lambda step: step - step % 3),
    "save": (".weight has a value that is not a finite number at step {at}; ", lambda step: max(2, step - step % 2)),
}


@pytest.mark.parametrize("where", PLACES)
def test_value_that_is_not_finite_stops_the_run_and_reaches_no_file(workshop, tmp_path, amount, where):  # noqa: F811
    length = amount(6, 31)
    straight, words = workshop.folder / f"straight-{length}-1", PLACES[where][0]
    if not straight.exists():
        ran(workshop.finetune(straight, "--max-steps", length))
    steps = amount([1 + list(PLACES).index(where) % 5], range(30))
    for step in map(PLACES[where][1], steps):
        command = workshop.finetune(fresh(tmp_path / "run"), "--max-steps", length)
        value = math.inf if where == "average" else VALUES[step % 3]  # AdamW divides by it: the weight stays finite
        line = error_line(ran(command, plant(where, step, value), code=4))
        assert words.format(next=step + 1, at=step) in line, (where, step)
        saved = utils.training.checkpoint.list_checkpoints(tmp_path / "run")
        safe = f"; {saved[0].name} is safe; " if saved else "; no checkpoint yet; "
        assert line.endswith(f"{safe}try a --learning-rate below 0.01, with --overwrite"), line
        assert saved or step <= 2, (where, step)
        assert_finite_files(tmp_path / "run")
        assert not strays(tmp_path / "run")
        ran(command)
        assert digest_run(tmp_path / "run", length) == digest_run(straight, length), (where, step)
    record_count("not finite", where=where, values=len(steps))


def test_absurd_learning_rate_ends_in_words_or_finite(workshop, tmp_path):  # noqa: F811
    for rate in ("1e30", "1e300", "1e5"):
        out = fresh(tmp_path / "run")
        ended = run_child(*workshop.finetune(out, "--learning-rate", rate, "--save-every", 1))
        assert ended.code in (0, 4), ended
        if ended.code:
            assert "is not a finite number at step" in error_line(ended), ended.err
        assert_finite_files(out)
