"""Publish and verify: the only module that makes a file final.

A file or folder appears under its name whole or not at all: it is built aside, synced to the disk, then
renamed, and the folder that holds its name is synced last. All of it happens inside the output folder.
Knows nothing of what is written.
"""

import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from utils.errors import EXIT_MACHINE, UserError, machine_reason

MANIFEST = "manifest.json"
# What is being built, and what is on its way out. A killed run leaves them behind; the next removes them.
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
    """Give a name to write a file to, then put it in the place of path: readers see the old or the new."""
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
    """Replace a text file whole."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file whole. NaN and infinity are refused: they are not JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, what: str = "") -> dict:
    """Read a JSON object.

    Args:
        path: the file.
        what: stands before the message of an error, like 'model: '.
    Raises:
        UserError: the file is missing, cut, or not a JSON object.
    """
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


def sweep(folder: Path) -> None:
    """Remove what a killed run left half built or half removed; only for the holder of the lock."""
    for path in (folder / PARTIAL, folder / OLD, *folder.glob(f"*/{PARTIAL}")):
        shutil.rmtree(path, ignore_errors=True)


def discard(path: Path) -> None:
    """Remove a file, or a folder at once under its name: killed in the middle, none is half there."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    old = path.parent / OLD
    shutil.rmtree(old, ignore_errors=True)
    os.rename(path, old)
    shutil.rmtree(old)


def clear_folder(folder: Path, keep: Iterable[str] = ()) -> None:
    """Remove what a folder holds, but for locks and the names to keep."""
    for path in sorted(folder.iterdir()):
        if path.name not in keep and path.suffix != ".lock":
            discard(path)


def require_space(folder: Path, size: int, what: str) -> None:
    """Refuse to begin what will not fit.

    Args:
        folder: where it will be written.
        size: bytes it will take.
        what: begins the message, like 'a checkpoint'.
    Raises:
        UserError: fewer bytes are free (exit status 3).
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(f"output-dir: {folder}: disk full, {what} needs {_mb(size)}, {_mb(free)} free", EXIT_MACHINE)


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


@contextmanager
def building(folder: Path, size: int, what: str) -> Iterator[Path]:
    """Give an empty folder inside folder to build in; whatever fails, it is removed again.

    Raises:
        UserError: the disk is full or fails (exit status 3); the message tells what is needed and free.
    """
    partial = folder / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    require_space(folder, size, what)
    try:
        partial.mkdir()
        yield partial
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = machine_reason(error)
        if reason is None:
            raise
        sizes = f"{what} needs {_mb(size)}, {_mb(shutil.disk_usage(folder).free)} free"
        raise UserError(f"output-dir: {folder}: {reason}, {sizes}", EXIT_MACHINE) from None


def _seal(partial: Path, manifest: dict) -> None:
    """Describe what was built in its manifest, and force all of it to the disk, the manifest last."""
    os.umask(mask := os.umask(0o077))  # the system tells the umask only in exchange for a new one
    with ThreadPoolExecutor(1) as beside:
        described = beside.submit(describe_files, partial)  # the processor's work, while the disk does its own
        for path in sorted(partial.rglob("*")):
            if path.is_file():
                path.chmod(0o666 & ~mask)  # safetensors makes its files private whatever the umask
            sync(path)
        manifest["files"] = described.result()
    write_sealed(partial, manifest)


@contextmanager
def publish_folder(target: Path, manifest: dict, size: int, what: str) -> Iterator[Path]:
    """Build a folder aside and rename it to target.

    Args:
        target: the new folder; what stands there is replaced.
        manifest: what manifest.json says besides sizes and checksums of the files.
        size: bytes expected.
        what: names it in an error, like 'a checkpoint'.
    """
    with building(target.parent, size, what) as partial:
        yield partial
        _seal(partial, manifest)
        discard(target)
        os.rename(partial, target)
        sync(target.parent)


@contextmanager
def publish_files(folder: Path, manifest: dict, size: int, what: str) -> Iterator[Path]:
    """Build files aside and move them into a folder that stays where it is; arguments as publish_folder.

    The manifest goes first and describes the files that it replaces too, so that at every moment the
    folder agrees with its manifest: a reader finds all of the old or all of the new.
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
    """Replace a folder's manifest.json, which carries the sha256 of its own content too."""
    write_json(folder / MANIFEST, manifest | {"sha256": _digest(manifest)})


def read_sealed(folder: Path) -> dict:
    """Read a folder's manifest.json.

    Raises:
        UserError: it is missing or damaged.
    """
    manifest = read_json(folder / MANIFEST)
    if manifest.get("sha256", said := _digest(manifest)) != said:
        raise UserError(f"{folder / MANIFEST} is damaged: checksum differs")
    return manifest


def _digest(manifest: dict) -> str:
    said = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def describe_files(folder: Path) -> dict[str, dict]:
    """List every file below a folder but its manifest: relative name, size in bytes and sha256."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / MANIFEST]
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(hash_file, paths)
        return {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256}
            for path, sha256 in zip(paths, hashes, strict=True)
        }


def verify_folder(folder: Path) -> str | None:
    """Compare a published folder with its manifest, also while a writer replaces its files.

    Returns:
        None when every file is as the manifest says, else one sentence on the first that is not.
    Raises:
        UserError: the manifest itself cannot be read.
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
    """Compare files with what describe_files said of them; returns as verify_folder."""
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


@contextmanager
def lock(folder: Path, name: str) -> Iterator[None]:
    """Make a folder and be its only writer; locks of different names do not exclude each other.

    The system releases the lock however its holder ends, and workers forked from it never hold it.

    Raises:
        UserError: another process holds it; the message names pid and host.
    """
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    for parent in reversed(made):
        parent.mkdir(exist_ok=True)
        sync(parent.parent)
    path = folder / f".{name}.lock"
    try:
        descriptor = _take(path, folder)
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
            yield
        finally:
            with suppress(OSError):  # a disk gone read-only must not hide what went wrong
                path.unlink()
            os.close(descriptor)
    finally:
        for parent in made:  # a refused run leaves nothing behind
            with suppress(OSError):
                parent.rmdir()


def _take(path: Path, folder: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except FileNotFoundError:
            pass  # the last holder removed it between open and lock: try anew
        except BlockingIOError:
            time.sleep(0.2)  # the holder may be just about to write who it is
            holder = os.pread(descriptor, 300, 0).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise UserError(f"output-dir: {folder} is in use by {holder}") from None
        os.close(descriptor)


def check_output_dir(path: Path, is_ours: bool, maker: str, overwrite: bool, inputs: Iterable = ()) -> None:
    """Refuse an output folder that is not safe to write.

    Args:
        path: the folder given.
        is_ours: it carries this program's mark.
        maker: the script's name, for the message.
        overwrite: the user allowed replacing what is there.
        inputs: folders that are read; names of what is no folder here are left aside.
    Raises:
        UserError: a file, a link, a place like / or home, a folder with other content or with an input.
    """
    if path.is_symlink():
        raise UserError(f"output-dir: {path} is a symbolic link to {os.readlink(path)}; give that")
    if path.exists() and not path.is_dir():
        raise UserError(f"output-dir: {path} is a file, expected a directory")
    full = path.resolve()
    if full in (Path("/"), Path.home().resolve()) or Path.cwd().resolve().is_relative_to(full):
        raise UserError(f"output-dir: refusing to use {path}; give a folder of its own")
    for given in filter(os.path.isdir, inputs):
        folder = Path(given).resolve()
        if full.is_relative_to(folder) or folder.is_relative_to(full):
            raise UserError(f"output-dir: refusing to use {path}; {given} is read, give a folder of its own")
    inside = list(path.iterdir()) if path.is_dir() else []
    leftovers = [p for p in inside if p.name[0] == "." and p.name.endswith((PARTIAL, OLD, ".lock"))]
    if len(inside) > len(leftovers) and not is_ours and not overwrite:
        raise UserError(f"output-dir: {path} is not empty and not made by {maker}; use another or --overwrite")
    link = next((p for p in inside if p.is_symlink()), None)
    if link:
        raise UserError(f"output-dir: {link} is a symbolic link; remove it")
    parent = next(p for p in (full, *full.parents) if p.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"output-dir: {path} is not writable")
