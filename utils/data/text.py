"""Read a book, and choose the segments of it that are kept aside for validation.

Owns characters. Tokens begin in utils/data/blocks.py.
"""

import bisect
import errno
import hashlib
import math
import os
import random
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError

# First bytes of files that are often taken for text.
SIGNATURES = [
    (b"\x1f\x8b", "is a gzip file; unpack it first"),
    (b"PK\x03\x04", "is a zip file (docx or epub?); save it as plain text"),
    (b"%PDF", "is a PDF; save it as plain text"),
    (b"\xff\xfe\x00\x00", "looks like UTF-32; convert it: iconv -f UTF-32 -t UTF-8"),
    (b"\x00\x00\xfe\xff", "looks like UTF-32; convert it: iconv -f UTF-32 -t UTF-8"),
    (b"\xff\xfe", "looks like UTF-16; convert it: iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "looks like UTF-16; convert it: iconv -f UTF-16 -t UTF-8"),
]
# Where a segment may begin: after a blank line; if a book has too few, after a line, a sentence, a word.
CUT_PATTERNS = [r"\n(?:[ \t]*\n)+", r"\n+", r"[.!?]['\")\]]*\s+", r"\s+", r""]


@dataclass(frozen=True)
class Book:
    """One document: where it is and what it measures after line ends became LF."""

    path: Path
    sha256: str
    n_chars: int
    n_bytes: int
    n_words: int


@dataclass(frozen=True)
class Segment:
    """Characters start to end of a book, in the split 'train' or 'validation'."""

    split: str
    book_index: int
    start: int
    end: int
    ends_book: bool
    text: str


def find_books(paths: list[Path]) -> list[Path]:
    """Expand folders into their .txt and .md files, sorted; files stay in the order given."""
    found = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in (".txt", ".md") and not p.is_dir())
            if not inside:
                raise UserError(f"{path}: is a directory without .txt or .md files, expected a text file")
            found += inside
        else:
            found.append(path)
    # realpath, not Path.resolve: the latter raises on a loop of links, which read_book explains.
    unique = {os.path.realpath(path): path for path in reversed(found)}
    return [path for path in found if unique[os.path.realpath(path)] is path]


def read_book(path: Path, encoding: str = "utf-8") -> tuple[str, Book]:
    """Read a text file, drop a byte-order mark, and make every line end LF. Nothing else changes.

    Raises:
        UserError: the file cannot be read, is not text, or is empty; the message says which.
    """
    name = _short(path)
    raw = _read_bytes(path, name)
    if encoding.lower().replace("_", "-") in ("utf-8", "utf8"):
        _refuse_other_formats(raw, name)
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(_explain_decoding(raw, name, error, encoding)) from None
    if "\0" in text:
        raise UserError(f"{name} has a zero byte at offset {raw.find(0)}; it is not plain text")
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise UserError(f"{name} has no text, only white space" if raw else f"{name} is empty")
    digest = hashlib.sha256(raw).hexdigest()
    return text, Book(path, digest, len(text), len(text.encode()), len(text.split()))


def _short(path: Path) -> str:
    name = str(path)
    return name if len(name) <= 120 else f"{name[:60]}..."


def _read_bytes(path: Path, name: str) -> bytes:
    reasons = {
        errno.ENOENT: "no such file",
        errno.ENOTDIR: "no such file",
        errno.EACCES: "permission denied",
        errno.ELOOP: "too many levels of symbolic links",
        errno.ENAMETOOLONG: "file name too long",
    }
    try:
        before = os.stat(path)
        if stat.S_ISDIR(before.st_mode):
            raise UserError(f"{name}: is a directory, expected a text file")
        if not stat.S_ISREG(before.st_mode):
            raise UserError(f"{name}: not a regular file")
        raw = path.read_bytes()
        after = os.stat(path)
    except OSError as error:
        if error.errno not in reasons:
            raise
        raise UserError(f"{name}: {reasons[error.errno]}") from None
    except ValueError:
        raise UserError(f"{name!r}: not a file name") from None
    if (before.st_mtime_ns, before.st_size) != (after.st_mtime_ns, len(raw)):
        raise UserError(f"{name} changed while it was read; try again")
    return raw


def _refuse_other_formats(raw: bytes, name: str) -> None:
    for signature, verdict in SIGNATURES:
        if raw.startswith(signature):
            raise UserError(f"{name} {verdict}")
    zeros = raw.count(0)
    if raw and zeros == len(raw):
        raise UserError(f"{name} has only zero bytes; the file is damaged")
    order = "LE" if raw[:1] != b"\0" else "BE"
    if len(raw) >= 8 and zeros > 0.7 * len(raw):
        raise UserError(f"{name} looks like UTF-32 without a mark; convert it: iconv -f UTF-32{order} -t UTF-8")
    if len(raw) >= 4 and zeros > 0.4 * len(raw):
        raise UserError(
            f"{name} looks like UTF-16 without a mark (half of its bytes are zero); "
            f"convert it: iconv -f UTF-16{order} -t UTF-8"
        )


def _explain_decoding(raw: bytes, name: str, error: UnicodeDecodeError, encoding: str) -> str:
    offset = error.start
    control = sum(byte < 9 or 13 < byte < 32 for byte in raw[:4096])
    if control > 0.01 * len(raw[:4096]):
        return f"{name} is not text: byte {raw[offset]:#04x} at offset {offset}"
    if encoding.lower() not in ("utf-8", "utf8", "utf_8"):
        return f"{name} is not {encoding}: byte {raw[offset]:#04x} at offset {offset}"
    if error.reason == "unexpected end of data":
        return f"{name} is not UTF-8: unfinished character at its end (offset {offset})"
    line = raw.count(b"\n", 0, offset) + 1
    return (
        f"{name} is not UTF-8: byte {raw[offset]:#04x} at offset {offset} (line {line}); "
        "convert it or give --encoding latin-1"
    )


def choose_validation_spans(n_chars: int, val_split: float, seed: int) -> list[tuple[int, int]]:
    """Choose where validation segments should lie, before any text is seen.

    The text is divided into equal parts and one segment is taken from each at a random place, so
    that together they stand for the whole book and not for its last chapter. Their number grows
    with the square root of their size: more places, and longer segments.

    Args:
        n_chars: characters of all books together.
        val_split: share to keep aside, 0 up to below 1.
        seed: chooses the places.
    Returns:
        (start, end) intervals in characters over all books, in order, without overlap.
    """
    size = val_split * n_chars
    if size == 0:
        return []
    count = max(3, round(math.sqrt(size) / 20))
    count += count == 4  # four places could all miss the middle third of the book
    part, length = n_chars / count, size / count
    rng = random.Random(seed)
    starts = [part * i + rng.random() * (part - length) for i in range(count)]
    return [(int(start), int(start + length)) for start in starts]


def find_cuts(text: str, needed: int) -> list[int]:
    """List the offsets where a segment may begin or end, always with 0 and the text's length.

    Args:
        text: the whole book.
        needed: how many cuts are wished; coarser kinds (paragraphs) are preferred to finer ones.
    """
    cuts: list[int] = []
    for pattern in CUT_PATTERNS:
        cuts = sorted({0, len(text), *(match.end() for match in re.finditer(pattern, text))})
        if len(cuts) >= needed:
            break
    return cuts


def split_book(text: str, book_index: int, offset: int, intervals: list[tuple[int, int]]) -> Iterator[Segment]:
    """Cut a book into segments that alternate between training and validation.

    Args:
        text: the whole book.
        book_index: its number, kept in the segments.
        offset: where it begins, in characters over all books.
        intervals: what choose_validation_spans gave.
    Yields:
        Passages that together are the text, each character once.
    """
    mine = [(a - offset, b - offset) for a, b in intervals if a < offset + len(text) and b > offset]
    # 40 cuts a segment keep the snapped size within a few percent of the one asked for.
    cuts = find_cuts(text, 40 * len(mine)) if mine else []
    position, pieces = 0, []
    for wanted_start, wanted_end in mine:
        start = _nearest(cuts, max(wanted_start, position))
        end = _nearest(cuts, min(wanted_end, len(text)))
        if end > start:
            pieces += [("train", position, start), ("validation", start, end)]
            position = end
    pieces.append(("train", position, len(text)))
    for split, start, end in pieces:
        if end > start:
            yield Segment(split, book_index, start, end, end == len(text), text[start:end])


def _nearest(cuts: list[int], place: int) -> int:
    right = bisect.bisect_left(cuts, place)
    around = cuts[max(0, right - 1) : right + 1]
    return min(around, key=lambda cut: abs(cut - place))
