"""utils/errors.py: known failures become one line, and a defect of this program keeps its traceback."""

import ast
import errno
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from utils.cli import run
from utils.errors import EXIT_MACHINE, UserError, explain_failures
from utils.storage import building

ROOT = Path(__file__).parent.parent
CAUGHT = "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last): ..."
KILLED = [
    RuntimeError("DataLoader worker (pid 71) is killed by signal: Killed."),
    RuntimeError("DataLoader worker (pid(s) 71, 72) exited unexpectedly"),
    ConnectionResetError(104, "Connection reset by peer"),
]


def explained():
    return explain_failures(SimpleNamespace(step=7, machine={}), list, 8, 1e-3)


def test_a_defect_in_a_data_worker_keeps_its_traceback():
    """It was called a killed worker, with the advice to run the same command again."""
    with pytest.raises(ValueError, match="Caught ValueError"), explained():
        raise ValueError(CAUGHT)


@pytest.mark.parametrize("error", KILLED)
def test_a_killed_data_worker_is_named_and_the_cause_is_kept(error):
    with pytest.raises(UserError, match=r"a data worker was killed.* at step 7") as raised, explained():
        raise error
    assert raised.value.code == EXIT_MACHINE
    assert raised.value.__cause__ is error


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(errno.ENOMEM, "no"), RuntimeError("can't allocate memory: 9 B")]
)
def test_too_little_memory_is_a_failure_of_the_machine(capsys, monkeypatch, error):
    def main():
        raise error

    monkeypatch.setattr("utils.cli.catch_signals", lambda _: None)  # the tests' own process keeps its handlers
    with pytest.raises(SystemExit, match=str(EXIT_MACHINE)):
        run(main)
    assert capsys.readouterr().err == "error: out of memory\n"


def test_a_full_gpu_is_named(capsys, monkeypatch):
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr("utils.cli.catch_signals", lambda _: None)
    with pytest.raises(SystemExit, match=str(EXIT_MACHINE)):
        run(main)
    assert capsys.readouterr().err == "error: out of memory of the GPU\n"


def test_too_little_memory_while_saving_is_no_full_disk(tmp_path):
    says, saving = r"out of GPU memory \(8 blocks per forward pass\)", building(tmp_path, 1000, "a checkpoint")
    with pytest.raises(UserError, match=says), explained(), saving:
        raise torch.OutOfMemoryError("CUDA out of memory.")


def test_a_refusal_inside_a_training_keeps_its_words():
    with pytest.raises(UserError, match=r"^no such flag$"), explained():
        raise UserError("no such flag")


def test_no_error_of_any_kind_is_raised_again_without_its_cause():
    """'from None' is for what is expected: after a broad except it would hide a defect of this program."""
    found = []
    for path in [*ROOT.glob("*.py"), *(ROOT / "utils").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler) and ast.unparse(node.type) in ("Exception", "BaseException"):
                raised = [line for line in ast.walk(node) if isinstance(line, ast.Raise) and line.cause]
                found += [f"{path.name}:{line.lineno}" for line in raised if ast.unparse(line.cause) == "None"]
    assert not found
