"""One writer a folder."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from utils.cli import UserError
from utils.files import sync


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
            path.unlink(missing_ok=True)
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
