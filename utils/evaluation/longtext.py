"""Write one long text into a file while a model writes it: whole sentences only, however the writing ends."""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from utils.errors import EXIT_MACHINE, UserError, machine_reason
from utils.evaluation.stylometry import SENTENCE_END, split_words
from utils.storage import sync

CLOSING = "\"'\u201d\u2019)]\u300d\u300f\uff09"  # stand after the end of a sentence and belong to it


def check_new_file(path: Path) -> None:
    """Raise UserError if a file cannot be made: there is something already, or no folder for it."""
    if path.is_dir():
        raise UserError(f"--to-file: {path} is a directory, expected the name of a new file")
    if os.path.lexists(path):
        raise UserError(f"--to-file: {path} exists already; give another name or remove it")
    if not path.parent.is_dir():
        raise UserError(f"--to-file: {path.parent}: no such directory")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"--to-file: {path.parent} is not writable")


def find_sentence_end(text: str, is_whole: bool) -> int:
    """Return the position after the last sentence that ends, 0 without one; unless whole, something must follow it."""
    ends = [0]
    for match in SENTENCE_END.finditer(text):
        rest = text[match.end() :]
        end = len(text) - len(rest.lstrip(CLOSING))
        if is_whole or end < len(text):
            ends.append(end)
    return ends[-1]


class SentenceFile:
    """A new file that grows by whole sentences of a text of which more and more token ids are known.

    Args:
        stops: strings before which the text may end; what could be the start of one waits.
    """

    def __init__(self, path: Path, tokenizer, stops: Sequence[str] = ()) -> None:
        self.path, self.tokenizer, self.stops = path, tokenizer, stops
        self.file = open(path, "xb", buffering=0)  # noqa: SIM115 - closed by close()
        self.pending, self.n_chars, self.n_words, self.n_bytes = "", 0, 0, 0
        self.first = self.seen = 0  # tokens; those before `seen` are decoded, from `first` on once more

    def add(self, ids: list[int]) -> None:
        """Write the sentences that have ended."""
        before, text = (self.tokenizer.decode(ids[self.first : end]) for end in (self.seen, None))
        if text.endswith("\ufffd"):  # within a character
            return
        self.pending += text[len(before) :]
        self.first, self.seen = self.seen, len(ids)
        held = max((n for stop in self.stops for n in range(len(stop)) if self.pending.endswith(stop[:n])), default=0)
        self._write(self.pending[: find_sentence_end(self.pending[: len(self.pending) - held], is_whole=False)])

    def finish(self, ids: list[int], is_complete: bool) -> int:
        """Write the rest of the text, cut after its last sentence unless it is complete.

        A text in which no sentence ends is kept whole.

        Returns:
            Number of characters that were left out.
        """
        rest = self.pending = self.tokenizer.decode(ids)[self.n_chars :]
        if not is_complete and (self.n_chars or find_sentence_end(rest, is_whole=True)):
            rest = rest[: find_sentence_end(rest, is_whole=True)]
        self._write(rest)
        return len(self.pending.strip())

    def _write(self, text: str) -> None:
        """Write the beginning of what is pending at once; after a failure the file ends with the sentence before."""
        data = text.encode()
        try:
            while data:
                data = data[self.file.write(data) :]
        except OSError as error:
            os.truncate(self.path, self.n_bytes)
            if not machine_reason(error):
                raise
            kept = f"the {self.n_words:,} words written before are kept"
            raise UserError(f"{self.path}: {machine_reason(error)}; {kept}", EXIT_MACHINE) from None
        self.pending = self.pending[len(text) :]
        self.n_chars, self.n_bytes = self.n_chars + len(text), self.n_bytes + len(text.encode())
        self.n_words += len(split_words(text))

    def close(self) -> None:
        """Sync the file; an empty one is removed."""
        self.file.close()
        if self.n_bytes:
            sync(self.path)
        else:
            self.path.unlink()


def write_text_file(
    path: Path,
    tokenizer,
    generate: Callable,
    n_tokens: int,
    n_words: int | None,
    stops: Sequence[str],
    stopping: object,
) -> str:
    """Let a model write a text into a new file; return a line that says what is there.

    Args:
        generate: writes the text as generate(watch=...), see generation.generate_ids, and returns its ids.
        n_tokens: at which generate ends; the text then ends with its last sentence.
        n_words: after which the text ends with the next sentence, if given.
        stopping: true once the writing shall stop.
    """
    started, file = time.monotonic(), SentenceFile(path, tokenizer, stops)
    total, unit = (n_words, "word") if n_words else (n_tokens, "token")
    try:
        with tqdm(total=total, unit=unit, desc="writing", mininterval=0.5) as bar:

            def watch(new: list[list[int]]) -> bool:
                file.add(new[0])
                bar.update((min(file.n_words, n_words) if n_words else len(new[0])) - bar.n)
                return bool(stopping) or bool(n_words and file.n_words >= n_words)

            ids = generate(watch=watch)[0]
            is_cut = bool(stopping) or len(ids) == n_tokens
            n_left_out = 0
            if not n_words or file.n_words < n_words:
                n_left_out = file.finish(ids, is_complete=not is_cut)
    finally:
        file.close()
    if not file.n_bytes:
        return f"{'stopped; ' if stopping else ''}no text was written, {path} was not made"
    seconds = time.monotonic() - started
    line = f"{'stopped; ' if stopping else ''}{path}: {file.n_words:,} words, {len(ids):,} tokens in {seconds:.0f} s"
    return line + (f"; the unfinished sentence after them, {n_left_out} characters, was left out" if n_left_out else "")
