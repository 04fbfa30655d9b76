"""Killed at any moment, or cut off from power: the same command again ends as if nothing had happened."""

import builtins
import functools
import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import matplotlib.figure
import pytest
from conftest import make_book, replace
from counts import record_count
from forked import WRITTEN, Child, digest_files, digest_run, fresh, run_child, strays, undisturbed, workshop  # noqa: F401

import utils.evaluation.loss
import utils.training.checkpoint
from utils.storage import OLD

OPERATIONS = ("fsync", "replace", "rename", "unlink", "remove", "mkdir", "rmdir", "write", "pwrite", "ftruncate")
SYSCALLS = {  # name -> every how many calls; most of openat only reads
    "write": 1, "pwrite64": 1, "writev": 1, "ftruncate": 1, "fsync": 1, "rename,renameat,renameat2": 1,
    "unlink,unlinkat": 1, "mkdir,mkdirat": 1, "rmdir": 1, "openat": 7,
}  # fmt: skip


def plain():
    """In the child: write the figures without drawing them, which would take longer than the training."""

    def savefig(_figure, file, **_options):
        file.write('<svg viewBox="0 0 1 1"><g id="figure_1"></g></svg>') if hasattr(file, "write") else Path(
            file
        ).write_bytes(b"a picture" * 99)

    matplotlib.figure.Figure.savefig = savefig


def watch(around):
    """Call around(name, arguments, call) in place of every operation of Python that changes a file."""

    def wrap(name, call):
        return lambda *args, **named: around(name, args, functools.partial(call, *args, **named))

    for name in OPERATIONS:
        setattr(os, name, wrap(name, getattr(os, name)))
    open_file, open_descriptor = io.open, os.open

    def watched_file(path, mode="r", *args, **named):
        call = functools.partial(open_file, path, mode, *args, **named)
        if not set(mode) & set("wax+"):
            return call()
        file = around("open", (path,), call)
        for name in ("write", "close"):
            setattr(file, name, wrap(name, getattr(file, name)))
        return file

    def watched_descriptor(path, flags, *args, **named):
        call = functools.partial(open_descriptor, path, flags, *args, **named)
        return around("open", (path,), call) if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else call()

    builtins.open = io.open = watched_file
    os.open = watched_descriptor


class KillAt:
    """In the child: die before, in the middle of or after the operation of a number; list all without one."""

    def __init__(self, point=None, listing=None):
        self.point, self.listing, self.reached = point, listing, -1

    def __call__(self):
        plain()
        self.listing = self.listing and open(self.listing, "w")  # noqa: SIM115
        watch(self.around)

    def around(self, name, args, call):
        if name == "write" and self.here("half", name, args):
            call.func(*args[:-1], args[-1][: len(args[-1]) // 2])
            getattr(call.func.__self__, "flush", int)()
            die()
        if self.here("before", name, args):
            die()
        result = call()
        if self.here("after", name, args):
            die()
        return result

    def here(self, when, name, args):
        self.reached += 1
        if self.listing:
            print(when, name, *map(repr, args), file=self.listing, flush=True)
        return self.reached == self.point


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Case:
    """A command on a folder, what the folder holds before, and what it must hold at the end."""

    def __init__(self, workshop, undisturbed, name, folder):  # noqa: F811
        script, _, how = name.partition(" ")
        self.folder, self.out, self.older = folder, folder / "root" / "out", None
        self.make, self.flags, self.safe_step = getattr(workshop, script), [], 0
        self.name, self.script, self.overwrites, self.interval = name, script, how == "--overwrite", 2
        if self.overwrites:
            self.flags, self.older = ["--overwrite"], folder / "older"
            other = ["--block-size", 8] if script == "prepare" else ["--learning-rate", "1e-3"]
            self.run(argv=self.make(self.older, *other))
        elif how == "stopped":  # while the last evaluation runs: its checkpoint is written once more afterwards
            self.flags, self.older, self.safe_step = ["--keep-checkpoints", 1], folder / "older", 6
            self.run(stop_in_last_evaluation, self.make(self.older, *self.flags), code=143)
        elif how == "unsaved":  # a best model at the root, and no checkpoint yet
            self.flags, self.older, self.interval = ["--save-every", 6], folder / "older", 6
            self.run(die_in_first_save, self.make(self.older, *self.flags), code=-signal.SIGKILL)
        elif how == "lora":
            pytest.importorskip("peft")  # before the forks, so that no child imports it
            self.flags = ["--lora-rank", 2]
        elif how == "from scratch":
            self.flags = ["--from-scratch", workshop.model / "config.json"]
        elif how == "corpus":
            self.flags = ["--input-path", make_corpus(folder / "corpus"), "--train-tokenizer", 300, "--clean", "all"]
        elif script == "generate":
            self.flags, self.older = (
                ["--measure", "--num-validation-prompts", 0] if how == "measured" else [],
                undisturbed,
            )
        self.begin()
        self.run()
        self.wanted = self.describe()

    def begin(self):
        """Bring the folder back to where the command finds it first."""
        fresh(self.out.parent).mkdir()
        if self.older:
            shutil.copytree(self.older, self.out)

    def run(self, prepare=plain, argv=None, code=0):
        ended = run_child(*(argv or self.make(self.out, *self.flags)), prepare=prepare)
        assert ended.code == code, f"{self.name}: {ended}"
        return ended

    def describe(self):
        """Return all that must be equal: bytes, names of files, figures; seconds and speeds are none of it."""
        assert not strays(self.out), strays(self.out)
        if self.script == "prepare":
            return digest_files(self.out)
        names = sorted(str(path.relative_to(self.out)) for path in self.out.rglob("*"))
        if self.script == "generate":
            return [names, *((self.out / name).read_bytes() for name in WRITTEN)]
        return [digest_run(self.out), names, timeless(self.out / "checkpoint-6" / "trainer_state.json"),
                timeless(self.out / "all_results.json"), timeless(self.out / "metrics.jsonl")]  # fmt: skip

    def finish(self, where, at_least=0):
        """Give the same command again; where tells a failed assertion how to come here again."""
        ended = self.run_again(where)
        step = step_of(ended)
        assert step >= max(self.safe_step, at_least), f"{where}: went on from {step}, {at_least} was saved: {ended}"
        try:
            assert self.describe() == self.wanted
        except (AssertionError, OSError) as error:
            raise AssertionError(f"{where}: not as the undisturbed: {error}\n{ended}") from None

    def go_on_without_overwrite(self, where):
        """Leave --overwrite out, as people do to go on: True when that was refused."""
        ended = run_child(*self.make(self.out), prepare=plain)
        assert ended.code in (0, 2), f"{where}, without --overwrite: {ended}"
        if ended.code == 0:
            assert self.describe() == self.wanted, f"{where}: differs without --overwrite: {ended}"
        return ended.code == 2

    def run_again(self, where):
        ended = run_child(*self.make(self.out, *self.flags), prepare=plain)
        assert ended.code == 0, f"{where}: {ended}"
        return ended


def make_corpus(folder):
    """Write three texts of one folder."""
    folder.mkdir()
    for number in range(1, 4):
        (folder / f"{number}.txt").write_text(make_book(20 * number)[number:])
    return folder


def timeless(path):
    text = path.read_text(encoding="utf-8")
    return re.sub(r'"(seconds|train_runtime|train_tokens_per_second|train/tokens_per_sec)": [\d.e+-]+', "", text)


def step_of(ended):
    """Return the step that a run says it resumes from."""
    found = re.search(r"(?:resuming from|already complete at) step (\d+)", ended.out)
    return int(found.group(1)) if found else 0


def reached_step(out):
    """Return the last step that metrics.jsonl has a whole line of."""
    lines = (out / "metrics.jsonl").read_text().split("\n")[:-1] if (out / "metrics.jsonl").is_file() else []
    return max((json.loads(line)["step"] for line in lines), default=0)


def newest_checkpoint(out):
    return max((int(path.name.split("-")[1]) for path in out.glob("checkpoint-*")), default=0)


def stop_in_last_evaluation():
    plain()
    score, calls = utils.evaluation.loss.score_blocks, []

    def stopped(*args):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return score(*args)

    replace(utils.evaluation.loss, "score_blocks", stopped)


def die_in_first_save():
    plain()
    utils.training.checkpoint.save_checkpoint = lambda *_: die()


CASES = ["prepare", "prepare --overwrite", "finetune", "finetune --overwrite", "finetune stopped", "finetune unsaved",
         "generate", "generate measured",
         *(pytest.param(name, marks=pytest.mark.slow)
           for name in ("finetune lora", "finetune from scratch", "prepare corpus"))]  # fmt: skip


@pytest.fixture(scope="module")
def case(workshop, undisturbed, tmp_path_factory):  # noqa: F811
    return functools.cache(lambda name: Case(workshop, undisturbed, name, tmp_path_factory.mktemp("case")))


@pytest.mark.parametrize("name", CASES)
def test_a_kill_at_any_file_operation_changes_nothing(case, amount, mine, name):
    case = case(name)
    listing = case.folder / "points.txt"
    case.begin()
    case.run(KillAt(listing=listing))
    points = listing.read_text().splitlines()
    stride = amount(max(1, len(points) // 5), 1)
    final = [n for n, line in enumerate(points) if re.search(r" (rename|replace) .*(manifest.json|'\)$|/out/\.)", line)]
    turning = r"replace .*/.partial/manifest.json'\) |after (rename .*/.partial'\) |unlink .*/run_config.json)"
    decisive = [n for n, line in enumerate(points) if re.search(turning, line)]
    chosen = mine(sorted({*range(0, len(points), stride), *final[:: amount(max(1, len(final) // 3), 1)], *decisive}))
    for point in chosen:
        case.begin()
        ended = run_child(*case.make(case.out, *case.flags), prepare=KillAt(point))
        assert ended.code == -signal.SIGKILL, f"point {point} ({points[point]}): {ended}"
        reached = 0 if case.overwrites or case.script == "generate" else reached_step(case.out)
        case.finish(f"{name}: killed at point {point} ({points[point]})", reached - case.interval)
    record_count("file operations", kind=name, killed=len(chosen), points=len(points))


class Recorder:
    """In the child: note every operation, and the tree under root before and after it."""

    def __init__(self, root, log):
        self.root, self.log, self.events, self.contents = root, log, [], {}

    def __call__(self):
        plain()
        write, leave = self.log.write_bytes, os._exit

        def save_and_leave(code):
            write(pickle.dumps(self.events))
            leave(code)

        os._exit = save_and_leave
        watch(self.around)

    def around(self, name, args, call):
        self.events.append(("", (), self.tree()))
        synced = os.fstat(args[0]).st_ino if name == "fsync" else None
        result = call()
        paths = tuple(os.path.relpath(path, self.root) for path in args) if name in ("rename", "replace") else (synced,)
        self.events.append((name, paths, self.tree()))
        return result

    def tree(self):
        """Return every path below root with its inode, and its content, None for a folder."""
        found = {".": (self.root.stat().st_ino, None)}
        for path in self.root.rglob("*"):
            content = path.read_bytes() if path.is_file() else None
            found[str(path.relative_to(self.root))] = (path.stat().st_ino, self.contents.setdefault(content, content))
        return found


class Disk:
    """What a disk may hold: what was synced for certain, any part of the rest.

    Files and folders have numbers of their own, for the system gives an inode's number away again. names is
    folder -> name -> number, pending the changes of names that are not synced, each a list of (folder, name, number).
    """

    def __init__(self, tree):
        self.numbers, self.tree, self.count = {}, {}, 0
        self.contents, self.names, self.safe_contents, self.safe_names, self.pending = {}, {}, {}, {}, []
        self.saved = 0
        self.advance("", (), tree)
        for number in self.names:
            self.sync(number)
        self.safe_contents = dict(self.contents)

    def advance(self, name, args, tree):
        """Take over one event of the recorder."""
        before = {folder: dict(entries) for folder, entries in self.names.items()}
        numbers = {inode: self.numbers.get(inode) for inode, _ in tree.values()}
        for inode, number in numbers.items():
            if number is None:
                numbers[inode] = self.count = self.count + 1
        self.numbers, self.names = numbers, {}
        for path, (inode, content) in tree.items():
            if content is None:
                self.names.setdefault(numbers[inode], {})
            else:
                self.contents[numbers[inode]] = content
            if path != ".":
                folder = numbers[tree[os.path.dirname(path) or "."][0]]
                self.names.setdefault(folder, {})[os.path.basename(path)] = numbers[inode]
        changes = [(folder, entry, self.names[folder].get(entry)) for folder in self.names
                   for entry in sorted({*before.get(folder, {}), *self.names[folder]})
                   if before.get(folder, {}).get(entry) != self.names[folder].get(entry)]  # fmt: skip
        self.root = numbers[tree["."][0]]
        if name in ("rename", "replace"):
            self.check_order(*args, changes)
        self.pending += [changes] if name in ("rename", "replace") else [[change] for change in changes]
        if name == "fsync" and args[0] in numbers:
            self.sync(numbers[args[0]])

    def sync(self, number):
        if number in self.contents:
            self.safe_contents[number] = self.contents[number]
        else:
            self.safe_names[number] = dict(self.names[number])
            self.pending = [kept for change in self.pending if (kept := [half for half in change if half[0] != number])]
        steps = (re.fullmatch(r"checkpoint-(\d+)", name) for name in self.safe_names.get(number, ()))
        self.saved = max([self.saved, *(int(step.group(1)) for step in steps if step)])

    def check_order(self, source, target, changes):
        """Whole before its name, and its name before anything older goes."""
        name = os.path.basename(target)
        if name != OLD:
            number = next(number for _, entry, number in changes if entry == name and number)
            assert self.is_safe(number), f"{target} got its name before it was on the disk"
        elif re.search(r"checkpoint-\d+$", source):
            halves = (half for change in self.pending for half in change if half[2])
            unsafe = [half for half in halves if half[1].startswith("checkpoint-")]
            assert not unsafe, f"{source} was removed before {unsafe} was on the disk"

    def is_safe(self, number):
        if number in self.contents:
            return self.safe_contents.get(number) == self.contents[number]
        return self.safe_names.get(number) == self.names[number] and all(map(self.is_safe, self.names[number].values()))

    def write(self, folder, chance):
        """Write one of the states that a disk may hold after a power cut now."""
        names = {number: dict(entries) for number, entries in self.safe_names.items()}
        share = chance.choice([0, 0.5, 1, chance.random()])
        for change in self.pending:
            if chance.random() < share:
                for parent, name, number in change:
                    names.setdefault(parent, {})[name] = number
        self._write(names, self.root, folder, chance)

    def _write(self, names, number, path, chance):
        if number in self.contents:
            path.write_bytes(self.content(number, chance))
            return
        path.mkdir()
        for name, child in names.get(number, {}).items():
            if child:
                self._write(names, child, path / name, chance)

    def content(self, number, chance):
        """Return the synced content, followed by any of what may have become of the rest."""
        now, safe = self.contents[number], self.safe_contents.get(number, b"")
        rest = now[len(safe) :] if now.startswith(safe) else now
        safe = safe if now.startswith(safe) else b""
        cut = rest[: chance.randint(0, len(rest))]
        return safe + chance.choice([b"", cut, bytes(len(rest)), rest, cut + chance.randbytes(len(rest) - len(cut))])


CUTS = {"finetune": (40, 1500), "finetune --overwrite": (6, 300), "finetune stopped": (8, 300),
        "finetune unsaved": (6, 300), "finetune lora": (4, 300), "prepare": (20, 500), "prepare --overwrite": (8, 200),
        "generate": (5, 100), "generate measured": (5, 100)}  # fmt: skip


@pytest.mark.parametrize("name", CUTS)
def test_a_power_cut_loses_nothing_that_was_saved(case, amount, mine, name):
    case, log, n_states = case(name), case(name).folder / "events.pickle", amount(*CUTS[name])
    case.begin()
    case.run(Recorder(case.out.parent, log))
    events = pickle.loads(log.read_bytes())
    disk, chance, refused = Disk(events[0][2]), random.Random(1), 0
    moments = sorted(chance.choices(range(len(events)), k=n_states))
    states = mine((moment, trial) for moment in range(len(events)) for trial in range(moments.count(moment)))
    for moment, event in enumerate(events):
        disk.advance(*event)
        for trial in (trial for at, trial in states if at == moment):
            where = f"{name}: cut at event {moment} of {len(events)}, trial {trial}, after {event[:2]}"
            disk.write(fresh(case.out.parent), random.Random(f"{moment} {trial}"))
            if case.overwrites and trial % 2 == 0:  # someone goes on without the flag: refused, or all is well
                refused += case.go_on_without_overwrite(where)
            case.finish(where, 0 if case.overwrites or case.script == "generate" else disk.saved)
    lost = [half for change in disk.pending for half in change if half[2] and not half[1].startswith(".")]
    assert not lost, f"{name}: at the end these names are not on the disk: {lost}"
    record_count("power cuts", kind=name, states=len(states), moments=len(events), refused=refused)


def kill_around_save(chance, number, after=False):
    """Die a random moment after the save of a number began, at the latest when it ends; or after it ended."""

    def prepare():
        plain()
        save, delay, calls = utils.training.checkpoint.save_checkpoint, chance.uniform(1e-6, 0.03), []

        def timed(*args):
            calls.append(1)
            if len(calls) != number:
                return save(*args)
            saved = after and save(*args)
            signal.setitimer(signal.ITIMER_REAL, delay)  # SIGALRM has no handler: it ends like SIGKILL
            if not after:
                save(*args)
                die()
            return saved

        utils.training.checkpoint.save_checkpoint = timed

    return prepare


def kill_after(command, delay):
    child = Child(*command, prepare=plain)
    time.sleep(delay)
    child.kill()
    return child.wait()


def test_a_kill_at_any_time_loses_at_most_one_interval(case, amount, mine):
    case, trials, lost, killed = case("finetune"), mine(range(amount(10, 2000))), [], 0
    case.begin()
    started = time.monotonic()
    case.run()
    duration = time.monotonic() - started
    for trial in trials:
        case.begin()
        chance, command = random.Random(trial), case.make(case.out)
        if trial % 4 == 0:
            ended = run_child(*command, prepare=kill_around_save(chance, chance.randint(1, 3)))
            assert ended.code < 0, f"trial {trial}: {ended}"
        else:
            ended = kill_after(command, chance.uniform(0, duration))
            assert ended.code in (0, -signal.SIGKILL), f"trial {trial}: {ended}"
        reached, saved = reached_step(case.out), newest_checkpoint(case.out)
        case.finish(f"trial {trial}", max(saved, reached - case.interval))
        lost.append(reached - saved)
        killed += ended.code != 0
    assert killed >= len(trials) // 2
    aimed = sum(trial % 4 == 0 for trial in trials)
    record_count("random times", trials=len(trials), killed=killed, aimed_at_a_save=aimed, most_steps_lost=max(lost))


def test_a_run_killed_many_times_in_a_row_is_the_run_never_killed(workshop, tmp_path, amount):  # noqa: F811
    n_kills, chance = amount(10, 200), random.Random(3)
    steps, out, undisturbed_out = 4 * n_kills, tmp_path / "killed", tmp_path / "undisturbed"
    flags = ["--max-steps", steps, "--eval-every", 7]
    ended = run_child(*workshop.finetune(undisturbed_out, *flags), prepare=plain)
    assert ended.code == 0, ended
    for kill in range(n_kills):
        before, command = newest_checkpoint(out), workshop.finetune(out, *flags)
        if kill % 2:
            ended = kill_after(command, chance.uniform(0, 0.15))
        else:
            prepare = kill_around_save(random.Random(kill), 1, after=kill % 4 == 0)
            ended = run_child(*command, prepare=prepare)
        saved = newest_checkpoint(out)
        assert ended.code < 0, f"kill {kill}: {ended}"
        assert saved >= before + 2 * (kill % 4 == 0), f"kill {kill}: from step {before} to {saved}: {ended}"
        assert reached_step(out) - saved <= 2, f"kill {kill}: {saved} saved, {reached_step(out)} reached"
    ended = run_child(*workshop.finetune(out, *flags), prepare=plain)
    assert (ended.code, step_of(ended)) == (0, saved), ended
    assert digest_run(out, steps) == digest_run(undisturbed_out, steps)
    assert timeless(out / "metrics.jsonl") == timeless(undisturbed_out / "metrics.jsonl")
    assert not strays(out)
    record_count("in a row", kills=n_kills, last_saved=saved, steps=steps)


def stopped_at_start():
    plain()
    os.kill(os.getpid(), signal.SIGSTOP)


def killed_at_call(command, names, number):
    """Let strace kill a script as it enters a system call for the numberth time, whoever makes it."""
    child = Child(*command, prepare=stopped_at_start)
    os.waitpid(child.pid, os.WUNTRACED)
    flags = ["-e", f"trace={names}", "-e", f"inject={names}:signal=SIGKILL:when={number}"]
    tracer = subprocess.Popen(["strace", "-f", "-q", "-o", "/dev/null", "-p", str(child.pid), *flags], stderr=-3)
    tasks = Path(f"/proc/{child.pid}/task")
    while any("TracerPid:\t0\n" in (task / "status").read_text() for task in tasks.iterdir()):
        assert tracer.poll() is None, "strace cannot attach"
        time.sleep(0.002)
    child.kill(signal.SIGCONT)
    ended = child.wait()
    tracer.wait(timeout=60)
    return ended


@pytest.mark.parametrize("name", ["prepare", "finetune", "generate"])
def test_a_kill_at_any_system_call_changes_nothing(case, amount, mine, name):
    if not amount(False, True):
        pytest.skip("--full")
    if not shutil.which("strace"):
        pytest.skip("needs strace")
    case, counts = case(name), {}
    for names, stride in SYSCALLS.items():
        for number in mine(range(1, 100_000, stride)):
            case.begin()
            ended = killed_at_call(case.make(case.out), names, number)
            if ended.code == 0:
                break
            assert ended.code == -signal.SIGKILL, f"{names} {number}: {ended}"
            reached = 0 if name == "generate" else reached_step(case.out)
            case.finish(f"{name}: killed at call {number} of {names}", reached - case.interval)
            counts[names] = counts.get(names, 0) + 1
    assert sum(counts.values()) > 4, counts
    record_count("system calls", kind=name, killed=sum(counts.values()), calls=counts)
