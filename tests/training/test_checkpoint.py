"""utils/training/checkpoint.py by itself: what a checkpoint holds, which one is taken, what is refused."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import utils.training.checkpoint as checkpoint
from utils.errors import UserError
from utils.model.loading import load_pair
from utils.storage import MANIFEST, describe_files, read_json, read_sealed, verify_folder, write_json, write_sealed
from utils.training import random_state
from utils.training.checkpoint import TrainState
from utils.training.optim import build_optimizer

FILES = ["config.json", "generation_config.json", MANIFEST, "model.safetensors", "optimizer.safetensors",
         "rng_state.safetensors", "tokenizer.json", "tokenizer_config.json", "trainer_state.json"]  # fmt: skip


@pytest.fixture
def parts(tiny_model):
    """A tiny model, its tokenizer and an AdamW that has made one step."""
    model, tokenizer = load_pair(tiny_model)
    optimizer = build_optimizer(model, 1e-3, 0.01, (0.9, 0.999), 1e-8)
    model(input_ids=torch.arange(20)[None], labels=torch.arange(20)[None]).loss.backward()
    optimizer.step()
    return model, tokenizer, optimizer


def save(out, parts, step, keep=2, **fields):
    return checkpoint.save_checkpoint(out, *parts, TrainState(step=step, **fields), keep)


def reseal(folder):
    """Make a checkpoint's manifest agree with its files again, as one who means harm would."""
    write_sealed(folder, read_sealed(folder) | {"files": describe_files(folder)})


def test_a_checkpoint_is_a_folder_of_safetensors_and_json(tmp_path, parts):
    best = {"eval/loss": 1.5, "eval/copy_rate": 0.25}
    folder = save(tmp_path, parts, 7, tokens=99, best_metrics=best)
    assert folder == tmp_path / "checkpoint-7"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert read_json(folder / MANIFEST)["format"] == checkpoint.FORMAT == 1
    assert sorted(read_json(folder / MANIFEST)["files"]) == sorted(set(FILES) - {MANIFEST})
    assert checkpoint.read_state(folder) == TrainState(step=7, tokens=99, best_metrics=best)
    assert checkpoint.check_checkpoint(folder) is None


def test_keeps_the_newest(tmp_path, parts):
    (tmp_path / "checkpoint-best").mkdir()
    for step in (8, 9, 10, 100):
        save(tmp_path, parts, step, keep=3)
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == [
        "checkpoint-100", "checkpoint-10", "checkpoint-9",
    ]  # fmt: skip
    assert (tmp_path / "checkpoint-best").is_dir()


def test_the_new_one_is_in_place_before_an_old_one_goes(tmp_path, parts, monkeypatch):
    save(tmp_path, parts, 1, keep=1)
    seen = []
    monkeypatch.setattr(
        checkpoint, "discard", lambda path: seen.append((path.name, checkpoint.find_checkpoint(tmp_path)))
    )
    save(tmp_path, parts, 2, keep=1)
    assert seen == [("checkpoint-1", tmp_path / "checkpoint-2")]


def test_size_is_that_of_weights_and_two_averages(tmp_path, parts):
    folder = save(tmp_path, parts, 1)
    written = sum(path.stat().st_size for path in folder.iterdir())
    tensors = 3 * sum(p.numel() for p in parts[0].parameters()) * 4
    assert checkpoint.checkpoint_bytes(parts[0]) == tensors + checkpoint.OTHER_BYTES
    assert tensors < written < checkpoint.checkpoint_bytes(parts[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_best_model_is_published_with_a_manifest(tmp_path, parts, dtype):
    checkpoint.save_best(tmp_path, parts[0], parts[1], dtype)
    assert verify_folder(tmp_path) is None
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {dtype}
    assert {p.dtype for p in parts[0].parameters()} == {torch.float32}
    assert read_json(tmp_path / MANIFEST)["format"] == 1
    assert (tmp_path / "tokenizer.json").is_file()


def test_the_newest_good_one_is_found(tmp_path, parts, capsys):
    assert checkpoint.find_checkpoint(tmp_path) is None
    for step in (1, 2, 10):
        save(tmp_path, parts, step, keep=3)
    assert checkpoint.find_checkpoint(tmp_path).name == "checkpoint-10"
    assert capsys.readouterr().err == ""
    (tmp_path / "checkpoint-10" / "optimizer.safetensors").write_bytes(b"")
    (tmp_path / "checkpoint-2" / MANIFEST).unlink()
    assert checkpoint.find_checkpoint(tmp_path).name == "checkpoint-1"
    size = (tmp_path / "checkpoint-1" / "optimizer.safetensors").stat().st_size
    why = f"checkpoint-10 unusable (optimizer.safetensors is damaged: 0 bytes, expected {size})"
    assert capsys.readouterr().err == f"warning: {why}; resuming from checkpoint-1\n"
    (tmp_path / "checkpoint-1" / "config.json").unlink()
    with pytest.raises(UserError) as raised:
        checkpoint.find_checkpoint(tmp_path)
    assert str(raised.value) == (
        f"output-dir: 3 checkpoints, none usable; --overwrite starts a new run: {why}, checkpoint-2 unusable "
        "(manifest.json: no such file), checkpoint-1 unusable (config.json is missing)"
    )


def test_a_newer_format_is_refused_and_not_passed_over(tmp_path, parts, capsys):
    save(tmp_path, parts, 1)
    newest = save(tmp_path, parts, 2)
    write_sealed(newest, read_sealed(newest) | {"format": 2})
    with pytest.raises(UserError) as raised:
        checkpoint.find_checkpoint(tmp_path)
    assert str(raised.value) == f"{newest}: format 2 is newer than this program (1); use the one that wrote it"
    for made in ("1", None):  # no newer one: damaged
        write_sealed(newest, read_sealed(newest) | {"format": made})
        assert checkpoint.find_checkpoint(tmp_path).name == "checkpoint-1"
        assert "(manifest.json is damaged: no format); " in capsys.readouterr().err


STATES = [{"step": None}, {"step": "3"}, {"step": 3.0}, {"more": 1}, {"finished": 1}, {"machine": []}]


@pytest.mark.parametrize("change", STATES)
def test_a_state_of_another_form_is_not_used(tmp_path, parts, change):
    folder = save(tmp_path, parts, 1)
    state = {k: v for k, v in (asdict(TrainState()) | change).items() if v is not None}
    (folder / checkpoint.STATE).write_text(json.dumps(state))
    reseal(folder)
    assert "trainer_state.json is damaged: its fields are not step, tokens" in checkpoint.check_checkpoint(folder)


def test_optimizer_comes_back_to_the_bit(tmp_path, parts, tiny_model):
    model, _, optimizer = parts
    folder = save(tmp_path, parts, 1)
    again, _ = load_pair(tiny_model)
    empty = build_optimizer(again, 1e-3, 0.01, (0.9, 0.999), 1e-8)
    checkpoint.restore_optimizer(again, empty, folder / "optimizer.safetensors")
    for old, new in zip(model.parameters(), again.parameters(), strict=True):
        assert optimizer.state[old].keys() == empty.state[new].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for key, value in optimizer.state[old].items():
            assert torch.equal(value, empty.state[new][key])


def test_an_optimizer_that_made_no_step_has_no_state(tmp_path, parts):
    model = parts[0]
    fresh = build_optimizer(model, 1e-3, 0.01, (0.9, 0.999), 1e-8)
    checkpoint.save_optimizer(model, fresh, tmp_path / "o.safetensors")
    checkpoint.restore_optimizer(model, fresh, tmp_path / "o.safetensors")
    assert not any(fresh.state.values())


WRONG = [
    ("exp_avg/transformer.wte.weight", torch.zeros(3, 3), "exp_avg of transformer.wte.weight is 3x3, expected 400x32"),
    ("step/transformer.wte.weight", torch.zeros(2), "step of transformer.wte.weight is 2, expected "),
    ("exp_avg_sq/transformer.wte.weight", None, "exp_avg_sq of transformer.wte.weight is missing, expected 400x32"),
]


@pytest.mark.parametrize(("name", "tensor", "says"), WRONG)
def test_optimizer_of_another_shape_is_refused(tmp_path, parts, name, tensor, says):
    path = save(tmp_path, parts, 1) / "optimizer.safetensors"
    tensors = load_file(path) | {name: tensor}
    save_file({key: value for key, value in tensors.items() if value is not None}, path)
    with pytest.raises(UserError) as raised:
        checkpoint.restore_optimizer(parts[0], parts[2], path)
    assert str(raised.value) == f"{path}: {says}"


def test_a_checkpoint_has_the_random_state_of_the_models_device(tmp_path, parts, monkeypatch):
    seen = []
    monkeypatch.setattr(random_state, "get_random_state", lambda device: seen.append(device) or {"cpu": torch.ones(1)})
    save(tmp_path, parts, 1)
    assert seen == [parts[0].device]


@pytest.mark.parametrize("place", ["weight", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_saved(tmp_path, parts, place, value):
    model, _, optimizer = parts
    parameter = model.transformer.h[1].mlp.c_fc.bias
    tensor = parameter.data if place == "weight" else optimizer.state[parameter][place]
    tensor[3] = value
    with pytest.raises(UserError) as raised:
        save(tmp_path, parts, 5)
    assert str(raised.value) == "transformer.h.1.mlp.c_fc.bias has a value that is not a finite number"
    assert raised.value.code == 4
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), torch.float32), (3.4e38, torch.bfloat16)])
def test_a_best_model_that_is_not_finite_is_never_published(tmp_path, parts, value, dtype):
    """The second is finite in float32 and is not once it is rounded to bf16."""
    parts[0].transformer.wpe.weight.data[5, 5] = value
    with pytest.raises(UserError, match=r"wpe\.weight has a value that is not a finite number"):
        checkpoint.save_best(tmp_path, parts[0], parts[1], dtype)
    assert not list(tmp_path.iterdir())


def test_settings_are_compared_by_name(tmp_path):
    config = tmp_path / "run_config.json"
    write_json(config, {"settings": {"seed": 1, "lr_schedule": "linear", "data_sha256": "a" * 64}})
    same = {"seed": 1, "lr_schedule": "linear"}
    checkpoint.refuse_other_settings(config, same)
    advice = "; use the same, another --output-dir, or --overwrite"
    for changed, says in [
        ({"seed": 2}, "resume: --seed 2 but the run has 1"),
        ({"lr_schedule": "cosine"}, "resume: --lr-schedule cosine but the run has linear"),
        ({"max_steps": 5}, "resume: --max-steps 5 but the run has None"),
        ({"data_sha256": "b" * 64}, "resume: data differs from the run's (sha256 bbbbbbbb not aaaaaaaa)"),
        ({"base_sha256": "b" * 64}, "resume: base model differs from the run's (sha256 bbbbbbbb not None)"),
    ]:
        with pytest.raises(UserError) as raised:
            checkpoint.refuse_other_settings(config, same | changed)
        assert str(raised.value) == says + advice
    write_json(config, {"settings": [1]})
    with pytest.raises(UserError, match="--seed 1 but the run has None"):
        checkpoint.refuse_other_settings(config, same)


def test_another_machine_is_noted_once(capsys):
    state = TrainState()
    checkpoint.record_machine(state, torch.device("cpu"), "fp32", 4)
    assert capsys.readouterr().err == ""
    assert state.machine.keys() == {
        *("processes", "threads", "torch", "device", "dtype", "processor", "micro_batch_size")
    }
    assert (state.machine["device"], state.machine["micro_batch_size"]) == ("cpu", 4)
    state.machine |= {"threads": 77, "torch": "0.1"}
    checkpoint.record_machine(state, torch.device("cpu"), "fp32", 4)
    says = f"threads {torch.get_num_threads()}, was 77; torch {torch.__version__}, was 0.1"
    assert capsys.readouterr().err == f"warning: not bit-identical from here: {says}\n"
    assert state.machine["torch"] == torch.__version__


def test_a_run_starts_from_nothing():
    assert asdict(TrainState()) == {
        "step": 0, "tokens": 0, "seconds": 0.0, "evaluated_step": -1, "best_step": 0, "base_metrics": {},
        "best_metrics": {}, "evals_without_gain": 0, "finished": False, "machine": {},
    }  # fmt: skip


# Step, loss, copy rate; whether it is the best so far, evaluations since the best one.
EVALUATIONS = [
    *((0, 3.0, 0.0, False, 0), (2, 5.0, 0.3, True, 0), (4, 4.0, 0.1, True, 0), (6, 4.5, 0.1, False, 1)),
    *((8, 3.5, 0.3, False, 2), (10, 4.0, 0.1, False, 3), (12, 3.9, 0.2, True, 0), (14, 3.8, 0.0, True, 0)),
]


def test_the_best_evaluation_copies_little_and_then_has_the_least_loss():
    state, best, best_step = TrainState(), {}, 0
    for step, loss, copy_rate, is_best, without_gain in EVALUATIONS:
        state.step, result = step, {"eval/loss": loss, "eval/copy_rate": copy_rate}
        if is_best:
            best, best_step = result, step
        assert state.record_evaluation(result, 0.2) == is_best, step
        assert (state.evaluated_step, state.evals_without_gain, state.best_metrics) == (step, without_gain, best)
        assert state.best_step == best_step
    assert state.base_metrics == {"eval/loss": 3.0, "eval/copy_rate": 0.0}


def test_without_validation_every_step_is_the_best_and_without_samples_nothing_is_copied():
    state = TrainState(step=3)
    assert state.record_evaluation({}, 0.2)
    assert state.record_evaluation({}, 0.2)
    state = TrainState(step=3)
    assert state.record_evaluation({"eval/loss": 2.0}, 0.0)
    assert not state.record_evaluation({"eval/loss": 2.0}, 0.0)


def test_a_validation_loss_that_is_not_finite_names_its_step():
    with pytest.raises(UserError, match=r"^validation loss is not a finite number at step 4$") as raised:
        TrainState(step=4).record_evaluation({"eval/loss": float("nan")}, 0.2)
    assert raised.value.code == 4


def test_what_is_left_of_a_run_without_checkpoints(tmp_path, parts):
    assert checkpoint.has_results(tmp_path) is False
    assert checkpoint.read_end(tmp_path) == {}
    write_json(tmp_path / "all_results.json", {"step": 9, "finished": True, "eval_loss": 2.0})
    assert checkpoint.has_results(tmp_path) is True
    assert checkpoint.read_end(tmp_path) == {"step": 9, "finished": True}
    write_json(tmp_path / "all_results.json", {"step": 9, "finished": False})
    with pytest.raises(UserError) as raised:
        checkpoint.read_end(tmp_path)
    why = f"the checkpoints of {tmp_path} were removed, so that the run cannot go on; --overwrite starts a new one"
    assert str(raised.value) == f"output-dir: {why}"
    (tmp_path / "all_results.json").unlink()
    save(tmp_path, parts, 1)
    assert checkpoint.has_results(tmp_path) is True


def test_a_state_of_another_step_and_lacking_files_are_named(tmp_path, parts):
    folder = save(tmp_path, parts, 1)
    shutil.copytree(folder, tmp_path / "checkpoint-2")
    assert checkpoint.check_checkpoint(tmp_path / "checkpoint-2") == "trainer_state.json belongs to another step"
    for name in ("rng_state.safetensors", "optimizer.safetensors"):
        (folder / name).unlink()
        reseal(folder)
        assert checkpoint.check_checkpoint(folder) == f"{name} is missing"


@pytest.mark.parametrize(("change", "fits"), [
    ({"tokens": 2**63 - 1}, True), ({"tokens": 2**63}, False), ({"step": -(2**63)}, False),
    ({"seconds": float("nan")}, False), ({"best_metrics": {"eval/loss": 1}}, True),
    ({"best_metrics": {"eval/loss": "1"}}, False), ({"base_metrics": {"eval/loss": float("inf")}}, False),
    ({"base_metrics": {"loss": 1.0}}, False), ({"best_metrics": {"loss": 1.0}}, False),
    ({"machine": {"threads": 2}}, True),
])  # fmt: skip
def test_numbers_of_a_state_are_possible_ones(tmp_path, change, fits):
    (tmp_path / checkpoint.STATE).write_text(json.dumps(asdict(TrainState()) | change))
    if fits:
        assert asdict(checkpoint.read_state(tmp_path)) == asdict(TrainState()) | change
        return
    with pytest.raises(UserError) as raised:
        checkpoint.read_state(tmp_path)
    fields = ", ".join(asdict(TrainState()))
    assert str(raised.value) == f"{tmp_path / checkpoint.STATE} is damaged: its fields are not {fields}"


def test_a_full_disk_names_what_it_is_too_small_for(tmp_path, parts, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    for call, size, what in ((lambda: save(tmp_path, parts, 1), checkpoint.checkpoint_bytes(parts[0]), "a checkpoint"),
                             (lambda: checkpoint.save_best(tmp_path, *parts[:2], torch.float32),
                              checkpoint.best_bytes(parts[0]), "the model")):  # fmt: skip
        with pytest.raises(UserError) as raised:
            call()
        assert f"disk full, {what} needs {size / 1e6:,.1f} MB, 0.0 MB free" in str(raised.value)


def test_the_best_model_is_replaced_in_a_folder_that_is_new_or_not(tmp_path, parts):
    model, tokenizer, _ = parts
    weights = sum(p.numel() for p in model.parameters()) * 4
    for value in (1.0, 2.0):
        model.transformer.ln_f.bias.data.fill_(value)
        checkpoint.save_best(tmp_path / "run", model, tokenizer, torch.float32)
        assert load_file(tmp_path / "run" / "model.safetensors")["transformer.ln_f.bias"].unique().tolist() == [value]
    written = sum(path.stat().st_size for path in (tmp_path / "run").iterdir())
    assert weights < written < checkpoint.best_bytes(model) == weights + 2_666_666
    assert "lm_head.weight" not in load_file(tmp_path / "run" / "model.safetensors")


def test_the_size_of_a_checkpoint_is_that_of_what_is_trained(parts):
    model = parts[0]
    model.requires_grad_(False)
    model.transformer.ln_f.bias.requires_grad_(True)
    assert checkpoint.checkpoint_bytes(model) == 3 * 4 * 32 + 8_000_000


def test_saved_again_only_the_state_of_a_checkpoint_is_new(tmp_path, parts):
    folder = save(tmp_path, parts, 3)
    before = folder.stat().st_ino
    save(tmp_path, parts, 3, finished=True)
    assert folder.stat().st_ino == before
    assert checkpoint.read_state(folder).finished is True
    (folder / "model.safetensors").write_bytes(b"")
    save(tmp_path, parts, 3)
    assert folder.stat().st_ino != before
    assert checkpoint.check_checkpoint(folder) is None


def test_the_processor_is_named():
    assert checkpoint.name_processor()
    info = Path("/proc/cpuinfo")
    if info.is_file() and "model name" in info.read_text():
        assert f": {checkpoint.name_processor()}\n" in info.read_text()


def test_a_copied_checkpoint_is_as_good(tmp_path, parts):
    (tmp_path / "one").mkdir()
    folder = save(tmp_path / "one", parts, 1)
    shutil.copytree(folder, tmp_path / "two" / "checkpoint-1")
    assert checkpoint.find_checkpoint(tmp_path / "two").name == "checkpoint-1"
