"""Prompts from a pipe and from a terminal."""

import io
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from contextlib import suppress
from fcntl import ioctl
from pathlib import Path

import numpy as np
import pytest
from conftest import make_book, make_sentencepiece_tokenizer
from rich.console import Console
from rich.text import Text

from utils.data.tokenizer import load_tokenizer
from utils.evaluation.generation import encode_prompt
from utils.evaluation.interactive import arrange, converse, mark_copied, without_echo
from utils.evaluation.ngrams import NgramIndex, mark_overlap

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model)


def test_copied_spans_are_in_brackets(tokenizer):
    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    book, text = encode("Ada went to the mill and mended a net."), "Ada went to the mill and\x1b[2J mended a net"
    ids, index = encode(text), NgramIndex(np.array(book), 3)
    marked = mark_copied(ids, index, tokenizer)
    assert marked.plain == "[Ada went to the mill and]\ufffd[2J [mended a net]"
    assert [marked.plain[span.start : span.end] for span in marked.spans] == [
        "[Ada went to the mill and]",
        "[mended a net]",
    ]
    assert mark_copied(ids, None, tokenizer).plain == text.replace("\x1b", "\ufffd")


def test_marking_changes_no_space_of_a_sentencepiece_text():
    text = "Yesterday Ada went to the mill and mended a net. Hal slept there."
    tokenizer = make_sentencepiece_tokenizer(make_book() + text)
    book, ids = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text[10:48], text))
    marked = mark_copied(ids, NgramIndex(np.array(book), 3), tokenizer).plain
    assert marked == "Yesterday [Ada went to the mill and mended a net.] Hal slept there."


def test_a_line_that_is_not_utf8_is_named_and_the_next_is_read(tokenizer, monkeypatch, capsys):
    raw, prompts = io.BytesIO(b"Ada\ncaf\xe9\nBram\n"), []

    def generate(name, ids, seed, watch):
        prompts.append(tokenizer.decode(ids))
        return [[]]

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(raw, encoding="utf-8"))
    converse(["finetuned"], lambda text: encode_prompt(tokenizer, text), generate, tokenizer, None, 7)
    assert prompts == ["Ada", "Bram"]
    assert "error: prompt is not valid UTF-8" in capsys.readouterr().err


def test_an_index_marks_as_a_scan_does():
    rng = np.random.default_rng(1)
    train = rng.integers(0, 5, 300)
    for size in (0, 3, 4, 200):
        text = np.concatenate([rng.integers(0, 5, size), train[-4:]])
        assert (NgramIndex(train, 4).mark(text) == mark_overlap([text], train, 4)[0]).all()
    assert not NgramIndex(train[:3], 4).mark(train).any()
    assert NgramIndex(train, 4).following(np.array([9, 9, 9, 9])).size == 0


@pytest.mark.parametrize("width", [80, 50, 30])
def test_texts_fit_the_terminal(width):
    """Side by side in 80 columns, below each other in 50; while they grow, their ends fit the screen."""
    console = Console(file=io.StringIO(), width=width, height=12, force_terminal=False)
    texts = {
        name: Text("\n".join(f"{name} writes line {n} of its text" for n in range(40)))
        for name in ("base", "finetuned")
    }
    console.print(arrange(texts, console, True))
    lines = console.file.getvalue().splitlines()
    assert len(lines) <= 12
    assert max(map(len, lines)) <= width
    assert sum("line 39" in line for line in lines) == (1 if width == 80 else 2)
    assert "line 0 " not in console.file.getvalue()
    console.print(arrange(texts, console, False))
    assert console.file.getvalue().count("line 0 ") == 2


def test_prompts_from_a_pipe(tokenizer, monkeypatch, capsys):
    """Each is continued by both models with one seed; one that is refused is named, and the next is read."""
    calls = []

    def generate(name, ids, seed, watch):
        calls.append((name, tokenizer.decode(ids), seed))
        new = tokenizer(f" wrote {name}", add_special_tokens=False)["input_ids"]
        assert not watch([new[:1]])
        return [new]

    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"] or [0]

    monkeypatch.setattr(sys, "stdin", io.StringIO("Ada went\n\nBram"))
    handler = signal.getsignal(signal.SIGINT)
    converse(["base", "finetuned"], encode, generate, tokenizer, None, 7)
    assert signal.getsignal(signal.SIGINT) is handler
    prompts = [("Ada went", 7), ("<|endoftext|>", 8), ("Bram", 9)]
    assert calls == [(name, text, seed) for text, seed in prompts for name in ("base", "finetuned")]
    out = capsys.readouterr().out
    assert "prompt: Ada went\n[base model]\n wrote base\n[fine-tuned model]\n wrote finetuned\n" in out
    assert "not marked: the data that the model was trained on is not here" in out


def test_what_is_typed_is_not_shown_while_a_text_is_written(monkeypatch):
    _, terminal = pty.openpty()
    with open(terminal) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        before = termios.tcgetattr(stdin)
        with without_echo():
            assert before[3] & ~termios.tcgetattr(stdin)[3] == termios.ECHO
        assert termios.tcgetattr(stdin) == before


class Terminal:
    """A program in a pseudo-terminal of 80 columns."""

    def __init__(self, *command):
        self.seen = ""
        self.pid, self.descriptor = pty.fork()
        if not self.pid:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.environ.update(TERM="xterm", OMP_NUM_THREADS="1")
            os.environ.pop("COLUMNS", None)
            os.execv(command[0], command)
        ioctl(self.descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))

    def wait_for(self, text, seconds=120):
        """Read until a text appears after what was waited for last; return what came before it."""
        until, start = time.monotonic() + seconds, len(self.seen)
        while text not in self.seen[start:] and time.monotonic() < until:
            if select.select([self.descriptor], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.descriptor, 1 << 16).decode(errors="replace")
                except OSError:  # the program has ended
                    break
        assert not text or text in self.seen[start:], self.seen
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.seen[start:]).replace("\r", "")

    def type(self, text):
        os.write(self.descriptor, text.encode())

    def end(self, seconds=60):
        """Press Ctrl-C until the program ends, and return its exit status.

        Python loses a signal between showing a prompt and waiting for a line; who types so fast has to press again.
        """
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with suppress(OSError):  # the program has ended
                self.type("\x03")
                while select.select([self.descriptor], [], [], 1)[0]:  # what is left unread would keep it from ending
                    os.read(self.descriptor, 1 << 16)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
        os.kill(self.pid, signal.SIGKILL)
        raise AssertionError(f"Ctrl-C did not end the program within {seconds} s: {self.seen}")


def test_a_terminal_of_80_columns(large):
    """Two texts side by side; one Ctrl-C ends a text, one at the prompt the program."""
    terminal = Terminal(sys.executable, str(ROOT / "generate_text.py"), "--interactive", "--max-new-tokens", "20000",
                        "--finetuned-model", str(large / "model"), "--data-dir", str(large / "blocks"))  # fmt: skip
    assert "[Brackets] hold 8 or more tokens" in terminal.wait_for("prompt> ")
    terminal.type("Day 12. Hal went to\n")
    assert re.search(r"base model +fine-tuned model", terminal.wait_for("fine-tuned model"))
    terminal.wait_for("[")
    terminal.type("\x03")
    shown = terminal.wait_for("prompt> ")
    last = shown[shown.rindex("base model") :].splitlines()
    assert max(map(len, last)) <= 80
    assert "^C" not in shown
    assert any(len(line) > 45 for line in last), "two columns"
    assert terminal.end() == 0
