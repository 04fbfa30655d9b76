"""Style: columns are compared with equal amounts, copies stay with their originals, the weakest part counts."""

import dataclasses
import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from utils.evaluation import style
from utils.evaluation.bootstrap import Estimate
from utils.evaluation.columns import Column
from utils.evaluation.style import BookMeasures, describe_lack, judge_style, weakest


def make_column(n_texts, n_words):
    return Column([f"text {i} " + "word " * (n_words - 1) for i in range(n_texts)],
                  [np.zeros(40)] * n_texts, list(range(n_texts)))  # fmt: skip


@pytest.fixture
def book():
    """The measures of a book without the book: no model reads."""
    book = BookMeasures.__new__(BookMeasures)
    book.features, book.numbers = [np.zeros((5, 1))], {"window 3": 3}
    book.read, book.seed = lambda texts: [np.zeros((len(texts), 1))], 0
    book.read_column = book._read_column
    book.familiarity = SimpleNamespace(measure=lambda texts: np.zeros((len(texts), 1)))
    return book


def test_a_copied_window_stays_with_its_original(book, monkeypatch):
    given = []
    monkeypatch.setattr(style, "measure_auc", lambda *args: given.append(args))
    book._measure_auc(Column(["a", "window 3", "b"], [], [0, 1, 0]), 2)
    assert given[0][2].tolist() == [5, 3, 5]
    assert given[0][3] == 2


def test_draws_of_columns_do_not_move_together(book):
    first, same, second = (dataclasses.replace(make_column(3, 4), name=name) for name in "aab")
    assert book.seed_of(first) == book.seed_of(same) != book.seed_of(second)


def test_columns_are_compared_with_equal_amounts(book):
    columns = {"base": make_column(30, 50), "finetuned": make_column(20, 60), "reference": make_column(25, 40)}
    judged, asked = make_column(12, 100), []

    def measure(column, n_texts, n_words):
        asked.append((n_texts, n_words))
        value = {id(columns["base"]): 1.0, id(columns["reference"]): 0.0}.get(id(column), 0.25)
        return dict.fromkeys(("delta", "unknown_words", "reader_auc"), Estimate(value, np.full(200, value)))

    book.measure = measure
    figures = judge_style(book, judged, columns)
    assert asked == [(12, 1000)] * 3
    assert figures["gap_closed"] == {"value": 0.75, "low": 0.75, "high": 0.75}
    assert figures["parts"].keys() == {"words", "spelling", "sense"}
    without = {name: columns[name] for name in ("base", "finetuned")}
    assert judge_style(book, judged, without)["gap_closed"] is None  # nobody to compare with


def test_the_token_between_books_is_no_word_of_theirs():
    tokenizer = SimpleNamespace(decode=lambda ids: "".join(map(chr, ids)), eos_token="\0")
    data = SimpleNamespace(ids=lambda _: [*map(ord, "Ada slept.\0Bram")])
    assert style.sample_book(data, tokenizer) == ("Ada slept.\nBram", True)


@pytest.mark.parametrize("lengths", [[5000], [30] * 200, [7, 3000, 30, 30, 2000, 1]], ids=["long", "short", "mixed"])
def test_a_sample_of_a_long_book_has_short_texts_too(monkeypatch, lengths):
    """Poems or letters, none as long as a window: there was nothing to join, and an error after all sampling."""
    monkeypatch.setattr(style, "BOOK_TOKENS", 1000)
    monkeypatch.setattr(style, "BOOK_WINDOW", 100)
    edges, train = np.cumsum([0, *lengths]).tolist(), np.arange(sum(lengths))
    spans = [(start, end, {}) for start, end in itertools.pairwise(edges)]
    data = SimpleNamespace(ids=lambda _: train, spans=lambda _: spans)
    ids, is_whole = style.sample_book(data, SimpleNamespace(decode=lambda ids: ids))
    assert is_whole is False
    assert 700 <= len(ids) <= 1000
    assert len(set(ids)) == len(ids)
    assert all(((start <= ids) & (ids < end)).any() for start, end, _ in spans if end - start >= 1000)
    assert ids.max() - ids.min() > 0.8 * len(train)  # spread over the book


def test_the_weakest_part_counts():
    shares = {name: {"value": value} for name, value in (("words", 0.9), ("spelling", 0.2), ("sense", 0.5))}
    assert weakest(shares) == {"value": 0.2}
    assert weakest({}) is None


def test_what_a_column_lacks():
    assert describe_lack(make_column(10, 150), 40) == ""
    need = "1,500 words in texts of 10 sources are needed, there are"
    assert describe_lack(make_column(10, 149), 40) == f"{need} 1,490 words of 10"
    assert describe_lack(make_column(9, 500), 40) == f"{need} 4,500 words of 9"


def test_texts_much_shorter_than_a_sample_are_named():
    """The author's own pages in pieces of 15 tokens had an AUC of 1.00: their length alone tells them."""
    column = make_column(10, 150)
    assert describe_lack(column, 80) == ""
    assert describe_lack(column, 81) == "texts of 40 tokens would be told from windows of 81 by their length alone"
