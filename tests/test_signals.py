"""Signals, simultaneous starts, readers beside a writer, and a long run: each ends as an undisturbed one."""

import fcntl
import itertools
import os
import random
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from conftest import replace
from counts import record_count
from forked import Child, digest_files, digest_run, fresh, run_child, strays, undisturbed, workshop  # noqa: F401
from test_disk import before

from utils import cli, output_dir, storage
from utils.data import blocks
from utils.evaluation import loss
from utils.model import loading
from utils.training import checkpoint, metrics

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SEED = 1872
ROOT = Path(__file__).parent.parent


class Gate:
    """A place where a child says that it has come, and waits until it may go on."""

    def __init__(self):
        self.come, self.go = os.pipe(), os.pipe()

    def __call__(self):
        os.write(self.come[1], b"x")
        if not select.select([self.go[0]], [], [], 30)[0]:
            os._exit(98)  # the test has failed and forgotten it
        os.read(self.go[0], 1)

    def wait(self):
        """Wait for the first child to come."""
        assert select.select([self.come[0]], [], [], 30)[0], "no child has come to the gate"

    def open(self, children=1):
        os.write(self.go[1], b"x" * children)

    def close(self):
        """Return how many have come."""
        os.set_blocking(self.come[0], False)
        os.write(self.come[1], b"x")
        came = len(os.read(self.come[0], 100)) - 1
        for descriptor in self.come + self.go:
            os.close(descriptor)
        return came


def in_turn(*hooks):
    return lambda: [hook() for hook in hooks]


def own_group():
    os.setpgid(0, 0)


def tell_when_ready(gate):
    """Return a hook for a child: say when the signals are caught; before that Python itself would end it."""

    def prepare():
        real = cli.catch_signals

        def catch_and_tell(receive):
            real(receive)
            cli.catch_signals = real
            gate()

        cli.catch_signals = catch_and_tell

    return prepare


def members(group):
    """List the living processes of a group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of_group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has ended meanwhile
            continue
        if int(of_group) == group and state != "Z":
            found.append(int(stat.parent.name))
    return found


def check_stopped(ended, number, out, where, in_loop=None):
    """Check the exit status and last words of a stopped run; returns whether it was stopped in the loop."""
    seen = f"{where}: exit {ended.code}\n{ended.out}\n{ended.err}"
    assert ended.code == 128 + number, seen
    assert "Traceback" not in ended.err, seen
    stopped = re.fullmatch(r"stopped at step (\d+) of \d+, saved; run the same command to resume",
                           ended.out.splitlines()[-1] if ended.out else "")  # fmt: skip
    if stopped:
        assert checkpoint.check_checkpoint(out / f"checkpoint-{stopped[1]}") is None, seen
    else:
        assert "stopped; finished work is saved" in ended.err, seen
    assert in_loop in (None, bool(stopped)), seen


def check_goes_on(command, out, digest, expected, where):
    """Check that the same command ends as an undisturbed one."""
    ended = run_child(*command)
    assert ended.code == 0, f"{where}: {ended.err}"
    assert digest(out) == expected, where
    assert not strays(out), (where, strays(out))


@pytest.fixture(params=["finetune", "prepare", "generate"])
def kind(request, workshop, undisturbed, tmp_path):  # noqa: F811
    """A command, its output folder made ready by a function, its result's digest, how long it takes."""
    out, make = tmp_path / "out", getattr(workshop, request.param)
    digest = digest_run if request.param == "finetune" else digest_files

    def begin():
        fresh(out)
        if request.param == "generate":
            shutil.copytree(undisturbed, out)

    seconds = []
    for _ in range(2):
        begin()
        started = time.monotonic()
        assert run_child(*make(out)).code == 0
        seconds.append(time.monotonic() - started)
    return request.param, make(out), out, begin, digest, digest(out), min(seconds)


def test_signals_at_random_moments(kind, amount, mine):
    name, command, out, begin, digest, expected, seconds = kind
    trials, finished = mine(range(amount(9 if name == "finetune" else 6, 600))), 0
    for trial in trials:
        number, delay = SIGNALS[trial % 3], random.Random(f"{SEED} {trial}").uniform(0, seconds)
        where = f"{name}, trial {trial} of seed {SEED}, signal {number} after {delay:.4f} s"
        begin()
        ready = Gate()
        child = Child(*command, prepare=tell_when_ready(ready))
        ready.wait()
        ready.open()
        time.sleep(delay)
        child.kill(number)
        ended = child.wait()
        ready.close()
        if ended.code == 0:
            finished += 1
        else:
            check_stopped(ended, number, out, where)
        check_goes_on(command, out, digest, expected, where)
    assert finished < len(trials)
    record_count("signals", kind=name, sent=len(trials), after_the_end=finished)


# Where a training is when the signal comes: the function, which call of it, and whether the loop has begun.
MOMENTS = [
    (blocks, "open_blocks", 1, False),
    (loading, "load_pair", 1, False),
    (metrics, "write_run_config", 1, False),
    (loss, "score_blocks", 1, True),
    (loss, "score_blocks", 2, True),
    (checkpoint, "save_best", 1, True),
    (checkpoint, "save_optimizer", 1, True),
    (storage, "_seal", 3, True),
    (metrics.MetricsLog, "write", 4, True),
    (metrics, "draw_loss_curve", 1, None),
]


@pytest.mark.parametrize(("owner", "name", "call", "in_loop"), MOMENTS)
def test_a_signal_at_a_known_moment(workshop, undisturbed, tmp_path, owner, name, call, in_loop):  # noqa: F811
    out, number = tmp_path / "out", SIGNALS[len(name) % 3]
    command = workshop.finetune(out)
    ended = run_child(*command, prepare=before(owner, name, lambda: os.kill(os.getpid(), number), call))
    if in_loop is None:  # all was saved, and the run is complete
        assert ended.code == 0, ended.err
    else:
        check_stopped(ended, number, out, name, in_loop)
    check_goes_on(command, out, digest_run, digest_run(undisturbed), name)


def fail_on_the_way_out(number):
    """Be a lock that is interrupted while it is taken."""
    try:
        os.kill(os.getpid(), number)
    finally:
        raise RuntimeError("release unlocked lock")


def swallow_and_fail_later(number):
    """Be pyarrow, which asks a Python file whether it is closed, and takes any exception for a yes."""
    with suppress(BaseException):
        os.kill(os.getpid(), number)
    raise ValueError("I/O operation on closed file")


@pytest.mark.parametrize("library", [fail_on_the_way_out, swallow_and_fail_later])
def test_a_signal_that_a_library_makes_another_error_of(workshop, undisturbed, tmp_path, library):  # noqa: F811
    out = tmp_path / "out"
    command = workshop.finetune(out)
    # Of the first nothing catches an error, of the second it becomes a UserError.
    for owner, name in ((blocks, "open_blocks"), (loading.AutoModelForCausalLM, "from_pretrained")):
        ended = run_child(*command, prepare=before(owner, name, lambda: library(signal.SIGTERM)))
        check_stopped(ended, signal.SIGTERM, out, name, in_loop=False)
    check_goes_on(command, out, digest_run, digest_run(undisturbed), library.__name__)


@pytest.mark.parametrize("book", ["book.txt", "missing.txt"])
def test_a_signal_when_all_has_been_said(workshop, tmp_path, book):  # noqa: F811
    """The last moment at which a signal is raised: while the script turns to ignoring them."""
    command = workshop.prepare(tmp_path / "out", "--input-path", workshop.folder / book)

    def prepare():
        real = cli.catch_signals

        def catch(receive):
            if receive == signal.SIG_IGN:
                cli.catch_signals = real
                os.kill(os.getpid(), signal.SIGTERM)
            real(receive)

        cli.catch_signals = catch

    ended = run_child(*command, prepare=prepare)
    check_stopped(ended, signal.SIGTERM, tmp_path / "out", book, in_loop=False)
    assert ("prepared" in ended.out) == (book == "book.txt") == ("no such file" not in ended.err)


def test_a_second_signal_before_the_loop_leaves_at_once(workshop, tmp_path):  # noqa: F811
    out = tmp_path / "out"

    def interrupt():
        for number in (signal.SIGTERM, signal.SIGINT):
            with suppress(BaseException):  # a library that swallows whatever is raised
                os.kill(os.getpid(), number)
        time.sleep(600)

    ended = run_child(*workshop.finetune(out), prepare=before(blocks, "open_blocks", interrupt))
    check_stopped(ended, signal.SIGINT, out, "twice", in_loop=False)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("script", ["prepare_data", "finetune_generative", "generate_text"])
def test_a_signal_during_the_imports_ends_in_one_line(tmp_path, script, number):
    # Whichever is imported first takes long; in naps, for a signal just before a sleep is handled after it.
    long = "import time; print('importing', flush=True); [time.sleep(0.1) for _ in range(6000)]"
    for name in ("torch", "transformers", "datasets", "tqdm"):
        (tmp_path / f"{name}.py").write_text(long)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    command = [sys.executable, "-c", f"import runpy; runpy.run_path({str(ROOT / script)!r} + '.py', {{}}, '__main__')"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env={**os.environ, "PYTHONPATH": path}) as started:  # fmt: skip
        assert started.stdout.readline() == "importing\n"
        started.send_signal(number)
        _, said = started.communicate(timeout=60)
    assert (started.returncode, said) == (128 + number, "stopped; finished work is saved\n")


def test_a_second_signal_leaves_at_once(workshop, undisturbed, tmp_path):  # noqa: F811
    out, gate = tmp_path / "out", Gate()
    command = workshop.finetune(out)
    child = Child(*command, prepare=before(checkpoint, "save_optimizer", gate, call=2))
    gate.wait()
    child.kill(signal.SIGINT)
    time.sleep(0.2)
    assert os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None  # it wants to save
    child.kill(signal.SIGINT)
    check_stopped(child.wait(), signal.SIGINT, out, "in a save", in_loop=False)
    assert gate.close() == 1
    assert [path.name for path in checkpoint.list_checkpoints(out)] == ["checkpoint-2"]
    assert not strays(out)
    check_goes_on(command, out, digest_run, digest_run(undisturbed), "after two signals")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_to_the_whole_group_with_workers(workshop, undisturbed, tmp_path, number):  # noqa: F811
    out, gate = tmp_path / "out", Gate()
    command = workshop.finetune(out, "--num-workers", 2)
    child = Child(*command, prepare=in_turn(own_group, before(metrics.MetricsLog, "write", gate, call=3)))
    gate.wait()
    assert len(members(child.pid)) == 3
    os.killpg(child.pid, number)
    gate.open()
    check_stopped(child.wait(), number, out, "two workers", in_loop=True)
    assert gate.close() == 1
    assert not members(child.pid)
    check_goes_on(command, out, digest_run, digest_run(undisturbed), "two workers")


def test_an_ignored_signal_stops_nothing(workshop, undisturbed, tmp_path):  # noqa: F811
    out, gate = tmp_path / "out", Gate()
    ignore = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
    child = Child(*workshop.finetune(out), prepare=in_turn(ignore, before(checkpoint, "save_optimizer", gate)))
    gate.wait()
    child.kill(signal.SIGHUP)
    gate.open()
    ended = child.wait()
    assert ended.code == 0, ended.err
    assert "stopped" not in ended.out + ended.err
    assert digest_run(out) == digest_run(undisturbed)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_process_of_its_own(workshop, tmp_path, amount, number):  # noqa: F811
    if amount(True, False):
        pytest.skip("needs --full: Python and torch start anew")
    out, reference = tmp_path / "out", tmp_path / "reference"
    name, flags = workshop.finetune(out, "--max-steps", 400, "--save-every", 100, "--eval-every", 100)
    assert run_child(name, [reference if flag == out else flag for flag in flags]).code == 0
    process = subprocess.Popen([sys.executable, f"{name}.py", *map(str, flags)], stdout=subprocess.PIPE, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)  # fmt: skip
    deadline = time.monotonic() + 60
    while len(metrics.read_metrics(out)) < 20:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert printed.splitlines()[-1].endswith("saved; run the same command to resume")
    assert run_child(name, flags).code == 0
    assert digest_run(out, 400) == digest_run(reference, 400)


def hold_lock(gate):
    """Return a hook for a child: whoever gets the lock stays at the gate."""

    def prepare():
        real = output_dir.lock

        @contextmanager
        def lock(*args):
            with real(*args):
                gate()
                yield

        replace(output_dir, "lock", lock)

    return prepare


def test_simultaneous_starts(kind, amount):
    name, command, out, begin, digest, expected, _ = kind
    rng, count, refused = random.Random(SEED), amount(4 if name == "finetune" else 3, 200), 0
    for trial in range(count):
        begin()
        slow, n = trial % 3 != 2, rng.randint(2, 8)  # else the winner is as fast as it can be
        where = f"{name}, trial {trial} of seed {SEED}, {n} starts, slow={slow}"
        start, gate = os.pipe(), Gate()

        def wait_for_start(start=start):
            os.close(start[1])
            os.read(start[0], 1)  # ends when the last one has closed it

        hooks = in_turn(*([hold_lock(gate)] if slow else []), wait_for_start)
        children = [Child(*command, prepare=hooks) for _ in range(n)]
        os.close(start[1])
        running = children
        while slow and len(running) > 1:  # where one waits for the holder, the holder's gate ends in 98 after 30 s
            time.sleep(0.01)
            running = [child for child in children
                       if not os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)]  # fmt: skip
        gate.open(n)
        ends = {child.pid: child.wait() for child in children}
        os.close(start[0])
        assert gate.close() == slow, where
        winners = [pid for pid, ended in ends.items() if ended.code == 0]
        assert len(winners) == 1 or (winners and not slow), f"{where}: {ends}"
        for ended in (ended for pid, ended in ends.items() if pid not in winners):
            holder = re.search(r"is in use by process (\d+) on (\S+)\n", ended.err)
            assert ended.code == 2, f"{where}: {ended}"
            assert holder, f"{where}: {ended.err}"
            assert int(holder[1]) in (winners if slow else ends), f"{where}: {ended.err}"
            assert holder[2] == socket.gethostname()
            refused += 1
        assert digest(out) == expected, where
        assert not strays(out), where
    assert refused >= count
    record_count("simultaneous starts", kind=name, starts=count, refused=refused)


def test_a_lock_file_that_went_away_locks_nobody_out(workshop, tmp_path):  # noqa: F811
    command, late, held = workshop.prepare(tmp_path / "out"), Gate(), Gate()
    slow = Child(*command, prepare=before(fcntl, "lockf", late))  # has opened the file, not locked it yet
    late.wait()
    assert run_child(*command).code == 0  # has locked and removed it
    holder = Child(*command, prepare=hold_lock(held))  # has a new one
    held.wait()
    late.open()
    ended = slow.wait()
    held.open()
    assert holder.wait().code == 0
    assert ended.code == 2, ended
    assert f"in use by process {holder.pid} on" in ended.err


def test_samples_while_training(workshop, undisturbed, tmp_path):  # noqa: F811
    out, gate = tmp_path / "out", Gate()
    child = Child(*workshop.finetune(out), prepare=before(checkpoint, "save_optimizer", gate, call=2))
    gate.wait()
    ended = run_child(*workshop.generate(out))
    assert ended.code == 0, ended.err
    gate.open()
    assert child.wait().code == 0
    assert digest_run(out) == digest_run(undisturbed)


def test_a_killed_holder_is_in_nobodys_way(workshop, undisturbed, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    command = workshop.finetune(out, "--num-workers", 2)
    act = before(checkpoint, "save_optimizer", lambda: os.kill(os.getpid(), signal.SIGKILL), call=2)
    child = Child(*command, prepare=in_turn(own_group, act))
    assert child.wait().code == -signal.SIGKILL
    assert len(members(child.pid)) == 2  # the workers live on for a while
    check_goes_on(command, out, digest_run, digest_run(undisturbed), "the holder was killed")
    deadline = time.monotonic() + 60  # a hang, not a speed
    while members(child.pid):
        assert time.monotonic() < deadline, "orphaned workers"
        time.sleep(0.1)


def publish(folder, workshop, values, hook=None):  # noqa: F811
    """Publish best models in a child, all weights of each equal to one value; returns the exit status."""

    def prepare():
        net, tokenizer = loading.load_pair(workshop.model)
        if hook:
            hook()
        for value in values:
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.fill_(value)
            checkpoint.save_best(folder, net, tokenizer, torch.float32)
        sys.exit(0)

    return Child("generate_text", [], prepare=prepare)


def read_value(folder):
    """Load a published model as generate_text does; the one value of all its weights, or an error."""
    values = {value for p in loading.load_pair(folder)[0].parameters() for value in p.unique().tolist()}
    assert len(values) == 1, f"mixed: {values}"
    return values.pop()


def test_readers_see_the_old_or_the_new_model(workshop, tmp_path, amount):  # noqa: F811
    out, done, count = tmp_path / "out", tmp_path / "done", amount(30, 300)
    out.mkdir()
    assert publish(out, workshop, [1.0]).wait().code == 0

    def read():
        values = [read_value(out)]
        while not done.exists():
            values.append(read_value(out))
        assert values == sorted(values), "an older model came back"
        print(len(values), len(set(values)))
        sys.exit(0)

    readers = [Child("generate_text", [], prepare=read) for _ in range(2)]
    ended = publish(out, workshop, map(float, range(1, count + 1))).wait(timeout=300)
    done.touch()
    assert ended.code == 0, ended.err
    ends = [reader.wait() for reader in readers]
    assert [end.code for end in ends] == [0, 0], ends
    loads, different = (sum(int(end.out.split()[i]) for end in ends) for i in range(2))
    assert different > count / 4
    record_count("readers", publishes=count, loads=loads, changed=different)


def test_a_writer_killed_inside_a_publish(workshop, tmp_path, amount):  # noqa: F811
    base, out, count = tmp_path / "base", tmp_path / "out", 0
    base.mkdir()
    assert publish(base, workshop, [1.0]).wait().code == 0

    def killed_at(place):
        def prepare():
            places = itertools.count(1)
            for name in ("replace", "rename", "fsync", "mkdir", "rmdir", "chmod"):
                die = lambda: next(places) == place and os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
                before(os, name, die, call=None)()

        return prepare

    for first in itertools.count(1, amount(2, 1)):
        for second in amount([first], range(1, 40)):  # killed again, before the first is made good
            shutil.copytree(base, fresh(out))
            code = publish(out, workshop, [2.0], killed_at(first)).wait().code
            assert read_value(out) in (1, 2), f"killed at place {first}"
            publish(out, workshop, [3.0], killed_at(second)).wait()
            assert read_value(out) in (1, 2, 3), f"killed at places {first} and {second}"
            count += 1
        if code == 0:
            break
    assert first > 20
    assert publish(out, workshop, [3.0]).wait().code == 0
    assert (read_value(out), strays(out)) == (3, [])
    record_count("killed publishes", pairs=count)


def test_a_long_run_needs_no_more_than_a_short_one(workshop, tmp_path, amount):  # noqa: F811
    out, notes, keep, steps = tmp_path / "out", tmp_path / "notes", 2, amount(300, 10_000)
    most = [0]

    def note():
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        with open(notes, "a") as file:
            file.write(f"{status['VmRSS'].split()[0]} {len(os.listdir('/proc/self/fd'))} {most[0]}\n")

    def count_checkpoints():
        names = [path.name for path in out.glob("*") if path.name.startswith("checkpoint-")]
        most[0] = max(
            most[0], len(names) + (out / storage.OLD).exists() + (out / storage.PARTIAL / checkpoint.STATE).exists()
        )

    hooks = [own_group, before(checkpoint, "save_optimizer", note, call=None)]
    hooks += [before(os, name, count_checkpoints, call=None) for name in ("fsync", "rename", "rmdir")]
    flags = ["--max-steps", steps, "--save-every", 20, "--eval-every", steps // 5, "--num-workers", 1]
    child = Child(*workshop.finetune(out, *flags, "--keep-checkpoints", keep), prepare=in_turn(*hooks))
    ended = child.wait(timeout=600)
    assert ended.code == 0, ended.err
    assert not members(child.pid), "orphaned workers"
    saves = [tuple(map(int, line.split())) for line in notes.read_text().splitlines()]
    assert len(saves) == steps // 20
    settled = saves[len(saves) // 10 :]
    assert len({n_files for _, n_files, _ in settled}) == 1, settled
    most_on_disk = max(n for *_, n in saves)
    assert most_on_disk == keep + 1, "checkpoints at a time"
    grown = settled[-1][0] / settled[0][0] - 1
    record_count("long run", steps=steps, saves=len(saves), memory_grown=grown, checkpoints=most_on_disk)
    assert amount(True, grown <= 0.01), f"memory grew by {grown:.2%}"
