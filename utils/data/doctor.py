"""Find and mend faults of a book's text. FAULTS lists them in the order of mending.

Each fault has one function that returns edits (start, end, replacement), in order and without overlap. Examining
counts the edits and cleaning applies them, so both always agree.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise

import ftfy

from utils.data.page_layout import Edit, find_hyphens, find_lines, find_pages

# A wrongly decoded character became two or more.
SUSPECT = re.compile(r"[^\x00-\x7f]{2}|Ã ")
GUTENBERG_START = re.compile(
    r"^[ \t]*\*+ ?START OF (?:THE|THIS) PROJECT GUTENBERG(?:[^*]{0,200}\*\*\*)?.*\n|^.*\*END\b.*SMALL PRINT.*\n",
    re.IGNORECASE | re.MULTILINE,
)
GUTENBERG_END = re.compile(
    r"^[ \t]*(?:\*+ ?)?(?:END OF (?:THE |THIS )?PROJECT GUTENBERG|START: FULL LICENSE|THE FULL PROJECT GUTENBERG"
    r"|SECTION 1\. +GENERAL TERMS OF USE AND REDISTRIBUTING PROJECT GUTENBERG)",
    re.IGNORECASE | re.MULTILINE,
)
# Paragraphs that stand above the book in its file.
GUTENBERG_HEAD = re.compile(
    r"Project Gutenberg|Distributed Proofread"
    r"|\A(?:Title|Author|Editor|Translator|Illustrator|Release Date|Posting Date|Original Publication"
    r"|Most recently updated|Language|Character set encoding|Credits): "
    r"|\A(?:This )?(?:e-?(?:text|book) )?(?:was )?(?:produced|prepared|transcribed|scanned|digitized) (?:\w+ )?by\b",
    re.IGNORECASE,
)
# A longer text after END is another book, though no START was found.
MAX_LICENCE = 40_000
PARAGRAPH = re.compile(r"\S.*(?:\n.*\S.*)*")
STRAIGHT, CURLY = "\"'", "“”„‘’‚"
MIN_QUOTES = 3
# Least characters of a part that stands twice: refrains and quoted letters are shorter.
MIN_DUPLICATE = 1000
UNIT = re.compile(r"[^\n.!?]{40,}")


@dataclass(frozen=True)
class Finding:
    """A fault of a text: its name in FAULTS, how often it occurs, and the first place before and after mending."""

    name: str
    count: int
    example: str


def examine(text: str) -> list[Finding]:
    """List the faults of a text in the order of mending."""
    found = ((name, find(text)) for name, (find, *_) in FAULTS.items())
    return [Finding(name, len(edits), _show_edit(text, *edits[0])) for name, edits in found if edits]


def clean(text: str, names: Collection[str] | None) -> tuple[str, dict[str, int]]:
    """Mend the named faults in the order of FAULTS; return the text, and how often each was mended if it was."""
    counts = {}
    for name, (find, *_) in FAULTS.items():
        if name in (names or ()) and (edits := find(text)):
            counts[name] = len(edits)
            text = apply_edits(text, edits)
    return text, counts


def apply_edits(text: str, edits: list[Edit]) -> str:
    """Replace text[start:end] by the replacement of each edit."""
    pieces, position = [], 0
    for start, end, new in edits:
        pieces += text[position:start], new
        position = end
    return "".join([*pieces, text[position:]])


def _show_edit(text: str, start: int, end: int, new: str) -> str:
    before, old, after = text[max(0, start - 10) : start], text[start:end], text[end : end + 10]
    old, new = (part if len(part) <= 40 else f"{part[:25]}...{part[-12:]}" for part in (old, new))
    return f"{before + old + after!r} -> {before + new + after!r}"


def find_mojibake(text: str) -> list[Edit]:
    """Find text that was decoded with the wrong encoding, such as 'Ã©' for 'é'."""
    edits, start = [], 0
    for line in [] if text.isascii() else text.split("\n"):
        if not line.isascii() and SUSPECT.search(line):
            fixed = ftfy.fix_encoding(line, unescape_html=False, replace_lossy_sequences=False)
            if fixed != line:
                same = _count_equal(line, fixed)
                tail = _count_equal(line[same:][::-1], fixed[same:][::-1])
                edits.append((start + same, start + len(line) - tail, fixed[same : len(fixed) - tail]))
        start += len(line) + 1
    return edits


def _count_equal(one: str, two: str, i: int = 0, j: int = 0) -> int:
    """Return how many characters agree from one[i] and two[j] on."""
    size = 0
    for step in (4096, 64, 1):
        while (part := one[i + size : i + size + step]) and part == two[j + size : j + size + step]:
            size += len(part)
    return size


def find_gutenberg(text: str) -> list[Edit]:
    """Find Project Gutenberg's header, footer and licence: a book begins after START and ends before END."""
    if "gutenberg" not in text.lower():
        return []
    starts = [match.end() for match in GUTENBERG_START.finditer(text)]
    ends = [match.start() for match in GUTENBERG_END.finditer(text)]
    edits, position = [], 0
    for left, right in pairwise([0, *ends, len(text)]):
        is_book = left == 0 or right - left > MAX_LICENCE
        begin = max((start for start in starts if left < start <= right), default=left if is_book else right)
        first = PARAGRAPH.search(text, begin, right)
        if begin or (first and "project gutenberg" in first[0].lower()):
            paragraphs = PARAGRAPH.finditer(text, begin, right)
            begin = next((p.start() for p in paragraphs if not GUTENBERG_HEAD.search(p[0])), right)
        if begin < right:
            if begin > position:
                edits.append((position, begin, "\n" if position else ""))
            position = right if right == len(text) else len(text[:right].rstrip()) + 1
    return edits if position == len(text) else [*edits, (position, len(text), "")]


def find_quotes(text: str) -> list[Edit]:
    """Find quotation marks of the rarer kind, straight or curly; minutes, seconds and inches are no such marks."""
    if min(sum(map(text.count, marks)) for marks in (STRAIGHT, CURLY)) < MIN_QUOTES:
        return []
    straight = [match.start() for match in re.finditer(f"(?<!\\d)[{STRAIGHT}]", text)]
    curly = [match.start() for match in re.finditer(f"[{CURLY}]", text)]
    if len(straight) < MIN_QUOTES:
        return []
    if len(straight) >= len(curly):
        return [(i, i + 1, '"' if text[i] in "“”„" else "'") for i in curly]
    elided = {"em", "tis", "twas"} | {match[1].lower() for match in re.finditer(r"(?<!\w)’(\w+)", text)}
    return [(i, i + 1, _curl(text, i, elided)) for i in straight]


def _curl(text: str, i: int, elided: set[str]) -> str:
    """Return the curly form of the straight mark at i; `elided`: words that an apostrophe starts, such as 'tis."""
    before, after = text[i - 1 : i], text[i + 1 : i + 2]
    opens = (not before or before in " \t\n([{-–—_*“‘\"'") and after.strip(" \n\t,;:!?)")
    if text[i] == '"':
        return "“" if opens else "”"
    word = re.match(r"\w*", text[i + 1 : i + 30])[0].lower()
    return "‘" if opens and word not in elided and not word.isdigit() else "’"


def find_duplicates(text: str) -> list[Edit]:
    """Find lines that repeat earlier lines word for word, MIN_DUPLICATE characters or more at once."""
    edits, seen, checked, position, mirrored = [], {}, 0, 0, None
    for match in UNIT.finditer(text):
        here = match.start()
        first = seen.setdefault(match[0], here)
        if first == here or here < checked:
            continue
        mirrored = text[::-1] if mirrored is None else mirrored
        back = _count_equal(mirrored, mirrored, len(text) - first, len(text) - here)
        start, end = max(position, here - back), here + _count_equal(text, text, first, here)
        checked, period = end, here - first
        if end - start >= max(period, MIN_DUPLICATE):  # it follows the first copy directly
            end = start + (end - start) // period * period
        else:
            inside = [newlines.end() for newlines in re.finditer(r"\n+", text[start:end])] or [0]
            start, end = start + inside[0], start + inside[-1]
            end += _count_equal(text, "\n" * 9, end)
        if end - start >= MIN_DUPLICATE:
            edits.append((start, end, ""))
            position = end
    return edits


# Name: how to find it, the fault, how it is mended. Page numbers divide words and sentences, so they go first.
FAULTS = {
    "mojibake": (find_mojibake, "lines decoded with the wrong encoding", "decodes them again"),
    "gutenberg": (find_gutenberg, "headers, footers or licences of Project Gutenberg", "removes them"),
    "pages": (find_pages, "page numbers or running heads", "removes them"),
    "hyphens": (find_hyphens, "words divided at a line end", "joins them"),
    "lines": (find_lines, "lines broken at a fixed width", "joins them"),
    "quotes": (find_quotes, "quotation marks of the rarer of two kinds, straight and curly", "makes them alike"),
    "duplicates": (find_duplicates, "parts that stand twice", "removes the second copy"),
}
