"""What ends a program: UserError, exit codes, and the machine's failures in words."""

import errno
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

EXIT_INPUT = 2
EXIT_MACHINE = 3
EXIT_DIVERGED = 4
# The machine's fault, not the user's: full or failing disk, quota, read-only file system.
MACHINE_ERRNOS = {errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT}


class UserError(Exception):
    """A condition that ends the program with one line on stderr and no traceback.

    Args:
        message: what is wrong with its value, what was expected, what to do.
        code: exit status; 2 the user's input, 3 the machine, 4 training diverged.
    """

    def __init__(self, message: str, code: int = EXIT_INPUT) -> None:
        super().__init__(message)
        self.code = code


def machine_reason(error: BaseException) -> str | None:
    """Say in the system's words how the machine failed, or None when it was not the machine.

    The libraries that write from C++ and Rust give the errno in their message only.
    """
    found = re.search(r"(?:os error |[Ee]rrno )(\d+)", str(error))
    number = getattr(error, "errno", None) or (int(found.group(1)) if found else None)
    return os.strerror(number).lower() if number in MACHINE_ERRNOS else None


def warn(message: str) -> None:
    """Print one line on stderr that starts with 'warning: '."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


def require_finite(state, lr: float | None, **values: float) -> None:
    """Stop before an update that would fill every weight with NaN.

    Args:
        state: the run's TrainState.
        lr: learning rate of the update at hand, None outside one.
        values: what to look at, by name.
    """
    for what, value in values.items():
        if not math.isfinite(value):
            at = f" {state.step + 1} (lr {lr:g})" if lr is not None else f" {state.step}"
            raise UserError(f"{what} is not a finite number at step{at}", EXIT_DIVERGED)


def explain(error: Exception, args, state, saved: list[Path]) -> UserError | None:
    """Say what ended a training, what is safe and what to do; None for a defect of this program.

    Args:
        error: what was raised.
        args: the flags.
        state: the run's TrainState.
        saved: its checkpoints, newest first.
    """
    what, advice = machine_reason(error), "the same command goes on from there"
    code = getattr(error, "code", EXIT_MACHINE)
    if isinstance(error, UserError):
        what = str(error)
        advice = f"try a --learning-rate below {args.learning_rate:g}" if code == EXIT_DIVERGED else advice
    elif type(error).__name__ == "OutOfMemoryError":
        what = f"out of GPU memory (batch {args.batch_size})"
        advice = f"try --batch-size {max(1, args.batch_size // 2)}"
    elif "DataLoader worker" in str(error):
        what = "a data worker was killed (out of memory?)"
    if what is None:
        return None
    at = "" if "at step" in what else f" at step {state.step}"
    safe = f"{saved[0].name} is safe" if saved else "no checkpoint yet"
    return UserError(f"{what}{at}; {safe}; {advice}", code)


@contextmanager
def explain_failures(args, state, list_checkpoints: Callable[[Path], list[Path]]) -> Iterator[None]:
    """Put what explain() says in the place of what is raised inside; arguments as there."""
    try:
        yield
    except Exception as error:
        # A data worker that was killed is reported twice, the second time from a signal handler in the middle of this.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        raise explain(error, args, state, list_checkpoints(args.output_dir)) or error from None
