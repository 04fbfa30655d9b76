"""Type a prompt and watch the base and the fine-tuned model continue it side by side, with copied spans marked."""

import contextlib
import io
import itertools
import signal
import sys
import termios
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from utils.data.blocks import decode_cuts
from utils.data.text import make_printable
from utils.errors import UserError
from utils.evaluation.ngrams import NgramIndex
from utils.evaluation.render import MIN_COLUMN
from utils.evaluation.report import NAMES

REFRESH_SECONDS = 0.15
GROWING_TOKENS = 1000  # the marked end of a growing text: more than a screen shows; marking takes quadratic time
COPIED = "bold underline"  # and in brackets, for a terminal without styles


class Interrupt:
    """Ctrl-C: ends the text that is being written; the second time, or without one, raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.is_writing = self.is_stopped = False

    def receive(self, _number: int, _frame: object) -> None:
        """Handle the signal."""
        if self.is_stopped or not self.is_writing:
            raise KeyboardInterrupt
        self.is_stopped = True


def converse(
    names: list[str],
    encode: Callable[[str], list[int]],
    generate: Callable,
    tokenizer,
    index: NgramIndex | None,
    seed: int,
) -> None:
    """Read prompts until they end, or Ctrl-C, and continue each with every model.

    On a terminal the texts grow side by side; elsewhere they are printed one after the other.

    Args:
        names: of the models.
        encode: returns the ids of a prompt; UserError if it cannot be continued.
        generate: writes a text as generate(name, ids, seed, watch), see generation.generate_ids; returns its ids.
        index: n-grams of training to mark; None marks nothing.
        seed: of the first prompt; that of the next is one higher.
    """
    interrupt, console = Interrupt(), Console(highlight=False, markup=False, emoji=False)
    is_screen = all(stream and stream.isatty() for stream in (sys.stdin, sys.stdout)) and not console.is_dumb_terminal
    before = signal.getsignal(signal.SIGINT)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # encode() refuses what is not UTF-8, and the next line is read
    signal.signal(signal.SIGINT, interrupt.receive)
    try:
        say_hello(index)
        for number in itertools.count(seed):
            prompt = read_prompt(is_screen)
            if prompt is None:
                break
            try:
                ids = encode(prompt)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr, flush=True)
                continue
            interrupt.is_writing, interrupt.is_stopped = True, False
            texts = Writing(names, generate, ids, number % 2**32, interrupt)
            show = show_columns if is_screen else show_plain
            show(texts, lambda new: mark_copied(new, index, tokenizer), console, prompt)
            interrupt.is_writing = False
    except KeyboardInterrupt:
        print()
    finally:
        signal.signal(signal.SIGINT, before)


def say_hello(index: NgramIndex | None) -> None:
    """Print how to use it, in lines of 80 columns."""
    print("Type a prompt: both models continue it. Ctrl-C ends a text, or the program.")
    if index:
        print(f"[Brackets] hold {index.length} or more tokens that stand so in the training text.")
    else:
        print("Copied text is not marked: the data that the model was trained on is not here; give --data-dir.")
    print(flush=True)


def read_prompt(is_screen: bool) -> str | None:
    """Read a line; None at the end of the input."""
    if is_screen:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - optional: lets the line be edited
        try:
            return input("prompt> ")
        except EOFError:
            print()
            return None
    line = sys.stdin.readline() if sys.stdin else ""
    return line.rstrip("\r\n") if line else None


class Writing:
    """Texts that several models are writing: the ids so far by model; `write` fills one of them."""

    def __init__(self, names: list[str], generate: Callable, ids: list[int], seed: int, interrupt: Interrupt) -> None:
        self.new: dict[str, list[int]] = {name: [] for name in names}
        self.generate, self.ids, self.seed, self.interrupt = generate, ids, seed, interrupt

    def write(self, name: str) -> None:
        """Write the text of a model, to its end or until Ctrl-C."""

        def watch(new: list[list[int]]) -> bool:
            self.new[name] = new[0]
            return self.interrupt.is_stopped

        self.new[name] = self.generate(name, self.ids, self.seed, watch)[0]


def show_plain(texts: Writing, mark: Callable, _console: Console, prompt: str) -> None:
    """Print the models' texts one after the other."""
    print(f"prompt: {make_printable(prompt)}")
    for name in texts.new:
        texts.write(name)
        print(f"[{NAMES[name]}]\n{mark(texts.new[name]).plain.strip(chr(10))}", flush=True)
    print(flush=True)


def show_columns(texts: Writing, mark: Callable, console: Console, _prompt: str) -> None:
    """Show the last lines of the texts while they grow, and the whole texts at their end."""
    live = Live(console=console, transient=True, auto_refresh=False)
    with without_echo(), ThreadPoolExecutor(len(texts.new)) as pool, live:
        tasks = [pool.submit(texts.write, name) for name in texts.new]
        try:
            while wait(tasks, REFRESH_SECONDS).not_done:
                ends = {name: mark(ids[-GROWING_TOKENS:]) for name, ids in texts.new.items()}
                live.update(arrange(ends, console, True), refresh=True)
        finally:
            texts.interrupt.is_stopped = True  # ends the other threads if one has failed
        for task in tasks:
            task.result()
    console.print(arrange({name: mark(ids) for name, ids in texts.new.items()}, console, False))
    console.print()


@contextlib.contextmanager
def without_echo() -> Iterator[None]:
    """Keep the terminal from showing what is typed, such as ^C, in the middle of the texts."""
    before = termios.tcgetattr(sys.stdin)
    input_flags, output_flags, control_flags, local_flags, *rest = before
    quiet = [input_flags, output_flags, control_flags, local_flags & ~termios.ECHO, *rest]
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def mark_copied(ids: list[int], index: NgramIndex | None, tokenizer) -> Text:
    """Decode ids, with the spans that stand in training in brackets and in another style."""
    marks, text = index.mark(np.array(ids, np.int64)) if index else np.zeros(len(ids), bool), Text()
    cuts = [0, *(np.flatnonzero(np.diff(marks)) + 1).tolist(), len(ids)]
    for start, piece in zip(cuts, map(make_printable, decode_cuts(tokenizer, ids, cuts)), strict=False):
        bare = piece.strip()
        if len(ids) and marks[start] and bare:
            before, after = piece.split(bare)
            text.append(before).append(f"[{bare}]", COPIED).append(after)
        else:
            text.append(piece)
    return text


def arrange(texts: dict[str, Text], console: Console, is_growing: bool) -> Table:
    """Arrange texts side by side, below each other in a narrow terminal; growing ones as the lines that fit."""
    column = (console.width - 3 * (len(texts) - 1)) // len(texts)
    is_narrow = column < MIN_COLUMN
    width, height = (console.width, console.height // len(texts)) if is_narrow else (column, console.height)
    cells = {}
    for name, text in texts.items():
        lines = text.wrap(console, width, overflow="fold")
        shown = lines[-max(1, height - 4) :] if is_growing else lines
        cells[NAMES[name]] = Text("\n").join(shown)
    table = Table(box=None, padding=(0, 3, 0, 0), pad_edge=False, show_header=not is_narrow, header_style="bold")
    if is_narrow:
        table.add_column(width=width)
        for name, cell in cells.items():
            table.add_row(Text(f"{name}:", "bold"))
            table.add_row(cell)
    else:
        for name in cells:
            table.add_column(name, width=width)
        table.add_row(*cells.values())
    return table
