"""Books in a row: measure them, and read their segments. A file above WHOLE_BYTES is never in memory as a whole.

It is read in slices, which end just before white space that follows a non-space, where pieces end as well
(utils/data/tokenizer.py). The slices do not depend on the number of processes.
"""

import codecs
import functools
import hashlib
import io
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from operator import call
from pathlib import Path

from utils.data import doctor
from utils.data.formats import READERS
from utils.data.text import (
    CUT_PATTERNS,
    Book,
    Segment,
    check_characters,
    check_first_bytes,
    choose_chapters,
    choose_validation_spans,
    count_words,
    explain_decoding,
    load_text,
    read_book,
    short_name,
    split_book,
)
from utils.data.tokenizer import PIECE_CUT
from utils.data.workers import open_workers
from utils.errors import UserError

WHOLE_BYTES = 1 << 26  # of a file that is held in memory
SLICE_BYTES = 1 << 21
LONGEST_SLICE = 1 << 26  # characters without a place to cut
MARGIN = 1 << 16  # characters on either side of a segment's wanted end, in which the end is looked for
EXAMINED = 32  # slices, spread evenly, or up to twice as many, that are examined for faults


def is_large(path: Path) -> bool:
    """Return whether a file is read in slices; files that are converted never are."""
    return path.suffix.lower() not in READERS and os.path.isfile(path) and os.path.getsize(path) > WHOLE_BYTES


def measure_books(
    paths: Sequence[Path], validation: Sequence[Path], encoding: str, faults: Sequence[str] | None, n_workers: int
) -> Iterator[tuple[Book, list[doctor.Finding]]]:
    """Measure and examine every file; of a large one, some slices are examined. UserError for what is no text."""
    digests = {path: hashlib.sha256() for path in paths}
    with open_workers(call, n_workers) as run:
        results = (result for _, result in run(_list_tasks(paths, validation, encoding, faults, digests)))
        for path, parts in itertools.groupby(results, key=lambda result: result[0].path):
            books, found = zip(*parts, strict=True)
            if is_large(path):
                sums = (sum(getattr(book, name) for book in books) for name in ("n_chars", "n_bytes", "n_words"))
                books = [Book(path, digests[path].hexdigest(), *sums, path in validation)]
            yield books[0], _join_findings(itertools.chain(*found))


def _list_tasks(paths, validation, encoding, faults, digests) -> Iterator[functools.partial]:
    for path in paths:
        if not is_large(path):
            yield functools.partial(_measure_book, path, encoding, path in validation, faults)
            continue
        if faults:
            raise UserError(f"{short_name(path)} has {os.path.getsize(path):,} bytes; --clean mends files up to "
                            f"{WHOLE_BYTES:,}, which fit into memory; cut it into several files")  # fmt: skip
        every = max(1, os.path.getsize(path) // (SLICE_BYTES * EXAMINED))
        for i, text in enumerate(read_slices(path, encoding, digests[path])):
            yield functools.partial(_measure_slice, path, text, i % every == 0)


def _measure_book(path: Path, encoding: str, validation: bool, faults: Sequence[str] | None) -> tuple:
    text, book = read_book(path, encoding, validation, faults)
    return book, doctor.examine(text)


def _measure_slice(path: Path, text: str, is_examined: bool) -> tuple:
    return Book(path, "", len(text), len(text.encode()), count_words(text)), doctor.examine(text) if is_examined else []


def _join_findings(findings: Iterator[doctor.Finding]) -> list[doctor.Finding]:
    joined = {}
    for finding in findings:
        before = joined.get(finding.name, doctor.Finding(finding.name, 0, finding.example))
        joined[finding.name] = doctor.Finding(finding.name, before.count + finding.count, before.example)
    return [joined[name] for name in doctor.FAULTS if name in joined]


def read_slices(path: Path, encoding: str, digest) -> Iterator[str]:
    """Yield the text of a large file in slices, as read_book returns it; update a hashlib object by its bytes."""
    name, decoder = short_name(path), codecs.getincrementaldecoder(encoding)()
    newlines, held, n_read, n_lines = io.IncrementalNewlineDecoder(decoder, translate=True), "", 0, 0
    with open(path, "rb") as file:
        before = os.fstat(file.fileno())
        while True:
            raw = file.read(SLICE_BYTES)
            if not n_read:
                check_first_bytes(raw, encoding, name)
            digest.update(raw)
            try:
                text = newlines.decode(raw, final=not raw)
            except UnicodeError as error:
                offset = n_read + len(raw) - len(getattr(error, "object", raw))
                raise UserError(f"{name} is not {explain_decoding(error, encoding, offset, n_lines)}") from None
            check_characters(text, raw, encoding, name, n_read)
            held += text if n_read else text.removeprefix("\ufeff")
            n_read, n_lines = n_read + len(raw), n_lines + raw.count(b"\n")
            cut = _last_cut(held) if raw else len(held)
            if cut:
                yield held[:cut]
                held = held[cut:]
            if len(held) > LONGEST_SLICE:
                raise UserError(f"{name} has no end of a word in {len(held):,} characters; expected text with spaces")
            if not raw:
                break
        after = os.fstat(file.fileno())
    if (before.st_mtime_ns, before.st_size) != (after.st_mtime_ns, n_read):
        raise UserError(f"{name} changed while it was read; try again")


def _last_cut(text: str) -> int:
    """Return the last position at which a piece may end, 0 if there is none."""
    for start in (max(1, len(text) - 4096), 1):
        cuts = [match.start() for match in PIECE_CUT.finditer(text, start)]
        if cuts:
            return cuts[-1]
    return 0


def read_segments(
    books: list[Book], encoding: str, val_split: float, seed: int, faults: Sequence[str] | None = None
) -> Iterator[Segment]:
    """Yield the segments of all books in order, those of a large file in parts of a slice, so that memory is bounded.

    Books marked for validation are kept whole, and then all others are for training.
    """
    spans, offset = [], 0
    if not any(book.validation for book in books):
        n_chars = sum(book.n_chars for book in books)
        spans = choose_chapters(books, val_split, seed) or choose_validation_spans(n_chars, val_split, seed)
    for index, book in enumerate(books):
        chosen = [(offset, offset + book.n_chars)] if book.validation else spans
        if is_large(book.path):
            digest = hashlib.sha256()
            yield from split_slices(read_slices(book.path, encoding, digest), index, offset, book.n_chars, chosen)
            sha256 = digest.hexdigest()
        else:
            text, sha256, *_ = load_text(book.path, encoding, faults)
            if sha256 == book.sha256:
                yield from split_book(text, index, offset, chosen, book.chapters)
        if sha256 != book.sha256:
            raise UserError(f"{book.path} changed while it was read; try again")
        offset += book.n_chars


def split_slices(
    slices: Iterator[str], book_index: int, offset: int, n_chars: int, spans: list[tuple[int, int]]
) -> Iterator[Segment]:
    """Yield the segments of a large book as split_book does, in parts; each ends near its wanted end.

    An end is looked for within MARGIN characters: at a paragraph end, or where there is none, at a line end and so on.
    """
    inside = [(max(0, a - offset), min(b - offset, n_chars)) for a, b in spans if a < offset + n_chars and b > offset]
    ends, split, start, text, continues = list(itertools.chain(*inside)), "train", 0, "", False

    def take(size: int) -> Iterator[Segment]:
        nonlocal start, text, continues
        if size:
            yield Segment(split, book_index, start, start + size, text[:size], continues)
            start, text, continues = start + size, text[size:], True

    for part in slices:
        text += part
        is_end = start + len(text) == n_chars
        while ends and (ends[0] + MARGIN <= start + len(text) or is_end):
            yield from take(_nearest_cut(text, ends.pop(0) - start, is_end))
            split, continues = "train" if split == "validation" else "validation", False
        if not ends or start + len(text) <= ends[0] - MARGIN:
            yield from take(len(text))


def _nearest_cut(text: str, wanted: int, is_end: bool) -> int:
    """Return the place nearest to character `wanted` where a segment may end."""
    low, high = max(0, wanted - MARGIN), min(len(text), max(0, wanted) + MARGIN)
    window, edges = text[low:high], [0] * (low == 0) + [len(text)] * (is_end and high == len(text))
    for pattern in CUT_PATTERNS:
        # What ends with the window may go on behind it.
        cuts = edges + [low + match.end() for match in re.finditer(pattern, window) if low + match.end() < high]
        if len(cuts) > len(edges):
            break
    return min(cuts, key=lambda cut: abs(cut - wanted))
