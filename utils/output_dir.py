"""The output folder: what may be written where, and by one process at a time."""

import fcntl
import os
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from utils.errors import UserError
from utils.storage import OLD, PARTIAL, sync


@contextmanager
def lock(folder: Path, name: str) -> Iterator[None]:
    """Create a folder and hold its lock `name`; UserError names pid and host of another holder.

    A POSIX record lock: released however its holder ends, and not inherited by forked workers.
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
    """Raise UserError for an output folder that is unsafe to write: a file, a link, /, home, foreign content, an input.

    Args:
        is_ours: it was written by the script `maker`.
        inputs: folders that are read; other names are ignored.
    """
    if path.is_symlink():
        raise UserError(f"output-dir: {path} is a symbolic link to {os.readlink(path)}; give that")
    if path.exists() and not path.is_dir():
        raise UserError(f"output-dir: {path} is a file, expected a directory")
    full = path.resolve()
    if full == Path.home().resolve() or Path.cwd().resolve().is_relative_to(full):  # / is above every folder
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
