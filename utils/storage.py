"""Write atomically, describe and verify: the only module that makes a file final.

A file or folder appears under its name whole or not at all: it is built inside the output folder, synced, renamed,
and the folder that holds its name is synced last.
"""

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from utils.errors import EXIT_MACHINE, OUT_OF_MEMORY, UserError, machine_reason

MANIFEST = "manifest.json"
# What is being built, and what is being removed. A killed run leaves them behind; the next run removes them.
PARTIAL, OLD = ".partial", ".old"


def hash_file(path: Path) -> str:
    """Return the sha256 of a file as hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(paths: Iterable[Path]) -> str:
    """Return one sha256 over several files, whatever their names and order are."""
    return join_hashes(map(hash_file, paths))


def join_hashes(hashes: Iterable[str]) -> str:
    """Return what hash_files returns, from hashes that are known already."""
    return hashlib.sha256("".join(sorted(hashes)).encode()).hexdigest()


def sync(path: Path) -> None:
    """Force a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write to, then move it to `path`: readers see the old file or the new one."""
    partial = path.with_name(f".{path.name}{PARTIAL}")
    try:
        partial.unlink(missing_ok=True)  # written through a link, it would change a file elsewhere
        yield partial
        sync(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically; paths become strings, NaN and infinity raise ValueError."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=os.fspath) + "\n")


def write_tensors(path: Path, shapes: dict[str, Sequence[int]], arrays: Iterable) -> None:
    """Write float32 arrays of these names and shapes as a safetensors file, one by one: memory need not hold all."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data start at a multiple of 8 bytes
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays:
            file.write(array.reshape(-1).data)  # a copy only where the array is not contiguous


def open_tensors(path: Path) -> safe_open:
    """Open a safetensors file, whose tensors are read one by one."""
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from None


def read_json(path: Path, what: str = "") -> dict:
    """Read a JSON object; UserError, with the prefix `what`, if it is missing, damaged or no object."""
    if not path.is_file():  # nor a device without an end
        raise UserError(f"{what}{path}: no such file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(value, ensure_ascii=False).encode()  # half a character (a surrogate) could not be written again
    except json.JSONDecodeError as error:
        raise UserError(f"{what}{path} is damaged: line {error.lineno} column {error.colno}") from None
    except UnicodeError as error:
        raise UserError(f"{what}{path} is damaged: byte {error.start} is not UTF-8") from None
    except (RecursionError, ValueError):  # ValueError: a whole number of thousands of digits
        raise UserError(f"{what}{path} is damaged: nested too deeply, or a number too long") from None
    if not isinstance(value, dict):
        raise UserError(f"{what}{path} is damaged: not a JSON object")
    return value


def diff_settings(before: Any, now: dict) -> tuple[str, Any, Any] | None:
    """Return the first of the settings `now` that differs, as (name, before, now), or None."""
    before = before if isinstance(before, dict) else {}  # read from a file: it may be damaged
    return next(((name, before.get(name), value) for name, value in now.items() if before.get(name) != value), None)


def sweep(folder: Path) -> None:
    """Remove what a killed run left partly built or partly removed. Call it only while holding the lock."""
    for path in (folder / PARTIAL, folder / OLD, *folder.glob(f"*/{PARTIAL}")):
        shutil.rmtree(path, ignore_errors=True)


def discard(path: Path) -> None:
    """Remove a file or folder; a folder is renamed first, so that a kill leaves no part of it under its name."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    old = path.parent / OLD
    shutil.rmtree(old, ignore_errors=True)
    os.rename(path, old)
    shutil.rmtree(old)


def clear_folder(folder: Path, keep: Iterable[str] = ()) -> None:
    """Remove the contents of a folder except locks and the names to keep."""
    for path in sorted(folder.iterdir()):
        if path.name not in keep and path.suffix != ".lock":
            discard(path)


def require_space(folder: Path, size: int, what: str) -> None:
    """Raise UserError (exit status 3) when fewer than `size` bytes are free for `what`, such as 'a checkpoint'."""
    if shutil.disk_usage(folder).free < size:
        raise _disk_error(folder, "disk full", size, what)


def _disk_error(folder: Path, reason: str, size: int, what: str) -> UserError:
    free = shutil.disk_usage(folder).free
    needed, there = (f"{n_bytes / 1e6:,.1f} MB" for n_bytes in (size, free))
    # Free space after "no space": what filled the disk is removed by now, and the estimate was too small.
    needs = f"more than the {there}" if "no space" in reason and free >= size else f"{needed}, {there}"
    return UserError(f"output-dir: {folder}: {reason}, {what} needs {needs} free", EXIT_MACHINE)


@contextmanager
def building(folder: Path, size: int, what: str) -> Iterator[Path]:
    """Yield an empty folder inside `folder` to build in, removed on any error; UserError for a full or failing disk."""
    partial = folder / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    require_space(folder, size, what)
    try:
        partial.mkdir()
        yield partial
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = machine_reason(error)
        if reason in (None, OUT_OF_MEMORY):
            raise
        raise _disk_error(folder, reason, size, what) from error


def _seal(partial: Path, manifest: dict) -> None:
    """List the built files in the manifest and sync all of them, the manifest last."""
    os.umask(mask := os.umask(0o077))  # the system tells the umask only in exchange for a new one
    with ThreadPoolExecutor(1) as beside:
        described = beside.submit(describe_files, partial)  # hash while the disk syncs
        for path in sorted(partial.rglob("*")):
            if path.is_file():
                path.chmod(0o666 & ~mask)  # safetensors makes its files private whatever the umask
            sync(path)
        manifest["files"] = described.result()
    write_sealed(partial, manifest)


@contextmanager
def publish_folder(target: Path, manifest: dict, size: int, what: str) -> Iterator[Path]:
    """Build a folder and rename it to `target`, replacing what is there.

    Args:
        manifest: content of manifest.json besides the files' sizes and checksums.
        size: bytes expected, of `what`: its name in an error, like 'a checkpoint'.
    """
    with building(target.parent, size, what) as partial:
        yield partial
        _seal(partial, manifest)
        discard(target)
        os.rename(partial, target)
        sync(target.parent)


@contextmanager
def publish_files(folder: Path, manifest: dict, size: int, what: str) -> Iterator[Path]:
    """Build files and move them into an existing folder; arguments as in publish_folder.

    The manifest is written first and also lists the files being replaced, so that the folder agrees with its manifest
    at every moment: a reader finds all old files or all new ones.
    """
    with building(folder, size, what) as partial:
        yield partial
        _seal(partial, manifest)
        write_sealed(folder, manifest | {"replaces": _described(folder)})
        for path in sorted(partial.iterdir()):
            if path.name != MANIFEST:
                if path.is_dir():
                    discard(folder / path.name)
                os.replace(path, folder / path.name)
        sync(folder)
        os.replace(partial / MANIFEST, folder / MANIFEST)
        sync(folder)
        partial.rmdir()


def _described(folder: Path) -> Any:
    with suppress(UserError):
        manifest = read_sealed(folder)
        before = manifest.get("replaces")  # still there when a publish was cut short
        return before if before and verify_files(folder, before) is None else manifest.get("files")


def write_sealed(folder: Path, manifest: dict) -> None:
    """Write a folder's manifest.json with the sha256 of its own content."""
    write_json(folder / MANIFEST, manifest | {"sha256": _digest(manifest)})


def read_sealed(folder: Path) -> dict:
    """Read a folder's manifest.json; UserError if it is missing or damaged."""
    manifest = read_json(folder / MANIFEST)
    if manifest.get("sha256", said := _digest(manifest)) != said:
        raise UserError(f"{folder / MANIFEST} is damaged: checksum differs")
    return manifest


def _digest(manifest: dict) -> str:
    said = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def describe_files(folder: Path) -> dict[str, dict]:
    """List the files below a folder except its manifest: {relative name: {"bytes": size, "sha256": hex}}."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / MANIFEST]
    with ThreadPoolExecutor() as pool:
        hashed = zip(paths, pool.map(hash_file, paths), strict=True)
        return {p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256} for p, sha256 in hashed}


def verify_folder(folder: Path) -> str | None:
    """Compare a folder with its manifest, even while a writer replaces its files; UserError for a damaged manifest.

    Returns:
        None if every file matches, else one sentence on the first that does not.
    """
    patience = time.monotonic() + 2
    while True:
        manifest = read_sealed(folder)
        problem, before = verify_files(folder, manifest.get("files")), manifest.get("replaces")
        if problem is None or (before and verify_files(folder, before) is None):
            return None
        under_way = "replaces" in manifest or read_sealed(folder) != manifest
        if not under_way or time.monotonic() > patience:
            return problem
        time.sleep(0.02)


def verify_files(folder: Path, files: Any) -> str | None:
    """Compare files with the output of describe_files; returns as verify_folder."""
    root = os.path.realpath(folder)
    try:
        entries = [(n, os.path.realpath(folder / n), entry["bytes"], entry["sha256"]) for n, entry in files.items()]
    except (KeyError, TypeError, ValueError, AttributeError):
        return f"{folder / MANIFEST} is damaged"
    for name, real, expected, sha256 in entries:
        path = folder / name
        if real != f"{root}/{name}":  # ../x, /x, a link, or a link on the way
            return f"{folder / MANIFEST}: file name {name!r} not allowed"
        if not os.path.isfile(path):  # False for a name too long, too
            return f"{path} is missing"
        size = path.stat().st_size
        if size != expected:
            return f"{path} is damaged: {size} bytes, expected {expected}"
        if hash_file(path) != sha256:
            return f"{path} is damaged: checksum differs"
    return None
