"""utils/storage.py by itself: what is written in which order, what is left after a failure, what is refused."""

import errno
import json
import os
import shutil
import threading
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import utils.storage as files
from utils.errors import UserError
from utils.storage import MANIFEST, OLD, PARTIAL

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def operations(monkeypatch, tmp_path):
    """The fsyncs and renames of a test in their order, with names relative to tmp_path."""
    done = []

    def name(path):
        return Path(path).relative_to(tmp_path).as_posix()

    def hook(kind, original):
        def call(*paths):
            done.append((kind, *map(name, paths)))
            return original(*paths)

        return call

    monkeypatch.setattr(files, "sync", hook("sync", files.sync))
    for kind in ("replace", "rename"):
        monkeypatch.setattr(os, kind, hook("rename", getattr(os, kind)))
    return done


def test_a_text_file_is_synced_renamed_and_its_folder_synced(tmp_path, operations):
    files.write_text(tmp_path / "a.txt", "caf\u00e9")
    assert (tmp_path / "a.txt").read_bytes() == "caf\u00e9".encode()
    assert operations == [("sync", ".a.txt.partial"), ("rename", ".a.txt.partial", "a.txt"), ("sync", ".")]


def test_sync_reaches_the_disk(tmp_path, monkeypatch):
    """Both a file and a folder: fsync is called on a descriptor of that very path, which is closed again."""
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else None
    (tmp_path / "a").write_text("x")
    files.sync(tmp_path / "a")
    files.sync(tmp_path)
    assert synced == [(tmp_path / "a").stat().st_ino, tmp_path.stat().st_ino]
    assert before is None or len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("failing", ["write", "sync", "replace"])
def test_a_failed_replacement_leaves_the_old_file_alone(tmp_path, monkeypatch, failing):
    files.write_text(tmp_path / "a.txt", "old")

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "no space")

    owner = {"write": (Path, "write_text"), "sync": (files, "sync"), "replace": (os, "replace")}[failing]
    monkeypatch.setattr(*owner, fail)
    with pytest.raises(OSError, match="no space"):
        files.write_text(tmp_path / "a.txt", "new")
    monkeypatch.undo()
    assert (tmp_path / "a.txt").read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_json_is_readable_exact_and_finite(tmp_path):
    files.write_json(tmp_path / "a.json", {"a": "\u00e9", "b": [1]})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "a": "\u00e9",\n  "b": [\n    1\n  ]\n}\n'
    assert files.read_json(tmp_path / "a.json") == {"a": "\u00e9", "b": [1]}
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "b.json", {"a": float("nan")})
    assert not (tmp_path / "b.json").exists()


BROKEN = [
    (b'{"a": 1', "what: a.json is damaged: line 1 column 8"),
    (b'{\n"a" 1}', "what: a.json is damaged: line 2 column 5"),
    (b'{"a": "\xff"}', "what: a.json is damaged: byte 7 is not UTF-8"),
    (b"[" * 100_000, "what: a.json is damaged: nested too deeply, or a number too long"),
    (b'{"a": ' + b"1" * 5000 + b"}", "what: a.json is damaged: nested too deeply, or a number too long"),
    (b'{"a": "\\ud800"}', "what: a.json is damaged: byte 7 is not UTF-8"),
    (b"[1]", "what: a.json is damaged: not a JSON object"),
    (None, "what: a.json: no such file"),
]


@pytest.mark.parametrize(("content", "says"), BROKEN)
def test_broken_json_is_named(tmp_path, monkeypatch, content, says):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("a.json").write_bytes(content)
    with pytest.raises(UserError) as raised:
        files.read_json(Path("a.json"), "what: ")
    assert str(raised.value) == says
    assert raised.value.code == 2
    with pytest.raises(UserError) as raised:
        files.read_json(Path("a.json"))
    assert str(raised.value) == says.removeprefix("what: ")


def fill(partial, text="x", error=None):
    (partial / "a.bin").write_text(text)
    (partial / "sub").mkdir()
    (partial / "sub" / "b.bin").write_text(text * 2)
    if error:
        raise error


def test_a_folder_is_published_in_one_rename_after_everything_is_synced(tmp_path, operations):
    with files.publish_folder(tmp_path / "out", {"format": 1}, 10, "a thing") as partial:
        fill(partial)
    assert operations == [
        ("sync", ".partial/a.bin"), ("sync", ".partial/sub"), ("sync", ".partial/sub/b.bin"),
        ("sync", ".partial/.manifest.json.partial"),
        ("rename", ".partial/.manifest.json.partial", ".partial/manifest.json"), ("sync", ".partial"),
        ("rename", ".partial", "out"), ("sync", "."),
    ]  # fmt: skip
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["format"] == 1
    assert manifest["files"]["sub/b.bin"] == {"bytes": 2, "sha256": files.hash_file(tmp_path / "out/sub/b.bin")}
    assert sorted(manifest["files"]) == ["a.bin", "sub/b.bin"]
    assert files.verify_folder(tmp_path / "out") is None
    assert os.listdir(tmp_path) == ["out"]


def test_a_published_folder_takes_the_place_of_the_old_one(tmp_path, operations):
    for text in ("x", "y"):
        with files.publish_folder(tmp_path / "out", {}, 10, "a thing") as partial:
            fill(partial, text)
    assert (tmp_path / "out/a.bin").read_text() == "y"
    renames = [entry[1:] for entry in operations if entry[0] == "rename" and MANIFEST not in entry[2]]
    assert renames == [(".partial", "out"), ("out", ".old"), (".partial", "out")]
    assert os.listdir(tmp_path) == ["out"]


def test_files_are_published_behind_a_manifest_that_knows_old_and_new(tmp_path, operations, monkeypatch):
    """At every moment the folder agrees with its manifest, also between the moves."""
    seen = []
    replace = os.replace

    def look(source, target):
        replace(source, target)
        if (tmp_path / MANIFEST).is_file():
            seen.append((Path(target).name, (tmp_path / "a.bin").exists() and (tmp_path / "a.bin").read_text(),
                         files.read_json(tmp_path / MANIFEST).get("replaces", "nothing")))  # fmt: skip

    with files.publish_files(tmp_path, {"format": 1}, 10, "a thing") as partial:
        (partial / "a.bin").write_text("old")
    (tmp_path / "other.txt").write_text("stays")
    old = files.read_sealed(tmp_path)["files"]
    del operations[:]
    monkeypatch.setattr(os, "replace", look)
    with files.publish_files(tmp_path, {"format": 1}, 10, "a thing") as partial:
        (partial / "a.bin").write_text("new")
    assert seen == [
        (MANIFEST, "old", "nothing"), (MANIFEST, "old", old), ("a.bin", "new", old), (MANIFEST, "new", "nothing"),
    ]  # fmt: skip
    assert [entry for entry in operations if entry[1] == "."] == [("sync", ".")] * 3
    assert files.verify_folder(tmp_path) is None
    assert sorted(os.listdir(tmp_path)) == ["a.bin", MANIFEST, "other.txt"]
    assert sorted(files.read_json(tmp_path / MANIFEST)) == ["files", "format", "sha256"]


def test_published_subfolders_replace_the_old_ones(tmp_path):
    for name in ("b.bin", "c.bin"):
        with files.publish_files(tmp_path, {}, 10, "a thing") as partial:
            (partial / "sub").mkdir()
            (partial / "sub" / name).write_text(name)
    assert os.listdir(tmp_path / "sub") == ["c.bin"]
    assert sorted(os.listdir(tmp_path)) == [MANIFEST, "sub"]


def test_a_damaged_manifest_does_not_stop_the_next_publish(tmp_path):
    (tmp_path / MANIFEST).write_text("{")
    with files.publish_files(tmp_path, {}, 10, "a thing") as partial:
        fill(partial)
    assert files.verify_folder(tmp_path) is None


def test_modes_follow_the_umask(tmp_path):
    before = os.umask(0o002)
    try:
        with files.publish_folder(tmp_path / "out", {}, 10, "a thing") as partial:
            fill(partial)
            (partial / "a.bin").chmod(0o600)
        assert os.umask(0o002) == 0o002
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*")}
    assert modes == {"a.bin": 0o664, "b.bin": 0o664, MANIFEST: 0o664, "sub": 0o775}


FAILURES = [
    (OSError(errno.ENOSPC, "x"), "no space left on device, a thing needs more than the 12.3 MB free"),
    (OSError(errno.EIO, "x"), "input/output error, a thing needs 5.0 MB, 12.3 MB free"),
    (
        RuntimeError("I/O error: No space left on device (os error 28)"),
        "no space left on device, a thing needs more than the 12.3 MB free",
    ),
]


@pytest.mark.parametrize(("error", "says"), FAILURES)
@pytest.mark.parametrize("publish", [files.publish_folder, files.publish_files])
def test_a_failing_disk_is_explained_and_nothing_is_left(tmp_path, monkeypatch, publish, error, says):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 12_340_000))
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("stays")
    with pytest.raises(UserError) as raised, publish(target, {}, 5_000_000, "a thing") as partial:
        fill(partial, error=error)
    folder = tmp_path if publish is files.publish_folder else target
    assert str(raised.value) == f"output-dir: {folder}: {says}"
    assert raised.value.code == 3
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]


def test_a_disk_that_refuses_the_very_folder_is_explained(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EROFS, "x")

    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(UserError, match="read-only file system, a thing needs"):
        files.publish_folder(tmp_path / "out", {}, 10, "a thing").__enter__()


def test_any_other_failure_is_left_as_it_is(tmp_path):
    with pytest.raises(KeyError, match="ours"), files.publish_folder(tmp_path / "out", {}, 1, "a thing") as partial:
        fill(partial, error=KeyError("ours"))
    assert os.listdir(tmp_path) == []


def test_what_will_not_fit_is_not_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 1_000_000))
    files.require_space(tmp_path, 1_000_000, "a thing")
    says = f"output-dir: {tmp_path}: disk full, a thing needs 1,500,000.0 MB, 1.0 MB free"
    with pytest.raises(UserError) as raised, files.publish_folder(tmp_path / "out", {}, 1_500_000_000_000, "a thing"):
        raise AssertionError("begun")
    assert (str(raised.value), raised.value.code) == (says, 3)
    assert os.listdir(tmp_path) == []


def test_a_disk_that_others_fill_lacks_what_was_estimated(tmp_path, monkeypatch):
    free = iter([12_340_000, 3_000_000])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, next(free)))
    says = "no space left on device, a thing needs 5.0 MB, 3.0 MB free"
    with pytest.raises(UserError, match=says), files.publish_folder(tmp_path / "out", {}, 5_000_000, "a thing"):
        raise OSError(errno.ENOSPC, "x")


def test_a_leftover_of_a_killed_run_is_no_part_of_the_next(tmp_path):
    (tmp_path / PARTIAL / "sub").mkdir(parents=True)
    (tmp_path / PARTIAL / "junk").write_text("x")
    with files.publish_folder(tmp_path / "out", {}, 10, "a thing") as partial:
        fill(partial)
    assert not (tmp_path / "out" / "junk").exists()


def test_sweep_removes_leftovers_only(tmp_path):
    for name in (PARTIAL, OLD, "checkpoint-3", f"checkpoint-3/{PARTIAL}"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    files.sweep(tmp_path)
    files.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["checkpoint-3", "file"]


def test_discard_takes_a_folder_away_in_one_rename(tmp_path, operations, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / OLD).mkdir()
    (tmp_path / OLD / "leftover").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_text("x")
    for name in ("out", "file", "link", "not there"):
        files.discard(tmp_path / name)
    assert operations == [("rename", "out", ".old")]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["elsewhere", "kept"]


def test_clear_keeps_locks_and_what_is_named(tmp_path):
    for name in ("a", "b", ".train.lock"):
        (tmp_path / name).write_text("x")
    (tmp_path / "sub").mkdir()
    files.clear_folder(tmp_path, keep=["b"])
    assert sorted(os.listdir(tmp_path)) == [".train.lock", "b"]
    files.clear_folder(tmp_path)
    assert os.listdir(tmp_path) == [".train.lock"]


@pytest.fixture
def published(tmp_path):
    with files.publish_folder(tmp_path / "out", {"format": 1}, 10, "a thing") as partial:
        fill(partial)
    return tmp_path / "out"


DAMAGE = [
    (lambda out: (out / "a.bin").unlink(), "a.bin is missing"),
    (lambda out: (out / "a.bin").write_text(""), "a.bin is damaged: 0 bytes, expected 1"),
    (lambda out: (out / "a.bin").write_text("xx"), "a.bin is damaged: 2 bytes, expected 1"),
    (lambda out: (out / "sub/b.bin").write_text("xy"), "sub/b.bin is damaged: checksum differs"),
    (lambda out: (out / MANIFEST).write_text("{}"), "manifest.json is damaged"),
    (lambda out: (out / MANIFEST).write_text('{"files": {"a.bin": {}}}'), "manifest.json is damaged"),
    (lambda out: (out / MANIFEST).write_text('{"files": {"a.bin": 3}}'), "manifest.json is damaged"),
    (lambda out: (out / MANIFEST).write_text('{"files": [1]}'), "manifest.json is damaged"),
]


@pytest.mark.parametrize(("damage", "says"), DAMAGE)
def test_damage_is_found(published, damage, says):
    damage(published)
    assert files.verify_folder(published) == f"{published}/{says}"


@pytest.mark.parametrize("name", ["../x", "/etc/hostname", "link", "linked/b.bin", "sub/../a.bin", ""])
def test_names_that_lead_elsewhere_are_refused(published, name):
    shutil.copy(published / "a.bin", published.parent / "x")
    (published / "link").symlink_to("a.bin")
    (published / "linked").symlink_to("sub")
    listed = {name: {"bytes": 1, "sha256": files.hash_file(published / "a.bin")}}
    problem = files.verify_files(published, listed)
    assert problem == f"{published / MANIFEST}: file name {name!r} not allowed"


def test_a_reader_waits_for_the_end_of_a_publish(tmp_path, monkeypatch):
    """A file of neither set under a manifest that is being replaced: look again, but not for ever."""
    with files.publish_files(tmp_path, {}, 10, "a thing") as partial:
        fill(partial)
    whole = files.read_sealed(tmp_path)
    files.write_sealed(tmp_path, whole | {"replaces": {"a.bin": {"bytes": 9, "sha256": "0"}}})
    assert files.verify_folder(tmp_path) is None
    (tmp_path / "a.bin").write_text("z")
    began = time.monotonic()
    assert files.verify_folder(tmp_path).endswith("checksum differs")
    assert 1 < time.monotonic() - began < 30

    writer = threading.Timer(0.3, lambda: files.write_text(tmp_path / "a.bin", "x"))
    writer.start()
    assert files.verify_folder(tmp_path) is None
    writer.join()


def test_a_reader_believes_the_old_set_while_it_is_replaced(tmp_path):
    with files.publish_files(tmp_path, {}, 10, "a thing") as partial:
        (partial / "a.bin").write_text("old")
    old = files.read_json(tmp_path / MANIFEST)["files"]
    new = {"a.bin": {"bytes": 3, "sha256": "0" * 64}}
    files.write_sealed(tmp_path, {"files": new, "replaces": old})
    assert files.verify_folder(tmp_path) is None
    files.write_sealed(tmp_path, {"files": new})
    assert files.verify_folder(tmp_path).endswith("checksum differs")


def test_a_publish_cut_short_twice_still_knows_what_lies_there(tmp_path, monkeypatch):
    """The manifest of the first cut names files that were never moved: the old ones are still the old ones."""
    with files.publish_files(tmp_path, {}, 10, "a thing") as partial:
        (partial / "a.bin").write_text("old")
    old = files.read_sealed(tmp_path)["files"]
    files.write_sealed(tmp_path, {"files": {"a.bin": {"bytes": 3, "sha256": "0" * 64}}, "replaces": old})
    seen, write = [], files.write_sealed
    monkeypatch.setattr(files, "write_sealed", lambda *given: (write(*given), seen.append(given[1].get("replaces"))))
    with files.publish_files(tmp_path, {}, 10, "a thing") as partial:
        (partial / "a.bin").write_text("new")
    assert seen == [None, old]
    assert files.verify_folder(tmp_path) is None


def test_a_link_where_the_new_file_is_written_is_not_followed(tmp_path):
    (tmp_path / "outside").write_text("kept")
    (tmp_path / ".a.txt.partial").symlink_to(tmp_path / "outside")
    files.write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "outside").read_text() == "kept"
    assert not (tmp_path / "a.txt").is_symlink()


def test_nothing_replaced_is_no_excuse_for_nothing_there(tmp_path):
    """The first publish killed before its files were moved: an empty old set would match anything."""
    new = {"a.bin": {"bytes": 3, "sha256": "0" * 64}}
    for before in (None, {}):
        files.write_sealed(tmp_path, {"files": new, "replaces": before})
        assert files.verify_folder(tmp_path).endswith("a.bin is missing")


def test_a_manifest_replaced_while_it_is_compared_is_read_again(tmp_path, monkeypatch):
    with files.publish_files(tmp_path, {}, 10, "a thing") as partial:
        (partial / "a.bin").write_text("old")
    verify, calls = files.verify_files, []

    def publish_before(folder, listed):
        calls.append(listed)
        if len(calls) == 1:
            with files.publish_files(tmp_path, {}, 10, "a thing") as partial:
                (partial / "a.bin").write_text("new")
        return verify(folder, listed)

    monkeypatch.setattr(files, "verify_files", publish_before)
    assert files.verify_folder(tmp_path) is None
    assert len(calls) == 2


@pytest.mark.parametrize("change", [{"format": 3}, {"more": 1}, {"format": None}])
def test_a_manifest_vouches_for_itself(published, change):
    """A flipped digit may give another manifest that is fine by its form."""
    changed = {k: v for k, v in (files.read_json(published / MANIFEST) | change).items() if v is not None}
    files.write_json(published / MANIFEST, changed)
    with pytest.raises(UserError, match=r"manifest\.json is damaged: checksum differs$"):
        files.verify_folder(published)
    del changed["sha256"]  # format 1 had manifests without it
    files.write_json(published / MANIFEST, changed)
    assert files.read_sealed(published) == changed
    assert files.verify_folder(published) is None


def test_the_checksum_of_a_manifest_does_not_depend_on_the_order_of_its_keys(tmp_path):
    files.write_sealed(tmp_path, {"format": 1, "files": {}})
    first = files.read_json(tmp_path / MANIFEST)["sha256"]
    files.write_sealed(tmp_path, {"files": {}, "format": 1})
    assert files.read_json(tmp_path / MANIFEST)["sha256"] == first


def test_a_damaged_tensor_file_is_named_with_its_reason(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"12345678{")
    with pytest.raises(UserError) as raised:
        files.open_tensors(tmp_path / "a.safetensors")
    assert str(raised.value).startswith(f"{tmp_path / 'a.safetensors'} is damaged: ")
    assert str(raised.value).removesuffix(str(raised.value.__context__)).endswith("is damaged: ")


def test_hash_of_several_files_does_not_depend_on_names_or_order(tmp_path):
    for name, text in (("a", "1"), ("b", "2"), ("c", "2"), ("d", "1")):
        (tmp_path / name).write_text(text)
    a, b, c, d = (tmp_path / name for name in "abcd")
    assert files.hash_files([a, b]) == files.hash_files([b, a]) == files.hash_files([c, d])
    assert files.hash_files([a, b]) != files.hash_files([a])


def test_tensors_are_written_one_by_one_as_a_safetensors_file(tmp_path):
    path, rows = tmp_path / "t.safetensors", {"b/attention": [300, 70], "a": [], "c": [5]}
    arrays = {name: np.random.default_rng(1).random(shape[::-1], np.float32).T for name, shape in rows.items()}

    def one_by_one():
        for number, array in enumerate(arrays.values()):
            assert number == 0 or path.stat().st_size >= arrays["b/attention"].nbytes  # before the others are there
            yield array

    files.write_tensors(path, rows, one_by_one())
    found = load_file(path)
    assert found.keys() == arrays.keys()
    assert all(np.array_equal(found[name], array) for name, array in arrays.items())
    assert all(found[name].dtype == np.float32 for name in found)
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
