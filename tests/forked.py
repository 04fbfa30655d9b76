"""Scripts run in forked children: torch is imported once, and a child may be killed, starved or damaged.

Thousands of runs are affordable so: a whole training of the tiny model takes a third of a second.
"""

import hashlib
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import namedtuple
from contextlib import suppress
from pathlib import Path

# Imported here, before any fork, so that no child pays for it.
import datasets  # noqa: F401
import jinja2  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import pytest
import scipy.stats  # noqa: F401
import torch
from conftest import make_book, run_script
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

import finetune_generative  # noqa: F401
import generate_text  # noqa: F401
import prepare_data  # noqa: F401
from utils.data.tokenizer import train_tokenizer

Ended = namedtuple("Ended", "code out err")


class Child:
    """A script in a forked process.

    Args:
        script: 'prepare_data', 'finetune_generative' or 'generate_text'.
        argv: its arguments.
        prepare: called in the child before the script, to set hooks and traps.
        memory: bytes of address space the child may use beyond what it has at the fork.
    """

    def __init__(self, script, argv, prepare=None, memory=None):
        self.files = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
        self.pid = os.fork()
        if self.pid:
            return
        code = 99
        try:
            for number, file in enumerate(self.files, 1):
                os.dup2(file.fileno(), number)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            if memory:
                now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (now + memory, now + memory))
            # The bars' lock lies in memory that all forks share: a child killed with it in its hand stops the rest.
            for bar in (tqdm, *tqdm.__subclasses__()):
                bar.set_lock(threading.RLock())
            if prepare:
                prepare()
            sys.argv = [f"{script}.py", *map(str, argv)]
            run_script(script)
        except SystemExit as left:
            code = left.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def wait(self, timeout=60):
        """Wait for the end; code is negative for a signal, and a hang fails the test."""
        deadline, pause = time.monotonic() + timeout, 0.001
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise AssertionError(f"no end within {timeout} s: {self._read()}")
            time.sleep(pause)
            pause = min(pause * 1.5, 0.02)
        return Ended(os.waitstatus_to_exitcode(status), *self._read())

    def kill(self, number=signal.SIGKILL):
        os.kill(self.pid, number)

    def _read(self):
        texts = []
        for file in self.files:
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
            file.close()
        return texts


def run_child(script, argv, prepare=None, memory=None, timeout=60):
    """Run a script in a forked child to its end; returns code, out, err."""
    return Child(script, argv, prepare, memory).wait(timeout)


class Workshop:
    """A folder with a book, a very small model and its prepared data, and the three commands on them."""

    def __init__(self, folder):
        self.folder, self.book, self.model, self.data = folder, folder / "book.txt", folder / "model", folder / "data"
        self.book.write_text(make_book(60), encoding="utf-8")
        self.control = folder / "control.txt"  # general text is not the book's
        self.control.write_text(make_book(4)[::-1], encoding="utf-8")
        tokenizer = train_tokenizer([make_book(60)], 300)
        torch.manual_seed(0)
        sizes = {"vocab_size": len(tokenizer), "n_positions": 48, "n_embd": 16, "n_layer": 1, "n_head": 1}
        GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(self.model)
        tokenizer.save_pretrained(self.model)
        ended = run_child(*self.prepare(self.data))
        assert ended.code == 0, ended.err

    def prepare(self, out, *flags):
        return "prepare_data", ["--input-path", self.book, "--model-name", self.model, "--block-size", 16,
                                "--output-dir", out, *flags]  # fmt: skip

    def finetune(self, out, *flags):
        """Six updates with dropout, evaluated every 3 and saved every 2; each flag may be given again."""
        return "finetune_generative", ["--data-dir", self.data, "--output-dir", out, "--max-steps", 6, "--batch-size",
                                       2, "--learning-rate", "1e-2", "--dropout", "0.1", "--save-every", 2,
                                       "--eval-every", 3, "--sample-tokens", 0, "--copy-samples", 0,
                                       "--dtype", "fp32", *flags]  # fmt: skip

    def generate(self, tuned, *flags):
        """One prompt and two validation prompts; with --num-validation-prompts 0 --measure there is one round."""
        return "generate_text", ["--finetuned-model", tuned, "--prompt", "Day 1. Ada", "--max-new-tokens", 4,
                                 "--num-validation-prompts", 2, "--no-measure", "--control-path", self.control,
                                 *flags]  # fmt: skip


WRITTEN = ("samples.jsonl", "report.json", "report.html", "report.md", "README.md")  # by generate_text.py, into a run


def digest_tensors(*paths):
    """Return one sha256 over names, types, shapes and bytes of all tensors of safetensors files."""
    found = hashlib.sha256()
    for path in paths:
        for name, tensor in sorted(load_file(path).items()):
            found.update(f"{path.name} {name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim() else
                         repr(tensor.item()).encode())  # fmt: skip
    return found.hexdigest()


def digest_run(out, step=6):
    """Return the sha256 that undisturbed and disturbed runs must share: best and last model or adapter, optimizer."""
    last, adapter = out / f"checkpoint-{step}", sorted(out.glob("adapter/*.safetensors"))
    weights = last / (adapter[0].name if adapter else "model.safetensors")
    return digest_tensors(out / "model.safetensors", *adapter, weights, last / "optimizer.safetensors")


def digest_files(folder):
    """Return the sha256 of all files of a folder with their names, whatever their times are."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def strays(folder):
    """List what a finished run must not leave: hidden names, and anything with 'partial' or 'old' in it."""
    return [path for path in folder.rglob("*") if path.name.startswith(".")]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="module")
def undisturbed(workshop):
    """Folder of a run that nothing disturbed."""
    out = workshop.folder / "undisturbed"
    ended = run_child(*workshop.finetune(out))
    assert ended.code == 0, ended.err
    assert not strays(out)
    return out


def fresh(folder):
    """Make room for another trial: remove a folder, return it."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder
