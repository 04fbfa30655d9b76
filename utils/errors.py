"""What ends a program: UserError, exit codes, and the machine's failures in words. Knows no other module."""

import errno
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# The user's input, the machine (disk, network, memory), training diverged.
EXIT_INPUT, EXIT_MACHINE, EXIT_DIVERGED = 2, 3, 4
# A full or failing disk, a quota, a read-only file system: not the user's fault.
MACHINE_ERRNOS = {errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT}
OUT_OF_MEMORY = "out of memory"
GPU_FULL = "OutOfMemoryError"  # the name of torch's error; torch is not imported here


class UserError(Exception):
    """A condition that ends the program with one line on stderr and the exit status `code`, without a traceback.

    The message names what is wrong with its value, what was expected, and what to do.
    """

    def __init__(self, message: str, code: int = EXIT_INPUT) -> None:
        super().__init__(message)
        self.code = code


def warn(message: str) -> None:
    """Print one line on stderr that starts with 'warning: '; of several processes, the first speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {message}", file=sys.stderr, flush=True)


def machine_reason(error: BaseException) -> str | None:
    """Return the system's words for a failure of the machine, None for any other error."""
    # Libraries that write from C++ and Rust give the errno in their message only.
    found = re.search(r"(?:os error |[Ee]rrno )(\d+)", str(error))
    number = getattr(error, "errno", None) or (int(found.group(1)) if found else None)
    if isinstance(error, MemoryError) or number == errno.ENOMEM or "can't allocate memory" in str(error):  # torch's
        return OUT_OF_MEMORY
    if type(error).__name__ == GPU_FULL:
        return OUT_OF_MEMORY
    return os.strerror(number).lower() if number in MACHINE_ERRNOS else None


def lost_process(error: BaseException) -> str | None:
    """Return in words that another process of the same run has ended or hangs, None for any other error."""
    if not re.match("Dist.*Error", type(error).__name__) and not re.search("gloo|NCCL", str(error)):
        return None
    waited = re.search("timed ?out|timeout", str(error), re.IGNORECASE)
    return f"another process {'does not answer' if waited else 'has ended'}"


def resume_advice() -> str:
    """Say how to go on; the same command with --overwrite would remove what is saved."""
    return f"run the same command {'without --overwrite ' * ('--overwrite' in sys.argv)}to resume"


def require_finite(step: int | str, **values: float) -> None:
    """Raise UserError (exit status 4) when one of the named values is NaN or infinite."""
    for what, value in values.items():
        if not math.isfinite(value):
            raise UserError(f"{what} is not a finite number at step {step}", EXIT_DIVERGED)


@contextmanager
def explain_failures(
    state: Any, list_checkpoints: Callable[[], list[Path]], batch_size: int, learning_rate: float
) -> Iterator[None]:
    """Re-raise known failures of a training (out of memory, full disk, divergence) as a one-line UserError.

    It names state.step, the newest of list_checkpoints(), and smaller micro-batches or another learning rate to try.
    """
    try:
        yield
    except Exception as error:
        # PyTorch reports a killed data worker a second time, from a signal handler: not in the middle of this.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        what, code, advice = machine_reason(error), getattr(error, "code", EXIT_MACHINE), resume_advice()
        is_gpu = type(error).__name__ == GPU_FULL
        if isinstance(error, UserError):
            if code == EXIT_INPUT:
                raise  # a refusal is no failure
            what = str(error)
            if code == EXIT_DIVERGED:
                advice = f"try a --learning-rate below {learning_rate:g}, with --overwrite"
        elif what == OUT_OF_MEMORY:
            size = state.machine.get("micro_batch_size", batch_size)
            smaller = f"--micro-batch-size {size // 2} or " if size > 1 else ""
            what = f"out of {'GPU ' if is_gpu else ''}memory ({size} blocks per forward pass)"
            advice = f"try {smaller}--gradient-checkpointing"  # a resumed run may change both
        elif isinstance(error, ConnectionResetError | EOFError) or "DataLoader worker (pid" in str(error):
            what = "a data worker was killed (out of memory?)"
        else:
            what = what or lost_process(error)
        if what is None:
            raise  # a defect of this program keeps its traceback
        at, saved = "" if "at step" in what else f" at step {state.step}", list_checkpoints()
        safe = f"{saved[0].name} is safe" if saved else "no checkpoint yet"
        raise UserError(f"{what}{at}; {safe}; {advice}", code) from error
