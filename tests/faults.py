"""Faults planted in a good text: PLANTS maps a fault of utils/data/doctor.py to ways in which books come to have it."""

import re
import textwrap

HEADERS = [
    "The Project Gutenberg eBook of {0}\n\nThis eBook is for anyone.\n\nTitle: {0}\n\nAuthor: A. Person\n\n"
    "Language: English\n\n*** START OF THE PROJECT GUTENBERG EBOOK {0} ***\n\n\nProduced by B. Person and the\n"
    "Online Distributed Proofreading Team\n\n\n\n",
    "Project Gutenberg's {0}, by A. Person\n\nRelease Date: May 3, 2008 [EBook #12]\n\n"
    "***START OF THE PROJECT GUTENBERG EBOOK {0}, OR THE\nSECOND TITLE***\n\n\n\n",
    "**The Project Gutenberg Etext of {0}**\n\n***START**THE SMALL PRINT!**START***\nLawyers wrote this.\n"
    "*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*\n\n\n\n",
    "The Project Gutenberg EBook of {0}, by A. Person\n\nTitle: {0}\n\n",
]
LICENCE = "\nUpdated editions are welcome.\n\nSTART: FULL LICENSE\n\nTHE FULL PROJECT GUTENBERG LICENSE\n\nRead it.\n"
FOOTERS = [
    "\n\n\n\n*** END OF THE PROJECT GUTENBERG EBOOK {0} ***\n" + LICENCE,
    "\n\nEnd of the Project Gutenberg EBook of {0}\n\n*** END OF THIS PROJECT GUTENBERG EBOOK {0} ***\n\n***** file\n",
    "\n\n\nEnd of Project Gutenberg's {0}, by A. Person\n",
]
MARKS = ["[Pg {n}]", "{n}", "- {n} -", "Page {n}", "THE NAME OF THE BOOK {n}", "{n}\n\nThe Name of the Book"]


def add_licence(text, rng):
    """Put Project Gutenberg's header and footer around a text."""
    return rng.choice(HEADERS).format("A BOOK") + text + rng.choice(FOOTERS).format("A BOOK")


def wrap(text, rng, width=None, at_hyphens=True):
    """Break long lines as textwrap, fmt and editors do."""
    width = width or rng.randint(60, 75)
    split = textwrap.TextWrapper(width, expand_tabs=False, replace_whitespace=False, break_long_words=False,
                                 break_on_hyphens=at_hyphens).wrap  # fmt: skip
    return "\n".join("\n".join(split(line)) if len(line) > width else line for line in text.split("\n"))


def typeset(text, rng, divide=0.0, slack=8):
    """Break long lines unevenly, as a scanned page has them; `divide`: share of the words divided at line ends."""
    width, rows = rng.randint(60, 75), []
    for line in text.split("\n"):
        row = ""
        room = width
        for word in line.split(" ") if len(line) > width else [line]:
            if row and len(row) + 1 + len(word) > room:
                at = room - len(row) - 2
                compound = re.match(r"[A-Za-z]+-(?=[A-Za-z])", word)
                if divide and compound and compound.end() <= at + 1:
                    row, word = f"{row} {compound[0]}", word[compound.end() :]
                elif divide > rng.random() and re.fullmatch(r"[a-z]{6,}[.,]?", word) and at >= 2 and len(word) - at > 3:
                    row, word = f"{row} {word[:at]}-", word[at:]
                rows.append(row)
                row, room = "", width - rng.randint(0, slack)
            row = f"{row} {word}" if row else word
        rows.append(row)
    return "\n".join(rows)


def divide_words(text, rng):
    return typeset(text, rng, 0.6, 0)


def number_pages(text, rng, mark=None):
    """Put a page number between every 34 to 40 lines of a wrapped text, with blank lines around it."""
    lines, pages = text.split("\n"), []
    mark = mark or rng.choice(MARKS)
    while lines:
        size = rng.randint(34, 40)
        page, lines = lines[:size], lines[size:]
        pages.append("\n".join(page).rstrip("\n") if lines else "\n".join(page))
        n_blank = len("\n".join(page)) - len("\n".join(page).rstrip("\n"))
        while lines and not lines[0]:
            lines, n_blank = lines[1:], n_blank + 1
        if lines:
            pages[-1] += f"\n\n{mark.format(n=len(pages))}\n" + "\n" * max(1, n_blank)
    return "".join(pages)


def tag_pages(text, rng):
    """Put [Pg 12] before a word about every 1,800 characters."""
    words, size, page = re.split(r"(?<= )(?=\S)", text), 0, 1
    for i, word in enumerate(words):
        size += len(word)
        if size > 1800 * page:
            words[i] = f"[Pg {page}]{word}"
            page += 1
    return "".join(words)


def decode_wrongly(text, rng):
    """Decode UTF-8 as Windows-1252, in every third line."""

    def spoil(line):
        return "".join(chr(b) if b in b"\x81\x8d\x8f\x90\x9d" else bytes([b]).decode("cp1252") for b in line.encode())

    return "\n".join(spoil(line) if rng.random() < 0.3 else line for line in text.split("\n"))


def curl(text):
    """Make straight quotation marks curly."""
    text = re.sub(r"(?<![^\s(\[—\-_“‘])\"(?=\S)", "“", text).replace('"', "”")
    return re.sub(r"(?<![^\s(\[—\-_“‘])'(?=\w)(?!(?:tis|twas|em)\b)", "‘", text).replace("'", "’")


def mix_quotes(text, rng):
    """Curl the quotation marks of every third line."""
    return "\n".join(curl(line) if rng.random() < 0.3 else line for line in text.split("\n"))


def straighten(text, rng):
    """Make the curly quotation marks of every third line straight."""
    table = str.maketrans("“”‘’", "\"\"''")
    return "\n".join(line.translate(table) if rng.random() < 0.3 else line for line in text.split("\n"))


def repeat_part(text, rng, size=3000):
    """Repeat some paragraphs directly after themselves, or somewhere later."""
    cuts = [match.end() for match in re.finditer(r"\n\n+", text)]
    start = rng.choice([cut for cut in cuts if cut < len(text) - 2 * size])
    end = next(cut for cut in cuts if cut > start + size)
    place = rng.choice([end, rng.choice([cut for cut in cuts if cut >= end])])
    return text[:place] + text[start:end] + text[place:]


# Fault, name of the way: (how the good text is made from a straight, unwrapped one, how it is spoiled, what mends it).
PLANTS = {
    ("mojibake", "Windows-1252"): (lambda text, _: curl(text), decode_wrongly, ["mojibake"]),
    ("gutenberg", "plain"): (None, add_licence, ["gutenberg"]),
    ("gutenberg", "wrapped"): (wrap, add_licence, ["gutenberg"]),
    ("pages", "between lines"): (wrap, number_pages, ["pages"]),
    ("pages", "tags"): (None, tag_pages, ["pages"]),
    ("hyphens", "typeset"): (None, divide_words, ["hyphens", "lines"]),
    ("lines", "textwrap"): (None, wrap, ["lines"]),
    ("lines", "uneven"): (None, typeset, ["lines"]),
    ("quotes", "straight book"): (None, mix_quotes, ["quotes"]),
    ("quotes", "curly book"): (lambda text, _: curl(text), straighten, ["quotes"]),
    ("duplicates", "paragraphs"): (None, repeat_part, ["duplicates"]),
    ("duplicates", "wrapped"): (wrap, repeat_part, ["duplicates"]),
}
