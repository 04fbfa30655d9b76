"""The ladder: the author's unseen pages pass for the author's; chains, shuffles, other authors and copies do not.

    python -m pytest -m slow -s tests/test_ladder.py [--books FOLDER]

prepares each book without some of its pages, trains on it, and judges those pages beside the impostors.
"""

import json
import re
from pathlib import Path

import pytest
from impostors import KINDS, write_impostors

from utils.data.blocks import open_blocks
from utils.data.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
BASE, BOOK, CONTROL = ROOT / "results/base_model", ROOT / "results/data/book.txt", ROOT / "results/data/control.txt"
PASS, COPIED = {"author", "unseen"}, {"verbatim", "renamed"}
N_PARTS, UNSEEN = 40, range(4, 40, 10)


def pytest_generate_tests(metafunc):
    folder = metafunc.config.getoption("--books")
    books = [BOOK, *sorted(Path(folder).glob("*.txt"))] if folder else [BOOK]
    metafunc.parametrize("book", books, ids=lambda path: path.stem)


def hold_out(text):
    """Split a text at blank lines; return nine tenths of it, and the pages between."""
    paragraphs = re.split(r"(?<=\n\n)", text)
    parts = [paragraphs[len(paragraphs) * i // N_PARTS : len(paragraphs) * (i + 1) // N_PARTS] for i in range(N_PARTS)]
    kept, unseen = (
        "".join("".join(part) for i, part in enumerate(parts) if (i in UNSEEN) == is_out) for is_out in (False, True)
    )
    return kept, unseen


def put(figure):
    return "{value:.2f} [{low:.2f}, {high:.2f}]".format(**figure) if figure else "-"


def test_no_impostor_passes(book, tmp_path, script):
    kept, unseen = hold_out(book.read_text(encoding="utf-8"))
    (tmp_path / "book.txt").write_text(kept, encoding="utf-8")
    (tmp_path / "unseen.txt").write_text(unseen, encoding="utf-8")
    flags = ["--input-path", tmp_path / "book.txt", "--model-name", BASE, "--output-dir", tmp_path / "blocks"]
    assert script("prepare_data", *flags).code == 0
    run = tmp_path / "run"
    flags = ["--data-dir", tmp_path / "blocks", "--learning-rate", "3e-4", "--max-steps", 200, "--sample-tokens", 0]
    assert script("finetune_generative", "--output-dir", run, *flags).code == 0
    other = (CONTROL if book == BOOK else BOOK).read_text(encoding="utf-8")
    files = write_impostors(open_blocks(tmp_path / "blocks"), load_tokenizer(BASE), other, 66, 75, tmp_path / "judged")
    assert {path.stem for path in files} == set(KINDS)
    ran = script("generate_text", "--finetuned-model", run, "--judge", *files, tmp_path / "unseen.txt")
    assert ran.code == 0, ran.err
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))

    print(f"\n{book.stem}, read by {report['reader']}\n")
    print(
        "| texts | copied, 8+ | unknown words | Delta | reader's AUC | gap: words | spelling | sense | like the book |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---|")
    usual = {
        name: {"copy_rate": report["copy_rate"][name]["8"], "unknown_words": report["unknown_words"][name],
               "delta": dict(zip(("low", "high"), report["intervals"]["delta"][name], strict=True))
               | {"value": report["delta"][name]}, "reader_auc": report["reader_auc"][name],
               "parts": report["parts"][name], "copies": None, "writes_like_the_book": None}
        for name in ("base", "finetuned", "reference")
    }  # fmt: skip
    for name, row in (usual | report["judged"]).items():
        verdict = "copied" if row["copies"] else {True: "yes", False: "no", None: ""}[row["writes_like_the_book"]]
        shares = (put(row["parts"].get(part)) for part in ("words", "spelling", "sense"))
        print(f"| {name} | {row['copy_rate']:.1%} | {row['unknown_words']:.1%} | {put(row['delta'])} | "
              f"{put(row['reader_auc'])} | {' | '.join(shares)} | {verdict} |")  # fmt: skip

    assert report["flags"]["writes_like_the_book"] is False
    for name, row in report["judged"].items():
        assert row["writes_like_the_book"] is (name in PASS), (name, row)
        assert row["copies"] or name not in COPIED, (name, row)
        if name in PASS:
            assert row["copies"] is False
        else:
            assert row["gap_closed"]["high"] < 0.5
    assert 0.4 < report["reader_auc"]["reference"]["value"] < 0.65
    assert report["reader_auc"]["base"]["value"] > 0.9
