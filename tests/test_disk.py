"""Full, failing and read-only disks: one line that tells, nothing half written, and the same command goes on."""

import builtins
import errno
import io
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import namedtuple
from contextlib import contextmanager

import pytest
import safetensors.torch
import transformers.modeling_utils
from conftest import replace
from counts import record_count
from forked import WRITTEN, Child, digest_files, digest_run, fresh, run_child, strays, undisturbed, workshop  # noqa: F401
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from utils import storage
from utils.cli import MAX_ERROR_CHARS
from utils.data import blocks, text
from utils.training import checkpoint

# tqdm's own lock is shared by all forked children: one that ends while it holds it would stop the others.
tqdm.set_lock(threading.RLock())
SIZES = re.compile(r" needs (more than the [\d.,]+ MB|[\d.,]+ MB, [\d.,]+ MB) free")
MB = 1_000_000


class Faults:
    """Count the places where a child writes to the disk, and let the disk fail at one of them.

    Args:
        at: number of the place, from 1; 0 only counts.
        number: the errno.
        lasting: all that comes later fails too, removing included, as on a disk gone read-only.
    """

    def __init__(self, at=0, number=errno.ENOSPC, lasting=False):
        self.at, self.number, self.lasting, self.inside, self.count = at, number, lasting, False, 0
        self.shared = mmap.mmap(-1, 4096)  # what the child tells its parent

    def told(self):
        """Return how many places there were, whether the failing one was in a publish, and its name."""
        count, inside, place = self.shared[:].rstrip(b"\0").decode().split(" ", 2)
        return int(count), inside == "True", place

    def tell(self, place):
        text = f"{self.count} {self.inside} {place}".encode()[:4000]
        self.shared[:] = text + b"\0" * (4096 - len(text))

    def place(self, what, path, kind=OSError):
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        if str(path).startswith(("/dev/", "/proc/")):
            return
        self.count += 1
        if not self.at or self.count <= self.at:
            self.tell(f"{what} {path}")
        if self.count == self.at or (self.lasting and self.at and self.count > self.at):
            reason = os.strerror(self.number)
            if kind is not OSError:
                raise kind(f"Error while serializing: I/O error: {reason} (os error {self.number})")
            raise OSError(self.number, reason, *([str(path)] if what not in ("write", "fsync", "pwrite") else []))

    def __call__(self):
        """Put the hooks in their places; in the child."""
        faults = self

        class Raw(io.FileIO):
            def write(self, content):
                faults.place("write", self.name)
                return super().write(content)

        real_open, real_os_open, real_building = io.open, os.open, storage.building

        def opening(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None):
            if isinstance(file, int) or not set(mode) & set("wax+"):
                return real_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
            faults.place("open", file)
            raw = Raw(file, mode.replace("b", "").replace("t", ""), closefd, opener)
            buffer = raw if buffering == 0 else (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
            return buffer if "b" in mode else io.TextIOWrapper(buffer, encoding, errors, newline)

        def os_opening(path, flags, *args, **kwargs):
            if flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
                faults.place("open", path)
            return real_os_open(path, flags, *args, **kwargs)

        @contextmanager
        def building(*args):
            faults.inside = True
            with real_building(*args) as partial:
                yield partial
            faults.inside = False

        def hook(owner, name, argument=0, kind=OSError):
            real = getattr(owner, name)

            def hooked(*args, **kwargs):
                if name == "mkdir" and os.path.isdir(args[0]):  # refused before the disk is asked
                    return real(*args, **kwargs)
                faults.place(name, args[argument] if argument < len(args) else name, kind)
                return real(*args, **kwargs)

            setattr(owner, name, hooked)

        builtins.open = io.open = opening
        os.open, storage.building = os_opening, building
        for name in ("fsync", "replace", "rename", "mkdir", "pwrite"):
            hook(os, name)
        hook(safetensors.torch, "save_file", 1, SafetensorError)
        hook(transformers.modeling_utils, "safe_save_file", 1, SafetensorError)
        hook(PreTrainedTokenizerFast, "_save_pretrained", 1, Exception)  # tokenizers' Rust raises a plain one
        if self.lasting:
            for name in ("unlink", "rmdir"):
                real = getattr(os, name)

                def removing(*args, real=real, **kwargs):
                    if faults.count >= faults.at:
                        raise OSError(faults.number, os.strerror(faults.number), str(args[0]))
                    return real(*args, **kwargs)

                setattr(os, name, removing)


def check_failure(ended, out, where, sizes=False, safe=True):
    """Check what a person sees when the disk fails, and that what the folder holds is whole."""
    lines = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    seen = f"{where}: exit {ended.code}\n{ended.err}"
    assert (ended.code, len(lines)) == (3, 1), seen
    assert "Traceback" not in ended.err, seen
    assert "Exception ignored" not in ended.err, seen
    assert len(lines[0]) <= MAX_ERROR_CHARS, seen
    assert not sizes or SIZES.search(lines[0]), seen
    for folder in checkpoint.list_checkpoints(out):
        assert checkpoint.check_checkpoint(folder) is None, seen
    if safe and checkpoint.list_checkpoints(out):
        newest = checkpoint.list_checkpoints(out)[0].name
        assert f"{newest} is safe; run the same command to resume" in lines[0], seen
    check_whole(out, seen)
    return lines[0]


def check_whole(folder, seen):
    """Check that every file under its final name is one of those that a manifest describes."""
    for path in folder.rglob(storage.MANIFEST) if folder.is_dir() else ():
        manifest = storage.read_json(path)
        for name in {**manifest["files"], **(manifest.get("replaces") or {})}:
            known = [described.get(name) for described in (manifest["files"], manifest.get("replaces") or {})]
            file = path.parent / name
            if file.is_file():
                found = {"bytes": file.stat().st_size, "sha256": storage.hash_file(file)}
                assert found in known, f"{name} is half there: {seen}"


Case = namedtuple("Case", "command out digest")


@pytest.fixture(params=["finetune_generative", "prepare_data", "generate_text"])
def case(request, workshop, undisturbed, tmp_path):  # noqa: F811
    """A command, its output folder, and a function that tells its result's digest."""
    out = tmp_path / "out"
    if request.param == "finetune_generative":
        return Case(workshop.finetune(out), out, lambda: (digest_run(out), sorted(os.listdir(out))))
    if request.param == "prepare_data":
        return Case(workshop.prepare(out), out, lambda: digest_files(out))
    shutil.copytree(undisturbed, out)
    return Case(workshop.generate(out), out, lambda: digest_files(out))


def begin_again(case):
    """Put the output folder of a case into the state before its first run."""
    if case.command[0] == "generate_text":
        for name in WRITTEN:
            (case.out / name).unlink(missing_ok=True)
    else:
        fresh(case.out)


def check_recovery(case, expected, where):
    """Check that the same command, with the fault gone, ends as if there had been none."""
    ended = run_child(*case.command)
    assert ended.code == 0, f"{where}: {ended.err}"
    assert case.digest() == expected, where
    assert not strays(case.out), (where, strays(case.out))


FAULTS = [(errno.ENOSPC, False), (errno.EIO, False), (errno.EROFS, True)]


def test_a_disk_that_fails_at_any_place(case, amount, mine):
    counting = Faults()
    ended = run_child(*case.command, prepare=counting)
    assert ended.code == 0, ended.err
    total, expected = counting.told()[0], case.digest()
    assert total > 8
    places = range(1, total + 1, max(1, total // amount(10, total)))
    trials = mine((at, *FAULTS[(i + more) % 3]) for i, at in enumerate(places) for more in range(amount(1, 3)))
    for at, number, lasting in trials:
        begin_again(case)
        faults = Faults(at, number, lasting)
        ended = run_child(*case.command, prepare=faults)
        _, inside, place = faults.told()
        where = f"{case.command[0]}, {errno.errorcode[number]} at place {at} of {total}: {place}"
        line = check_failure(ended, case.out, where, sizes=inside, safe=case.command[0] == "finetune_generative")
        assert os.strerror(number).lower() in line, where
        assert lasting or not strays(case.out), f"{where}: {strays(case.out)}"
        check_recovery(case, expected, where)
    record_count("disk faults", script=case.command[0], faults=len(trials), places=total)


def test_a_system_call_that_fails_inside_a_library(case, amount, mine, tmp_path):
    if amount(True, False) or not shutil.which("strace"):
        pytest.skip("needs --full and strace")
    assert run_child(*case.command).code == 0
    expected, failed = case.digest(), 0
    for call in ("write", "fsync", "rename"):
        for number in mine(range(1, 100_000)):
            begin_again(case)
            ended, trace = run_traced(case.command, call, number, tmp_path / "trace")
            injected = [line for line in trace.splitlines() if "(INJECTED)" in line]
            if not injected:  # past the last one
                break
            if str(case.out) not in injected[0]:  # stdout, or a thread's own pipe
                continue
            failed += 1
            where = f"{case.command[0]}, {call} {number}: {injected[0]}"
            check_failure(ended, case.out, where, safe=case.command[0] == "finetune_generative")
            check_recovery(case, expected, where)
    assert failed > 2
    record_count("failing system calls", script=case.command[0], failed=failed)


def run_traced(command, call, number, trace):
    """Run a command whose system call of a number fails with ENOSPC."""
    child = Child(*command, prepare=lambda: os.kill(os.getpid(), signal.SIGSTOP))
    os.waitid(os.P_PID, child.pid, os.WSTOPPED)
    fault = f"inject={call}:error=ENOSPC:when={number}"
    tracer = subprocess.Popen(["strace", "-f", "-y", "-p", str(child.pid), "-o", trace, "-e", f"trace={call}", "-e",
                               fault], stderr=subprocess.PIPE, text=True)  # fmt: skip
    assert "attached" in tracer.stderr.readline()
    child.kill(signal.SIGCONT)
    ended = child.wait()
    tracer.communicate(timeout=20)
    return ended, trace.read_text()


@pytest.fixture
def small_disk(tmp_path):
    """A real disk of 24 MB: room for two checkpoints, counted as 8.1 MB each, not for three."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(folder)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(disk, leave):
    """Write a file that leaves so many bytes free."""
    with open(disk / "filler", "ab") as file:
        size = shutil.disk_usage(disk).free - leave
        os.posix_fallocate(file.fileno(), file.tell(), max(size, 1))


def before(owner, name, act, call=1):
    """Return a hook for a child: act just before a function's call of that number, or before each."""

    def prepare():
        real, calls = getattr(owner, name), []

        def hooked(*args, **kwargs):
            calls.append(name)
            if call in (None, len(calls)):
                act()
            return real(*args, **kwargs)

        replace(owner, name, hooked)

    return prepare


def test_a_disk_too_small_for_two_checkpoints(small_disk, workshop):  # noqa: F811
    fill(small_disk, 12 * MB)
    out = small_disk / "out"
    ended = run_child(*workshop.finetune(out))
    line = check_failure(ended, out, "12 MB free", sizes=True)
    assert "a new run needs 16.2 MB, 12.0 MB free" in line
    assert "step 0: " not in ended.out
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


@pytest.mark.parametrize(("name", "leave"), [("publish_folder", 2 * MB), ("save_optimizer", 0)])
def test_a_disk_that_fills_up_in_the_middle_of_training(small_disk, workshop, undisturbed, name, leave):  # noqa: F811
    out = small_disk / "out"
    command = workshop.finetune(out)
    ended = run_child(*command, prepare=before(checkpoint, name, lambda: fill(small_disk, leave), call=2))
    line = check_failure(ended, out, name, sizes=True)
    assert "a checkpoint needs 8.1 MB" in line
    assert "checkpoint-2 is safe" in line
    assert not strays(out)
    (small_disk / "filler").unlink()
    check_recovery(Case(command, out, lambda: digest_run(out)), digest_run(undisturbed), name)


@pytest.mark.parametrize(("owner", "name", "leave"), [(text, "read_book", 2 * MB), (blocks, "save_blocks", 0)])
def test_a_full_disk_leaves_the_old_data_as_it_was(small_disk, workshop, tmp_path, owner, name, leave):  # noqa: F811
    out, reference = small_disk / "out", tmp_path / "reference"
    assert run_child(*workshop.prepare(reference, "--seed", 7)).code == 0
    assert run_child(*workshop.prepare(out)).code == 0
    old, again = digest_files(out), workshop.prepare(out, "--seed", 7, "--overwrite")
    filling = before(owner, name, lambda: fill(small_disk, leave))
    line = check_failure(run_child(*again, prepare=filling), out, name, sizes=True)
    assert "the data needs 8.0 MB" in line
    assert digest_files(out) == old
    (small_disk / "filler").unlink()
    check_recovery(Case(again, out, lambda: digest_files(out)), digest_files(reference), name)


def test_samples_on_a_full_disk(small_disk, workshop, undisturbed):  # noqa: F811
    out = small_disk / "out"
    shutil.copytree(undisturbed, out)
    fill(small_disk, 0)
    line = check_failure(run_child(*workshop.generate(out)), out, "samples", safe=False)
    assert "samples.jsonl" in line or "no space left on device" in line
    (small_disk / "filler").unlink()
    assert run_child(*workshop.generate(out)).code == 0
    assert not strays(out)


def test_room_is_asked_for_before_the_first_step(workshop, undisturbed, tmp_path):  # noqa: F811
    def free(size):
        usage = namedtuple("Usage", "total used free")(0, 0, size)
        return lambda: setattr(shutil, "disk_usage", lambda _: usage)

    out = tmp_path / "out"
    command = workshop.finetune(out)
    ended = run_child(*command, prepare=free(16 * MB))
    assert "a new run needs 16.2 MB, 16.0 MB free" in check_failure(ended, out, "a new run", sizes=True)
    assert not out.exists()
    ended = run_child(*command, prepare=before(checkpoint, "save_optimizer", lambda: os.kill(os.getpid(), 9), call=2))
    assert ended.code == -9
    ended = run_child(*command, prepare=free(8 * MB))  # a run that goes on holds one of its two already
    line = check_failure(ended, out, "going on", sizes=True, safe=False)
    assert line.endswith("a checkpoint needs 8.1 MB, 8.0 MB free")  # and not at a later step
    check_recovery(Case(command, out, lambda: digest_run(out)), digest_run(undisturbed), "there is room again")
