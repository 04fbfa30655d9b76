"""Publish, verify: the only module that makes a file final.

A file or folder appears under its name whole or not at all: it is built beside its place, synced to
the disk, then renamed. Knows nothing of what is inside.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from utils.cli import UserError

MANIFEST = "manifest.json"


def hash_file(path: Path) -> str:
    """Return the sha256 of a file as hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Force a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace a text file whole: readers see the old content or the new, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


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
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{what}{path}: no such file") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{what}{path} is damaged: line {error.lineno} column {error.colno}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{what}{path} is damaged: byte {error.start} is not UTF-8") from None
    except RecursionError:
        raise UserError(f"{what}{path} is damaged: nested too deeply") from None
    if not isinstance(value, dict):
        raise UserError(f"{what}{path} is damaged: not a JSON object")
    return value


def _umask() -> int:
    """Read the umask; the system gives it only in exchange for a new one."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@contextmanager
def building(target: Path) -> Iterator[Path]:
    """Give an empty folder beside target to build in; it is synced at the end, and removed on error."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # a killed run's leftover
    missing = [parent for parent in partial.parents if not parent.exists()]
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in sorted(partial.rglob("*")):
            if path.is_file():
                path.chmod(0o666 & ~_umask())  # safetensors makes its files private whatever the umask
            sync(path)
        sync(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()
        raise


@contextmanager
def publish_folder(target: Path) -> Iterator[Path]:
    """Build a folder aside and rename it to target, replacing what stood there."""
    with building(target) as partial:
        yield partial
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(partial, target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def publish_files(folder: Path) -> Iterator[Path]:
    """Build several files aside and rename each into a folder that holds other files too."""
    with building(folder / "files") as partial:
        yield partial
    for path in sorted(partial.iterdir()):
        os.replace(path, folder / path.name)
    partial.rmdir()
    sync(folder)


def describe_files(folder: Path) -> dict[str, dict]:
    """List every file below a folder: its relative name, size in bytes and sha256."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": hash_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


def verify_files(folder: Path, files: dict[str, dict]) -> str | None:
    """Compare files with what describe_files said of them.

    Returns:
        None when all are as described, else one sentence on the first that is not.
    """
    for name, entry in files.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return f"{folder / MANIFEST}: file name {name!r} not allowed"
        if not path.is_file():
            return f"{path} is missing"
        size = path.stat().st_size
        if size != entry["bytes"]:
            return f"{path} is damaged: {size} bytes, expected {entry['bytes']}"
        if hash_file(path) != entry["sha256"]:
            return f"{path} is damaged: checksum differs"
    return None


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
    if path.is_dir() and any(path.iterdir()) and not is_ours and not overwrite:
        raise UserError(f"output-dir: {path} is not empty and not made by {maker}; use another or --overwrite")
    link = next((p for p in path.glob("*") if p.is_symlink()), None)
    if link:
        raise UserError(f"output-dir: {link} is a symbolic link; remove it")
    parent = next(p for p in (full, *full.parents) if p.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"output-dir: {path} is not writable")
