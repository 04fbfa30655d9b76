"""The ladder: the author's unseen pages and a model's samples beside impostors, judged in one run.

A book is prepared without some of its pages; a model is trained on the rest; generate_text.py judges those pages and
what tests/impostors.py makes of the rest. tests/test_ladder.py says which texts may pass.
"""

import itertools
import re
from pathlib import Path
from typing import Any

from benchmarks.figures import INTERVAL, SHARE, make_table, show
from benchmarks.scripts import BASE, GENERAL, LEARNING_RATE, SAMPLE, read, run_script
from tests.impostors import write_impostors
from utils.data.blocks import open_blocks
from utils.data.tokenizer import load_tokenizer
from utils.evaluation.style import PARTS

N_PARTS, UNSEEN = 40, range(4, 40, 10)  # of a book; those that are taken out
STEPS, N_TEXTS, N_TOKENS = 200, 66, 75
OWN = {"base": "base model", "finetuned": "fine-tuned model", "reference": "author (reference)"}
TITLES = OWN | {
    "author": "the author, validation pages",
    "word_chain_1": "word chain, order 1",
    "word_chain_2": "word chain, order 2",
    "token_chain_2": "token chain, order 2",
    "character_chain_5": "character chain, order 5",
    "shuffled_words": "words in random order",
    "other_author": "another author",
    "verbatim": "training pages",
    "renamed": "training pages, names replaced",
    "unseen": "**the author, unseen pages**",
}
COLUMNS = (
    "texts | >copied, 8+ | >unknown words | >Delta | >reader's AUC | >gap: words | >spelling | >sense | like the book"
)


def hold_out(text: str) -> tuple[str, str]:
    """Split a text at blank lines; return nine tenths of it, and the pages between."""
    paragraphs = re.split(r"(?<=\n\n)", text)
    bounds = [len(paragraphs) * i // N_PARTS for i in range(N_PARTS + 1)]
    pages = ["".join(paragraphs[start:end]) for start, end in itertools.pairwise(bounds)]
    kept = (page for i, page in enumerate(pages) if i not in UNSEEN)
    return "".join(kept), "".join(pages[i] for i in UNSEEN)


def climb(folder: Path, book: Path) -> dict[str, dict[str, Any]]:
    """Return the figures of all TITLES for a book, as generate_text.py gives them."""
    folder.mkdir(parents=True)
    pages, unseen, data, model = (folder / name for name in ("book.txt", "unseen.txt", "blocks", "run"))
    for path, text in zip((pages, unseen), hold_out(book.read_text(encoding="utf-8")), strict=True):
        path.write_text(text, encoding="utf-8")
    run_script("prepare_data", "--input-path", pages, "--model-name", BASE, "--output-dir", data)
    run_script("finetune_generative", "--data-dir", data, "--output-dir", model, "--learning-rate", LEARNING_RATE,
               "--max-steps", STEPS, "--sample-tokens", 0)  # fmt: skip
    other = (GENERAL if book == SAMPLE else SAMPLE).read_text(encoding="utf-8")
    files = write_impostors(open_blocks(data), load_tokenizer(BASE), other, N_TEXTS, N_TOKENS, folder / "judged")
    run_script("generate_text", "--finetuned-model", model, "--judge", *files, unseen)
    report = read(model / "report.json")
    return {name: collect(row) for name, row in (list_own(report) | report["judged"]).items()}


def list_own(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the report's own columns in the form of its judged texts; a verdict is on the fine-tuned model only."""
    rows = {}
    for name in OWN:
        low, high = report["intervals"]["delta"][name]
        flags = report["flags"] if name == "finetuned" else {}
        rows[name] = {key: report[key][name] for key in ("unknown_words", "reader_auc", "parts")} | {
            "copy_rate": report["copy_rate"][name]["8"], "gap_closed": report["gap_closed"].get(name),
            "delta": {"value": report["delta"][name], "low": low, "high": high},
            "copies": flags.get("copies"), "writes_like_the_book": flags.get("writes_like_the_book"),
        }  # fmt: skip
    return rows


def collect(row: dict[str, Any]) -> dict[str, Any]:
    keys = ("copies", "writes_like_the_book", "gap_closed", "copy_rate", "unknown_words", "delta", "reader_auc")
    return {key: row[key] for key in keys} | {part: row["parts"].get(part) for part in PARTS}


def run_ladder(folder: Path, inputs: Any) -> dict[str, Any]:
    return {book.stem: climb(folder / "ladder" / book.stem, book) for book in (SAMPLE, *inputs.books)}


def show_ladder(figures: dict[str, Any]) -> dict[str, str]:
    return {book: make_table(COLUMNS, [show_row(TITLES[name], row) for name, row in rows.items()])
            for book, rows in figures.items()}  # fmt: skip


def show_row(title: str, row: dict[str, Any]) -> list[str]:
    """Return a row of a table; "-" for a part that cannot be measured."""
    undecided = "" if row["copies"] is None else "undecided"  # None: base and author are not judged
    verdict = "copied" if row["copies"] else {True: "yes", False: "no", None: undecided}[row["writes_like_the_book"]]
    parts = (show(INTERVAL, row[part]) if row[part] else "-" for part in PARTS)
    return [title, *(show(SHARE, row[key]) for key in ("copy_rate", "unknown_words")),
            *(show(INTERVAL, row[key]) for key in ("delta", "reader_auc")), *parts, verdict]  # fmt: skip
