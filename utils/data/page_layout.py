"""Find what printed pages leave in a text: page numbers and running heads, divided words, broken lines.

Each function returns edits (start, end, replacement), in order and without overlap.
"""

import re
from collections import Counter
from itertools import accumulate, pairwise

Edit = tuple[int, int, str]

# A line that holds one number and perhaps a title: "12", "- 12 -", "[Pg 12]", "THE TITLE 12".
NUMBER_LINE = re.compile(r"\D{0,60}?(\d{1,4})\D{0,60}")
PAGE_TAG = re.compile(r"\[(?:Pg|Page|p\.) ?\d{1,4}\]")
PAGE_WORDS = {"", "pg", "p", "page"}
ORNAMENT = " \t\f[](){}<>-–—.|*~_"
MIN_PAGES, MIN_HEADS = 5, 3
WORD = r"[^\W\d_]+"
DIVISION = re.compile(rf"([-\u00ad¬])[ \t]*\n(?=({WORD}))")
MIN_DIVISIONS = 3
# A line that starts so is not the rest of a sentence: indented, an item of a list. One with a gap belongs to a table.
ITEM = re.compile(r"\s|[#>|*+•-]+ [^a-z]|\d{1,2}[.)] ")
PARAGRAPH_START = re.compile(rf"{ITEM.pattern}|[\"“'‘]")
SENTENCE_END = re.compile(r"[.!?:][\"'”’)_*]*\Z")
GAP = re.compile(r"\S(?: {3}|\t| \| )")
DASH_END, DASH_START = re.compile(r"(?:\w-|\S--|\S—)\Z"), re.compile(r"(?:--|—)\S")
MIN_BREAKS = 20
# Least share of a text in broken lines: a letter or an advertisement in a book may stand in short lines.
MIN_WRAPPED = 0.05


def find_pages(text: str) -> list[Edit]:
    """Find page numbers and running heads: lines whose numbers count up, or that recur, amid sentences."""
    lines = text.split("\n")
    filled = [i for i, line in enumerate(lines) if line and not line.isspace()]
    numbers, heads = _find_numbers([lines[i] for i in filled]), _find_heads([lines[i] for i in filled])
    amid = _find_amid([lines[i].strip() for i in filled], numbers.keys() | heads.keys())
    titled = _group({k: words for k, (_, words) in numbers.items() if words.lower() not in PAGE_WORDS})
    headings = set()
    for group in titled.values():
        headings |= group if len(group) < 2 or len(amid & group) <= len(group) / 5 else set()
    found, left = set(), {k: number for k, number in numbers.items() if k not in headings}
    for _ in range(20):  # the volumes in one file count anew
        chain = _longest_chain(left)
        named = sum(numbers[k][1].lower() in ("pg", "p", "page") for k in chain)
        if len(chain) < MIN_PAGES or (named <= len(chain) / 2 and len(amid & chain) <= len(chain) / 5):
            break
        found |= chain
        left = {k: number for k, number in left.items() if k not in chain}
    pages = frozenset(found)
    for group in _group(heads).values():
        beside = sum(k - 1 in pages or k + 1 in pages for k in group)
        often = len(group) >= MIN_PAGES and len(amid & group) > len(group) / 2
        if often or (beside > len(group) / 2 and len(amid & group) > len(group) / 5):
            found |= group
    return _remove_lines(text, lines, {filled[k] for k in found})


def _find_numbers(lines: list[str]) -> dict[int, tuple[int, str]]:
    """Map the lines that may hold a page number to it and the words beside it."""
    found = {}
    for k, line in enumerate(lines):
        if len(line) <= 80 and (match := NUMBER_LINE.fullmatch(line)):
            found[k] = int(match[1]), f"{line[: match.start(1)]} {line[match.end(1) :]}".strip(ORNAMENT)
    often = Counter(words for _, words in found.values())

    def is_title(words):
        return words.isupper() or (words[0].isupper() and often[words] >= MIN_HEADS)

    return {k: (n, words) for k, (n, words) in found.items() if words.lower() in PAGE_WORDS or is_title(words)}


def _find_heads(lines: list[str]) -> dict[int, str]:
    """Map the short lines that recur, start with a capital letter and end no sentence to their words."""
    heads = [line.strip() if len(line) <= 80 else "" for line in lines]
    often = Counter(heads)
    return {k: h for k, h in enumerate(heads) if h and often[h] >= MIN_HEADS and h[0].isupper() and h[-1].isalnum()}


def _find_amid(lines: list[str], marks: set[int]) -> set[int]:
    """Return the marks inside a sentence: the line above does not end it, and the line below is in lower case."""
    texts = [k for k in range(len(lines)) if k not in marks]
    below = dict(pairwise([-1, *texts]))
    amid, above = set(), -1
    for k in range(len(lines)):
        if k not in marks:
            above = k
        elif (
            above >= 0 and above in below and lines[below[above]][0].islower() and not SENTENCE_END.search(lines[above])
        ):
            amid.add(k)
    return amid


def _group(words: dict[int, str]) -> dict[str, set[int]]:
    groups = {}
    for k, key in words.items():
        groups.setdefault(key, set()).add(k)
    return groups


def _longest_chain(numbers: dict[int, tuple[int, str]]) -> set[int]:
    """Return the lines of the longest sequence of numbers that grow by 1 to 3."""
    ends, before = {}, {}  # number -> (length, line) of the longest sequence that ends with it; line -> line
    for k, (number, _) in numbers.items():
        length, before[k] = max((ends.get(number - step, (0, None)) for step in (1, 2, 3)), key=lambda end: end[0])
        if length + 1 >= ends.get(number, (0, None))[0]:
            ends[number] = length + 1, k
    k = max(ends.values(), default=(0, None))[1]
    chain = set()
    while k is not None:
        chain.add(k)
        k = before[k]
    return chain


def _remove_lines(text: str, lines: list[str], removed: set[int]) -> list[Edit]:
    """Remove lines and join what they interrupted; page tags inside a line are removed as well."""
    starts = [0, *accumulate(len(line) + 1 for line in lines)]
    limit = measure_wrapping(lines) if removed else None
    edits, last = [], 0
    for i in sorted(removed):
        if i < last:
            continue
        first, last = i, i + 1
        while first > 0 and not lines[first - 1].strip():
            first -= 1
        while last < len(lines) and (last in removed or not lines[last].strip()):
            last += 1
        if first == 0 or last == len(lines):
            edits.append((starts[first], min(starts[last], len(text)), ""))
            continue
        above, below = lines[first - 1].rstrip(), lines[last]
        end = max(k for k in range(i, last) if k in removed)
        is_open = re.search(r"[,;–—-][\"'”’]?\Z", above) or (above[-1].isalnum() and len(above) > 40)  # not a heading
        is_full = limit and not PARAGRAPH_START.match(below) and fill(above, below) >= limit
        if below[0].islower() or is_open or is_full:
            new = "\n" if limit or above.endswith("-") else " "
        else:
            new = "\n" * (1 + max(i - first, last - 1 - end))  # as many blank lines as above or below
        edits.append((starts[first - 1] + len(above), starts[last], new))
    for match in PAGE_TAG.finditer(text):
        start, end = match.span()
        edits.append((start, end + (text[end : end + 1] == " " and text[start - 1 : start].isspace()), ""))
    edits.sort()
    return [edit for before, edit in pairwise([(0, 0, ""), *edits]) if edit[0] >= before[1]]


def fill(line: str, after: str) -> int:
    """Return how long a line would be with the next line's first word."""
    return len(line) + 1 + len(after.split(" ", 1)[0])


def measure_wrapping(lines: list[str]) -> int | None:
    """Return the least fill() of the lines that were broken because they were full; None if there are few."""
    pairs = [(line, after) for line, after in pairwise(lines) if after[:1].islower() and line and not line.isspace()]
    fills = sorted(fill(line.rstrip(), after) for line, after in pairs if not GAP.search(line))
    if len(fills) < MIN_BREAKS:
        return None
    width = sorted(len(line.rstrip()) for line, _ in pairs)[len(pairs) * 19 // 20]
    full = [size for size in fills if size > 0.8 * width]  # verse in lower case is not
    return full[len(full) // 200] if 30 <= width <= 140 and len(full) > 0.6 * len(fills) else None


def find_lines(text: str) -> list[Edit]:
    """Find the line ends inside paragraphs of prose that was broken at a fixed width."""
    lines = text.split("\n")
    limit = measure_wrapping(lines)
    if limit is None:
        return []
    edits, n_lower, start = [], 0, 0
    for line, after in pairwise(lines):
        end, line = start + len(line) + 1, line.rstrip()
        if line and after and not ITEM.match(after) and fill(line, after) >= limit and not GAP.search(line):
            edits.append((start + len(line), end, "" if DASH_END.search(line) or DASH_START.match(after) else " "))
            n_lower += after[0].islower()
        start = end
    return edits if n_lower > len(edits) / 2 and len(edits) * limit > MIN_WRAPPED * len(text) else []


def find_hyphens(text: str) -> list[Edit]:
    """Find words divided at a line end, and move their first half to the next line.

    A hyphen belongs to the word if the text has the word with it elsewhere, or has both halves but not the whole.
    """
    divisions = [m for m in DIVISION.finditer(text) if m.start() and _is_one_word(text[m.start() - 1], m[2])]
    if len(divisions) < MIN_DIVISIONS:
        return []
    others = re.sub(rf"{WORD}[-\u00ad¬][ \t]*\n{WORD}", " ", text.lower())
    words, compounds = Counter(re.findall(WORD, others)), Counter(re.findall(f"{WORD}-{WORD}", others))
    edits = []
    for match in divisions:
        start = match.start()
        while start and not text[start - 1].isspace():
            start -= 1
        chunk = text[start : match.start()]
        head, tail = re.search(rf"{WORD}\Z", chunk)[0].lower(), match[2].lower()
        whole, compound = words[head + tail], compounds[f"{head}-{tail}"]
        is_compound = not whole and words[head] and words[tail] and min(len(head), len(tail)) > 2
        if match[1] == "-" and (chunk[: -len(head)].endswith("-") or compound > whole or is_compound):
            continue
        line_end = start
        while line_end and text[line_end - 1] in " \t":
            line_end -= 1
        edits.append((line_end, match.end(), chunk if text[line_end - 1 : line_end] in ("", "\n") else f"\n{chunk}"))
    return edits if len(edits) >= max(MIN_DIVISIONS, 0.75 * len(divisions)) else []


def _is_one_word(before: str, after: str) -> bool:
    """Whether a letter and the next line's first letters may belong to one word, by their case."""
    return before.isalpha() and (after.islower() or (before.isupper() and after.isupper()))
