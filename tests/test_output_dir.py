"""utils/output_dir.py by itself: who holds it, who is told, and what is left."""

import fcntl
import os
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path

import pytest

import utils.output_dir
from utils.errors import UserError
from utils.output_dir import check_output_dir, lock
from utils.storage import OLD, PARTIAL


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock 'train' of tmp_path/out, with a child of its own."""
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        with lock(tmp_path / "out", "train"):
            child = os.fork()
            os.write(tell, str(child).encode()) if child else None
            time.sleep(60)
        os._exit(0)
    child = int(os.read(told, 20))
    yield pid
    for process in (pid, child):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    with suppress(ChildProcessError):
        os.waitpid(pid, 0)


def test_the_second_is_told_who_is_first(tmp_path, holder):
    with pytest.raises(UserError) as raised, lock(tmp_path / "out", "train"):
        raise AssertionError("both hold it")
    assert (
        str(raised.value) == f"output-dir: {tmp_path / 'out'} is in use by process {holder} on {socket.gethostname()}"
    )
    assert raised.value.code == 2
    with lock(tmp_path / "out", "samples"):
        assert sorted(os.listdir(tmp_path / "out")) == [".samples.lock", ".train.lock"]


@pytest.mark.parametrize(("written", "named"), [(b"", "another process"), (b"process 7 \xff", "process 7 \ufffd")])
def test_a_holder_is_waited_for_a_moment_and_may_be_unreadable(tmp_path, holder, monkeypatch, written, named):
    path, before, waited = tmp_path / "out" / ".train.lock", len(os.listdir("/proc/self/fd")), []

    def sleep(seconds):
        waited.append(seconds)
        with open(path, "r+b") as file:
            file.truncate(0)
            file.write(written)

    monkeypatch.setattr(utils.output_dir.time, "sleep", sleep)
    with pytest.raises(UserError) as raised, lock(tmp_path / "out", "train"):
        raise AssertionError("both hold it")
    assert str(raised.value) == f"output-dir: {tmp_path / 'out'} is in use by {named}"
    assert waited == [0.2]
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_folder_that_another_process_has_just_made_is_taken(tmp_path, monkeypatch):
    real = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: path != tmp_path and real(path))
    with lock(tmp_path, "train"):
        assert os.listdir(tmp_path) == [".train.lock"]


def test_a_killed_holder_is_not_in_the_way_even_while_its_child_lives(tmp_path, holder):
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    assert (tmp_path / "out" / ".train.lock").exists()
    with lock(tmp_path / "out", "train"):
        text = (tmp_path / "out" / ".train.lock").read_text()
        assert text == f"process {os.getpid()} on {socket.gethostname()}"
    assert os.listdir(tmp_path / "out") == []


def test_the_lock_file_follows_the_umask(tmp_path):
    before = os.umask(0o002)
    try:
        with lock(tmp_path / "out", "train"):
            assert (tmp_path / "out" / ".train.lock").stat().st_mode & 0o777 == 0o664
    finally:
        os.umask(before)


def test_a_longer_name_before_leaves_no_rest(tmp_path):
    (tmp_path / ".train.lock").write_text("x" * 500)
    with lock(tmp_path, "train"):
        assert (tmp_path / ".train.lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"


def test_folders_are_made_and_synced_and_go_again_when_nothing_was_written(tmp_path, monkeypatch):
    synced, real = [], utils.output_dir.sync
    monkeypatch.setattr(utils.output_dir, "sync", lambda path: (synced.append(path), real(path)))
    with pytest.raises(KeyError), lock(tmp_path / "a" / "b", "train"):
        raise KeyError
    assert synced == [tmp_path, tmp_path / "a"]
    assert os.listdir(tmp_path) == []
    (tmp_path / "empty").mkdir()
    with lock(tmp_path / "empty", "train"):
        pass
    with lock(tmp_path / "a" / "b", "train"):
        (tmp_path / "a" / "b" / "file").write_text("x")
    assert sorted(os.listdir(tmp_path)) == ["a", "empty"]
    assert os.listdir(tmp_path / "a" / "b") == ["file"]


@pytest.mark.parametrize("moment", ["removed", "made anew"])
def test_a_file_removed_between_open_and_lock_is_no_lock(tmp_path, monkeypatch, moment):
    """The last holder removed it: a lock on that file would exclude nobody."""
    real, calls = fcntl.lockf, []

    def remove_first(descriptor, how):
        calls.append(descriptor)
        if len(calls) == 1:
            (tmp_path / ".train.lock").rename(tmp_path / "away")
            if moment == "made anew":
                (tmp_path / ".train.lock").write_text("")
        return real(descriptor, how)

    monkeypatch.setattr(fcntl, "lockf", remove_first)
    before = len(os.listdir("/proc/self/fd"))
    with lock(tmp_path, "train"):
        assert (tmp_path / ".train.lock").read_text().startswith("process ")
    assert len(calls) == 2
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_link_in_its_place_is_not_followed(tmp_path):
    (tmp_path / "outside").write_text("kept")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".train.lock").symlink_to(tmp_path / "outside")
    with pytest.raises(OSError, match="symbolic"), lock(tmp_path / "out", "train"):
        pass
    assert (tmp_path / "outside").read_text() == "kept"


def test_leftovers_and_locks_do_not_make_a_folder_foreign(tmp_path):
    out = tmp_path / "out"
    for name in (PARTIAL, OLD):
        (out / name).mkdir(parents=True)
    (out / ".train.lock").write_text("")
    check_output_dir(out, False, "x.py", False)
    (out / "letter.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is not empty and not made by x\.py"):
        check_output_dir(out, False, "x.py", False)
    check_output_dir(out, False, "x.py", True)
    check_output_dir(out, True, "x.py", False)


@pytest.mark.parametrize("name", [".notes", "book.lock"])
def test_a_hidden_file_and_a_lock_of_others_make_a_folder_foreign(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError) as raised:
        check_output_dir(tmp_path, False, "x.py", False)
    says = f"{tmp_path} is not empty and not made by x.py; use another or --overwrite"
    assert str(raised.value) == f"output-dir: {says}"


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A working folder with a home, an input, an output, a file and links."""
    for name in ("work/here", "home", "model/sub", "out", "locked"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("out")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "model").symlink_to("../model")
    monkeypatch.chdir(tmp_path / "work" / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK | os.X_OK or path != tmp_path / "locked")
    return tmp_path


REFUSED = [
    ("link", "{} is a symbolic link to out; give that"),
    ("file", "{} is a file, expected a directory"),
    ("home", "refusing to use {}; give a folder of its own"),
    ("work", "refusing to use {}; give a folder of its own"),
    ("work/here", "refusing to use {}; give a folder of its own"),
    ("model", "refusing to use {}; {root}/model is read, give a folder of its own"),
    ("model/sub", "refusing to use {}; {root}/model is read, give a folder of its own"),
    ("linked", "{}/model is a symbolic link; remove it"),
    ("locked", "{} is not writable"),
    ("locked/new/one", "{} is not writable"),
]


@pytest.mark.parametrize(("name", "says"), REFUSED)
def test_a_place_that_is_not_safe_is_refused(places, name, says):
    inputs = ["gpt2", places / "file", places / "model"]
    with pytest.raises(UserError) as raised:
        check_output_dir(places / name, True, "x.py", True, inputs)
    assert str(raised.value) == "output-dir: " + says.format(places / name, root=places)


def test_the_root_and_a_folder_around_an_input_are_refused(places):
    with pytest.raises(UserError, match="refusing to use /; give a folder of its own"):
        check_output_dir(places.__class__("/"), True, "x.py", True)
    with pytest.raises(UserError, match="model/sub is read"):
        check_output_dir(places / "model", True, "x.py", True, [places / "model/sub"])


def test_safe_places_are_taken(places):
    for name in ("out", "new", "out/new/deep", "model2", "work/here/out"):
        check_output_dir(places / name, False, "x.py", False, ["gpt2", places / "model"])
