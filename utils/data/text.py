"""Read books and split them into segments for training and validation."""

import bisect
import codecs
import hashlib
import itertools
import math
import os
import random
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unicodedata import category

import regex

from utils.data.doctor import clean
from utils.data.formats import ARCHIVES, READERS, convert_book, take_chapters
from utils.errors import UserError, machine_reason

# First bytes of files that are often mistaken for text.
SIGNATURES = [
    (b"\x1f\x8b", "is a gzip file; unpack it first"),
    (b"PK\x03\x04", "is a zip file (docx or epub?); save it as plain text"),
    (b"%PDF", "is a PDF; save it as plain text"),
    (b"\xd0\xcf\x11\xe0", "is an old Word file, or has a password; save it as .docx without one"),
    ((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), "looks like UTF-32; convert it: iconv -f UTF-32 -t UTF-8"),
    ((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), "looks like UTF-16; convert it: iconv -f UTF-16 -t UTF-8"),
]
# Scripts without spaces between words: each letter with its marks counts as a word.
SCRIPTS = ("Han", "Hiragana", "Katakana", "Thai", "Lao", "Khmer", "Myanmar")
UNSPACED = "[" + "".join(rf"\p{{Script={name}}}" for name in SCRIPTS) + r"\u30fc]"  # the long vowel of both kana
SHOWN = "\t\n\u200b\u200c\u200d"  # besides what isprintable() knows
MARKS = r"[\p{M}\u200c\u200d]*"  # the joiners of Persian and Hindi stand within words
# All of these letters and some others, found five times as fast.
MAY_BE_UNSPACED = re.compile("[\u0e00-\u19ff\u2e80-\ufaff\uff00-\uffdf\U00010000-\U0010ffff]")
LETTER = regex.compile(rf"[\p{{L}}&&{UNSPACED}]{MARKS}", regex.VERSION1)
# Full stops, question and exclamation marks: of Hindi, Arabic, Armenian, Ethiopic, Tibetan, Khmer and Burmese; and of
# Chinese and Japanese, after which no white space follows, with the quotation marks that close there.
STOPS = "\u0964\u0965\u061f\u06d4\u0589\u1362\u1367\u0f0d\u17d4\u104b"
WIDE_STOP = "[\u3002\uff01\uff1f\uff61]+['\"\u201d\u2019\u300d\u300f\uff09]*"
# Where a segment may start: after a blank line; if a book has too few, after a line, a sentence, a word.
CUT_PATTERNS = [r"\n(?:[ \t]*\n)+", r"\n+", rf"[.!?{STOPS}]['\")\]]*\s+|{WIDE_STOP}\s*", r"\s+", r""]
MIN_CHAPTERS = 3  # for validation, if they are to be whole
CHOICES, MAX_MISS = 1000, 0.25  # selections of chapters that are tried; of the share that the best may miss


@dataclass(frozen=True)
class Book:
    """A text file and its size, measured after line ends became LF and `cleaned` faults were mended (name: count).

    `validation`: no part of it is for training.
    """

    path: Path
    sha256: str
    n_chars: int
    n_bytes: int
    n_words: int
    validation: bool = False
    chapters: tuple[int, ...] = ()  # characters at which they start, 0 first; () for a book without
    cleaned: dict[str, int] = field(default_factory=dict)  # how often each fault was mended

    @property
    def name(self) -> str:
        """The file's name; of one whose bytes are no UTF-8, such bytes are replaced."""
        return os.fsencode(self.path.name).decode(errors="replace")


@dataclass(frozen=True)
class Segment:
    """Characters start to end of a book, in the split 'train' or 'validation'."""

    split: str
    book_index: int
    start: int
    end: int
    text: str
    continues: bool = False  # it is a part of a segment, which the Segment before it starts or continues


def find_books(paths: list[Path]) -> list[Path]:
    """Expand folders to their .txt and .md files, sorted, and drop repeated files; else keep the order given."""
    found = {}
    for path in paths:
        files = [path]
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix.lower() in (".txt", ".md") and not p.is_dir())
            if not files:
                raise UserError(f"{path}: is a directory without .txt or .md files, expected a text file")
        for file in files:  # Path.resolve would raise on a loop of links, which read_book reports
            found.setdefault(os.path.realpath(file), file)
    return list(found.values())


def read_book(
    path: Path, encoding: str | None = None, validation: bool = False, faults: Sequence[str] | None = None
) -> tuple[str, Book]:
    """Read a text file, drop a byte-order mark, make every line end LF, and mend the named faults (doctor.FAULTS).

    Files with an ending of formats.READERS are converted to text first. UserError if there is no text.
    """
    text, digest, chapters, cleaned = load_text(path, encoding, faults)
    n_words = count_words(text)
    return text, Book(path, digest, len(text), len(text.encode()), n_words, validation, chapters, cleaned)


def load_text(
    path: Path, encoding: str | None, faults: Sequence[str] | None
) -> tuple[str, str, tuple[int, ...], dict[str, int]]:
    """Read a file as read_book does; return its text, and sha256, chapters and cleaned of its Book."""
    name, suffix = short_name(path), path.suffix.lower()
    raw = _read_bytes(path, name)
    is_zip = suffix in ARCHIVES and raw.startswith(b"PK")
    text = "" if is_zip else _decode(raw, encoding, name)
    if suffix in READERS and raw:
        text = convert_book(raw if is_zip else text.encode(), suffix, name)
    text, cleaned = clean(text, faults)
    # The marks of chapters go last: what changes the text before moves them with it.
    text, chapters = take_chapters(text) if suffix in READERS else (text, ())
    if not text.strip() and cleaned:
        raise UserError(f"{name} has no text left after --clean {','.join(cleaned)}; leave it out")
    if not text.strip():
        raise UserError(f"{name} has no text, only white space" if raw else f"{name} is empty")
    return text, hashlib.sha256(raw).hexdigest(), chapters, cleaned


def short_name(path: Path) -> str:
    """Return a path as an error names it."""
    return str(path) if len(str(path)) <= 120 else f"{str(path)[:60]}..."


def make_printable(text: str) -> str:
    """Replace control characters, which could command a terminal; the spaces and joiners of other scripts stay."""
    return "".join(c if c.isprintable() or c in SHOWN or category(c) == "Zs" else "\ufffd" for c in text)


def count_words(text: str) -> int:
    """Count what stands between white space; in scripts that have none, letters."""
    n_letters, rest = 0, text
    if MAY_BE_UNSPACED.search(text) and LETTER.search(text):
        rest, n_letters = LETTER.subn(" ", text)
        return n_letters + sum(any(map(str.isalnum, word)) for word in rest.split())
    return len(rest.split())


def _decode(raw: bytes, given: str | None, name: str) -> str:
    """Decode the bytes of a text file, without a byte-order mark and with LF as line ends."""
    encoding = given or "utf-8"
    check_first_bytes(raw, encoding, name)
    try:
        text = raw.decode(encoding)
    except UnicodeError as error:
        raise UserError(f"{name} is not {explain_decoding(error, given)}") from None
    check_characters(text, raw, encoding, name)
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _read_bytes(path: Path, name: str) -> bytes:
    try:
        before = os.stat(path)
        if stat.S_ISDIR(before.st_mode):
            raise UserError(f"{name}: is a directory, expected a text file")
        if not stat.S_ISREG(before.st_mode):
            raise UserError(f"{name}: not a regular file")
        raw = path.read_bytes()
        after = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{name}: no such file") from None
    except OSError as error:
        if machine_reason(error):
            raise
        raise UserError(f"{name}: {os.strerror(error.errno).lower()}") from None
    except ValueError:
        raise UserError(f"{name!r}: not a file name") from None
    if (before.st_mtime_ns, before.st_size) != (after.st_mtime_ns, len(raw)):
        raise UserError(f"{name} changed while it was read; try again")
    return raw


def check_first_bytes(raw: bytes, encoding: str, name: str) -> None:
    """Raise UserError if a file that should be UTF-8 starts like another format."""
    if codecs.lookup(encoding).name != "utf-8":
        return
    for signature, verdict in SIGNATURES:
        if raw.startswith(signature):
            raise UserError(f"{name} {verdict}")
    zeros, order = raw.count(0), "BE" if raw[:1] == b"\0" else "LE"
    if raw and zeros == len(raw):
        raise UserError(f"{name} has only zero bytes; the file is damaged")
    for width, min_size, min_zeros, share in ((32, 8, 0.7, ""), (16, 4, 0.4, " (half of its bytes are zero)")):
        if len(raw) >= min_size and zeros > min_zeros * len(raw):
            advice = f"convert it: iconv -f UTF-{width}{order} -t UTF-8"
            raise UserError(f"{name} looks like UTF-{width} without a mark{share}; {advice}")


def check_characters(text: str, raw: bytes, encoding: str, name: str, offset: int = 0) -> None:
    """Raise UserError for decoded bytes, which start at byte `offset`, with characters that no plain text has."""
    if "\0" in text:
        raise UserError(f"{name} has a zero byte at offset {offset + raw.find(0)}; it is not plain text")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # UTF-7 can spell half of a surrogate pair
        raise UserError(f"{name} is not {encoding}: half a character, {text[error.start]!r}") from None


def explain_decoding(error: UnicodeError, encoding: str | None, offset: int = 0, n_lines: int = 0) -> str:
    """Say what a file is not; its part error.object starts at byte `offset`, after `n_lines` lines.

    None as encoding: UTF-8, in a script without a flag for another one.
    """
    if not isinstance(error, UnicodeDecodeError):  # utf-16 without a mark, or a codec that is none of text
        return f"{encoding}: {error}"
    raw, start = error.object, error.object[:4096]
    byte = f"byte {raw[error.start]:#04x} at offset {offset + error.start}"
    if sum(byte < 9 or 13 < byte < 32 for byte in start) > 0.01 * len(start):  # control characters
        return f"text: {byte}"
    if encoding and codecs.lookup(encoding).name != "utf-8":
        return f"{encoding}: {byte}"
    if error.reason == "unexpected end of data":
        return f"UTF-8: unfinished character at its end (offset {offset + error.start})"
    line = n_lines + raw.count(b"\n", 0, error.start) + 1
    return f"UTF-8: {byte} (line {line}); convert it{' or give --encoding latin-1' * bool(encoding)}"


def choose_chapters(books: list[Book], val_split: float, seed: int) -> list[tuple[int, int]]:
    """Choose whole chapters for validation: (start, end) in characters over all books.

    One lies in each of several equal parts. They are the selection of CHOICES whose size is nearest to val_split;
    [] if the books have too few chapters, or such uneven ones that none is near.
    """
    ends = list(itertools.accumulate((book.n_chars for book in books), initial=0))
    starts = [offset + start for book, offset in zip(books, ends, strict=False) for start in book.chapters]
    n_chars, size = ends[-1], val_split * ends[-1]
    if not all(book.chapters for book in books) or len(starts) * val_split < MIN_CHAPTERS:
        return []
    count = round(val_split * len(starts))
    parts = [[] for _ in range(count)]
    for start, end in itertools.pairwise([*starts, n_chars]):
        parts[(start + end) * count // (2 * n_chars)].append((start, end))
    rng = random.Random(seed)
    choices = [[rng.choice(part) for part in parts if part] for _ in range(CHOICES)]
    misses = [abs(sum(end - start for start, end in chosen) - size) for chosen in choices]
    return choices[misses.index(min(misses))] if min(misses) <= MAX_MISS * size else []


def choose_validation_spans(n_chars: int, val_split: float, seed: int) -> list[tuple[int, int]]:
    """Choose where validation segments should lie: (start, end) in characters over all books, without overlap.

    One segment lies at a random position in each of several equal parts, so that together they represent the whole
    book and not its last chapter. Their number and their length grow with the square root of their size.
    """
    size = val_split * n_chars
    if size == 0:
        return []
    count = max(3, round(math.sqrt(size) / 20))
    count += count == 4  # four segments could all miss the middle third of the book
    part, length = n_chars / count, size / count
    rng = random.Random(seed)
    starts = [part * i + rng.random() * (part - length) for i in range(count)]
    return [(int(start), int(start + length)) for start in starts]


def find_cuts(text: str, needed: int) -> list[int]:
    """List where a segment may start or end, 0 and the text's end included; finer than paragraphs below `needed`."""
    for pattern in CUT_PATTERNS:
        cuts = sorted({0, len(text), *(match.end() for match in re.finditer(pattern, text))})
        if len(cuts) >= needed:
            break
    return cuts


def split_book(
    text: str, book_index: int, offset: int, spans: list[tuple[int, int]], chapters: tuple[int, ...] = ()
) -> Iterator[Segment]:
    """Yield the segments of a book, for training and validation; together they are its text.

    `spans` are from choose_validation_spans or choose_chapters; the book starts at character `offset` over all books.
    No segment crosses the start of one of its chapters.
    """
    wanted = [(a - offset, b - offset) for a, b in spans if a < offset + len(text) and b > offset]
    # Each end moves to the nearest cut, which changes the size by up to one paragraph per segment.
    cuts = sorted({*find_cuts(text, 40 * len(wanted)), *chapters}) if wanted else []
    position, pieces = 0, []
    for a, b in wanted:
        start, end = _nearest(cuts, max(a, position)), _nearest(cuts, min(b, len(text)))
        if end > start:
            pieces += [("train", position, start), ("validation", start, end)]
            position = end
    for split, start, end in [*pieces, ("train", position, len(text))]:
        inside = [chapter for chapter in chapters if start < chapter < end]
        for a, b in itertools.pairwise([start, *inside, end] if end > start else []):
            yield Segment(split, book_index, a, b, text[a:b])


def _nearest(cuts: list[int], position: int) -> int:
    right = bisect.bisect_left(cuts, position)
    return min(cuts[max(0, right - 1) : right + 1], key=lambda cut: abs(cut - position))
