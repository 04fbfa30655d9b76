"""Style in three parts: words (Delta), spelling (unknown words) and sense (the reader), for every column alike.

How far a column has come on the way from the base model to the author is measured by each part; the weakest counts.
"""

import functools
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from utils.data.blocks import Blocks, pick_evenly
from utils.evaluation import stylometry
from utils.evaluation.bootstrap import Estimate, measure_gap_closed
from utils.evaluation.columns import N_WINDOWS, Column
from utils.evaluation.reader import RUNS, Familiarity, measure_auc

PARTS = {"words": "delta", "spelling": "unknown_words", "sense": "reader_auc"}
HIGHEST = {"unknown_words": 1, "reader_auc": 1}
MIN_TEXTS = 10  # of different groups, for a classifier
MIN_WINDOWS = RUNS  # of training text, as long as a sample
BOOK_TOKENS, BOOK_WINDOW = 2_000_000, 1000  # of a longer training text, pieces of this many tokens in all are read


def sample_book(data: Blocks, tokenizer) -> tuple[str, bool]:
    """Return the training text and whether it is whole; of a long one, pieces spread over it, short texts as such."""
    train = data.ids("train")
    if len(train) <= BOOK_TOKENS:
        return tokenizer.decode(train).replace(tokenizer.eos_token, "\n"), True  # between books; no word of theirs
    edges = [
        (i, min(i + BOOK_WINDOW, end)) for start, end, _ in data.spans("train") for i in range(start, end, BOOK_WINDOW)
    ]
    chosen = [train[start:end] for start, end in pick_evenly(edges, len(edges) * BOOK_TOKENS // len(train))]
    return tokenizer.decode(np.concatenate(chosen)[:BOOK_TOKENS]), False


def describe_lack(column: Column, length: int) -> str:
    """Say why the style of texts cannot be compared with that of windows of `length` tokens; "" if it can."""
    n_groups, usual = len(set(column.groups)), int(np.median([len(ids) for ids in column.ids] or [0]))
    if column.n_words < stylometry.MIN_WORDS or n_groups < MIN_TEXTS:
        need = f"{stylometry.MIN_WORDS:,} words in texts of {MIN_TEXTS} sources are needed"
        return f"{need}, there are {column.n_words:,} words of {n_groups}"
    if 2 * usual < length:
        return f"texts of {usual} tokens would be told from windows of {length} by their length alone"
    return ""


class BookMeasures:
    """The training text as the three parts see it, to measure columns against."""

    def __init__(
        self, data: Blocks, tokenizer, book: str, is_whole: bool, control: str, length: int, read: Callable, seed: int
    ) -> None:
        """Read windows of the training text.

        Args:
            book: the training text, or a sample of it.
            length: tokens per window, as in a sample.
            read: returns the reader's features of texts.
        """
        words, general = stylometry.split_terms(book), set(stylometry.split_terms(control))
        self.profile = stylometry.build_word_profile(book, control)
        self.known = general.union(words)
        self.familiarity = Familiarity(data.ids("train"), words, is_whole, general, tokenizer)
        self.read, self.seed = read, seed
        starts = data.window_starts("train", length, N_WINDOWS)
        windows = tokenizer.batch_decode([data.ids("train")[start : start + length] for start in starts])
        self.numbers = {window: number for number, window in enumerate(windows)}
        self.features = [*read(windows), self.familiarity.measure(windows, starts, length)]
        self.measure_auc, self.read_column = functools.cache(self._measure_auc), functools.cache(self._read_column)

    def seed_of(self, column: Column) -> int:
        """Return a seed of the column's own: draws of two columns must not move together."""
        return (self.seed + zlib.crc32(column.name.encode())) % 2**32

    def _measure_auc(self, column: Column, n_texts: int) -> Estimate:
        features, groups = self.read_column(column)
        return measure_auc(self.features, features, groups, min(n_texts, len(groups)), self.seed_of(column))

    def _read_column(self, column: Column) -> tuple[list[np.ndarray], np.ndarray]:
        """Return the reader's features and the groups of a column, of no more texts than there may be windows."""
        chosen = pick_evenly(range(len(column.texts)), N_WINDOWS)
        texts = [column.texts[i] for i in chosen]
        groups = [self.numbers.get(text, len(self.features[0]) + column.groups[i])  # a copy stays with its original
                  for i, text in zip(chosen, texts, strict=True)]  # fmt: skip
        return [*self.read(texts), self.familiarity.measure(texts)], np.array(groups)

    def measure(self, column: Column, n_texts: int, n_terms: int) -> dict[str, Estimate]:
        """Return delta, cosine_delta, unknown_words and reader_auc of a column."""
        seed = self.seed_of(column)
        delta = stylometry.measure_delta(column.terms, self.profile, n_terms, seed, column.groups)
        unknown = stylometry.measure_unknown(column.terms, self.known, seed, column.groups)
        return delta | {"unknown_words": unknown, "reader_auc": self.measure_auc(column, n_texts)}

    def compare(self, column: Column, columns: dict[str, Column]) -> tuple[dict[str, dict], dict[str, dict]]:
        """Return the measures of a column and, by part, the gap closed, with as many texts and words as all columns.

        A part whose gap from base to reference does not exceed its noise is left out.
        """
        beside = [*columns.values(), column]
        size = min(len(c.texts) for c in beside), min(c.n_terms for c in beside)
        own, shares = self.measure(column, *size), {}
        if "reference" in columns:
            base, reference = (self.measure(columns[name], *size) for name in ("base", "reference"))
            shares = {part: measure_gap_closed(own[key], base[key], reference[key]) for part, key in PARTS.items()}
        intervals = {key: estimate.interval(0, HIGHEST.get(key, np.inf)) for key, estimate in own.items()}
        return intervals, {part: share for part, share in shares.items() if share}


def weakest(shares: dict[str, dict]) -> dict[str, float] | None:
    """Return the least of the parts' shares of the gap; None without any."""
    return min(shares.values(), key=lambda share: share["value"], default=None)


def compare_style(book: BookMeasures, columns: dict[str, Column]) -> dict[str, Any]:
    """Measure base, fine-tuned model and, if there is validation text, reference: fields of the report."""
    measured = {name: book.compare(column, columns) for name, column in columns.items()}
    fields: dict[str, Any] = {"intervals": {}, "words": stylometry.tabulate_words(
        book.profile, {name: column.terms for name, column in columns.items()})}  # fmt: skip
    for key in measured["base"][0]:
        figures = {name: intervals[key] for name, (intervals, _) in measured.items()}
        fields[key] = {name: figure["value"] for name, figure in figures.items()}
        fields["intervals"][key] = {name: [figure["low"], figure["high"]] for name, figure in figures.items()}
    return fields | {
        "reader_auc": {name: intervals["reader_auc"] for name, (intervals, _) in measured.items()},
        "parts": {name: shares for name, (_, shares) in measured.items()},
        "gap_closed": {name: weakest(shares) for name, (_, shares) in measured.items()},
        "words_compared": min(column.n_words for column in columns.values()),
        "texts_compared": min(len(column.texts) for column in columns.values()),
    }  # fmt: skip


def judge_style(book: BookMeasures, column: Column, columns: dict[str, Column]) -> dict[str, Any]:
    """Measure texts from elsewhere in the place of the fine-tuned model's."""
    intervals, shares = book.compare(column, columns)
    return {
        "unknown_words": intervals["unknown_words"]["value"], "delta": intervals["delta"],
        "reader_auc": intervals["reader_auc"], "parts": shares, "gap_closed": weakest(shares),
    }  # fmt: skip
