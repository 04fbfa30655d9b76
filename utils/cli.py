"""The command line: parser, signals, settings table, run(). Types of flags are in argument_types.

Owns how a script speaks to the person who started it. Knows nothing of books or models, and imports
nothing heavy, so that a mistyped flag is answered before torch is loaded.
"""

import argparse
import difflib
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from utils.errors import EXIT_INPUT, EXIT_MACHINE, GPU_FULL, OUT_OF_MEMORY, UserError, machine_reason

if sys.platform == "win32":  # it lacks SIGHUP below, POSIX locks and the syncing of folders
    print("error: Windows is not supported; expected Linux or macOS, use WSL (wsl --install)", file=sys.stderr)
    sys.exit(EXIT_INPUT)

MAX_ERROR_CHARS = 240
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_raised: list[int] = []  # signals that were raised as Stopped


class Stopped(BaseException):
    """A signal that asks the program to end, by its number."""


def catch_signals(receive: Callable[[int, Any], None]) -> None:
    """Handle the signals that ask for an end with receive(number, frame), except those already ignored (nohup)."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, receive)


def leave(number: int, frame: Any) -> None:
    """Raise the signal as Stopped, wherever the program is; a second signal quits at once.

    A library that is interrupted may fail on its way out, or swallow this and fail later. So it is noted too: whatever
    error comes after it, the signal has ended the program.
    """
    if not _raised:
        _raised.append(number)
        raise Stopped(number)
    if "RANK" not in os.environ:  # under torchrun, each signal of a terminal arrives twice
        quit_at_once(number, frame)


def quit_at_once(number: int, _frame: Any) -> NoReturn:
    """End the program without cleaning up: the next run removes what is left."""
    _say_stopped()
    os._exit(128 + number)


class StopSignal:
    """Set a flag on SIGINT, SIGTERM or SIGHUP that the loop checks; a second signal exits at once.

    Under torchrun it does not: each signal of a terminal arrives twice, and torchrun kills after 30 s anyway.
    """

    def __init__(self) -> None:
        self.number, self.is_alone = 0, "RANK" not in os.environ
        catch_signals(self.receive)

    def receive(self, number: int, frame: Any) -> None:
        if self.number and self.is_alone:
            leave(number, frame)
        self.number = number

    def __bool__(self) -> bool:
        return self.number > 0


def ignore_signals(_worker: int) -> None:
    """Ignore signals in a data worker: the main process still needs the batches of the current step."""
    catch_signals(signal.SIG_IGN)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help text that ends each entry with its default, unless that is None or named in the text."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=100)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return "DIR" if isinstance(action.default, Path) else "N" if "number" in str(action.type) else "VALUE"

    def _get_help_string(self, action: argparse.Action) -> str:
        named = action.default is None or "default" in action.help
        return action.help if named else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with whole flag names only, underscores allowed, and mistakes raised as UserError."""

    def __init__(self, description: str, epilog: str | None = None) -> None:
        super().__init__(description=description, epilog=epilog, allow_abbrev=False, formatter_class=HelpFormatter)

    def parse_args(self, argv: list[str] | None = None) -> argparse.Namespace:
        """Parse a command line; UserError for an unknown flag or a value out of its range."""
        argv = [self._with_hyphens(word) for word in (sys.argv[1:] if argv is None else argv)]
        args, unknown = self.parse_known_args(argv)
        if unknown:
            name = unknown[0].split("=")[0]
            near = difflib.get_close_matches(name, self._option_string_actions, n=1)
            hint = f" (did you mean {near[0]}?)" if near else "; --help lists them all"
            kind = "option" if name.startswith("-") else "argument"
            raise UserError(f"unknown {kind} {name}{hint}")
        return args

    def _with_hyphens(self, word: str) -> str:
        """Accept --block_size for --block-size: people come from Hugging Face's scripts."""
        name, equals, value = word.partition("=")
        hyphened = name.replace("_", "-")
        return hyphened + equals + value if hyphened in self._option_string_actions else word

    def error(self, message: str) -> NoReturn:
        """Raise argparse's complaint as a UserError that begins with the flag."""
        found = re.match(r"argument ([^:\s]+): (.*)", message, re.DOTALL)
        if found:
            flag, text = found.group(1).split("/")[0], found.group(2)
            message = f"{flag} {text}" if text.startswith("must ") else f"{flag}: {text}"
        raise UserError(message)


def check_processes(batch_size: int) -> None:
    """Refuse a part of torchrun's environment, and more processes than a batch has blocks."""
    given = "RANK" if "RANK" in os.environ else "WORLD_SIZE" if os.environ.get("WORLD_SIZE", "1") != "1" else None
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        value = os.environ.get(name, "0")
        if given and name not in os.environ:
            raise UserError(f"{given} is set, {name} is not set; start several processes with torchrun")
        if (given or name == "LOCAL_WORLD_SIZE") and name != "MASTER_ADDR" and not value.isdecimal():
            raise UserError(f"{name} is {value!r}, expected a number; start several processes with torchrun")
    n_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if batch_size < n_processes:
        raise UserError(
            f"--batch-size {batch_size} is less than the {n_processes} processes; use a larger one, or fewer"
        )


def print_table(title: str, rows: Iterable[tuple[str, Any]]) -> None:
    """Print aligned name/value rows under a title; a None value leaves its row out."""
    rows = [(name, value) for name, value in rows if value is not None]
    width = max(len(name) for name, _ in rows)
    print(title)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")
    print(flush=True)


def parse_first(parse_args: Callable[[], argparse.Namespace]) -> argparse.Namespace:
    """Parse the command line of a script that has not yet imported anything heavy.

    A mistake or --help ends the program here. From here to run(), while modules are imported, a signal ends it at
    once: nothing has been opened yet. Sets what libraries read from the environment when they are imported.
    """
    if os.environ.get("RANK", "0") != "0":
        os.environ["TQDM_DISABLE"] = "1"  # of several processes, the first shows progress
    if "OMP_WAIT_POLICY" not in os.environ:
        # For libgomp, which PyTorch loads: a thread that waits for the others gives up its core after 3,000 turns, not
        # 300,000. Beside a busy program, the last thread needs that core; python -m benchmarks.busy measures it.
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    parsed = []
    code = _guard(lambda: parsed.append(parse_args()), quit_at_once)
    if not parsed:
        sys.exit(code)
    return parsed[0]


def run(main: Callable[..., int | None], *arguments: Any, may_speak: Callable[[], bool] | None = None) -> NoReturn:
    """Call a script's main function and leave with its exit status.

    A UserError, a signal, the machine's own failures and a file that the system refuses become one
    line on stderr; anything else is a defect of this program and keeps its traceback. `may_speak` says whether it is
    for this process to print that line, where torchrun started several.
    """
    sys.exit(_guard(lambda: main(*arguments), signal.SIG_IGN, may_speak))


def _guard(action: Callable[[], int | None], afterwards: Any, may_speak: Callable[[], bool] | None = None) -> int:
    """Return the exit status of an action; signals that come later are handled by `afterwards`."""
    may_speak = may_speak or (lambda: os.environ.get("RANK", "0") == "0")
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None where it was closed
        stream.reconfigure(errors="replace")  # a terminal without UTF-8 is no reason to stop
    _raised.clear()
    try:
        catch_signals(leave)
        try:
            code = _finish(action)
        except Exception as error:
            if _raised:
                raise Stopped(_raised[0]) from error
            code = _explain(error, may_speak)
        catch_signals(afterwards)  # in here: until it is done, a signal is raised
    except Stopped as stopped:
        catch_signals(afterwards)
        if may_speak():
            _say_stopped()
        code = 128 + stopped.args[0]
    return code


def _finish(action: Callable[[], int | None]) -> int:
    try:
        code = action() or 0
    except SystemExit as left:  # --help
        code = left.code
    if sys.stdout:
        sys.stdout.flush()
    return code


def _explain(error: Exception, may_speak: Callable[[], bool]) -> int:
    """Say in one line what went wrong, and return the exit status; raise what is a defect of this program."""
    if isinstance(error, UserError):
        return _report(str(error), error.code, may_speak)
    if isinstance(error, BrokenPipeError):
        # The reader (| head) has left; without this, Python complains once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    reason, name = machine_reason(error), str(getattr(error, "filename", None) or "")
    if not reason and not (name and isinstance(error, OSError) and error.errno):
        raise error
    if reason == OUT_OF_MEMORY:
        return _report(reason + " of the GPU" * (type(error).__name__ == GPU_FULL), EXIT_MACHINE, may_speak)
    where = f"{name[:60]}..." if len(name) > 120 else name or "cannot write output"
    said = f"{where}: {reason or os.strerror(error.errno).lower()}"
    code = _report(said, EXIT_MACHINE if reason else EXIT_INPUT, may_speak)
    if reason:
        os._exit(code)  # flushing a full stdout again at exit would print a second message
    return code


def _say_stopped() -> None:
    print("stopped; finished work is saved", file=sys.stderr, flush=True)


def _report(message: str, code: int, may_speak: Callable[[], bool]) -> int:
    line = " ".join(f"error: {message}".split())
    if len(line) > MAX_ERROR_CHARS:
        line = line[: MAX_ERROR_CHARS - 3] + "..."
    if may_speak():
        print(line, file=sys.stderr, flush=True)
    return code
