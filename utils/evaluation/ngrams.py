"""Copying: runs of tokens that stand in two places, and loops within one text.

A run is a sequence of tokens that stands verbatim elsewhere too. Runs are found by a 64-bit hash, so the
cost does not grow with their length. Knows token ids only; what a place means to a reader is utils/data/blocks.py's.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

NGRAM_LENGTHS = (8, 16, 32)
OVERLAP_TOKENS = 32  # a run of so many tokens in training and validation is no coincidence
NOT_FOUND = -1
CHUNK = 1 << 20  # training tokens hashed at once: memory stays bounded, however large the corpus is
FACTOR = 0xBF58476D1CE4E5B9


def hash_ngrams(ids: np.ndarray, length: int) -> np.ndarray:
    """Hash every run of `length` tokens to 64 bits: a polynomial in FACTOR modulo 2^64.

    Args:
        ids: (N,) token ids.
        length: tokens a run.
    Returns:
        (N - length + 1,) uint64, or empty. Equal runs have equal hashes, wherever they stand.
    """
    n_ngrams = len(ids) - length + 1
    if n_ngrams < 1:
        return np.zeros(0, np.uint64)
    mixed = (np.asarray(ids).astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    # Sums of powers up to each token; the difference of two, divided by the power it begins with, is a run's.
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed * _powers(FACTOR, len(mixed)))])
    hashes = (sums[length:] - sums[:n_ngrams]) * _powers(pow(FACTOR, -1, 1 << 64), n_ngrams)
    return hashes ^ (hashes >> np.uint64(31))


def _powers(factor: int, count: int) -> np.ndarray:
    powers = np.full(count, factor, np.uint64)
    powers[0] = 1
    return np.multiply.accumulate(powers)


def find_ngrams(texts: Iterable[np.ndarray], train: np.ndarray, length: int) -> list[np.ndarray]:
    """Look every run of the texts up in training.

    Args:
        texts: token ids of each text; a run never reaches from one into the next.
        train: (N,) token ids.
        length: tokens a run.
    Returns:
        For each text (n_ngrams,) int64: the first place in train where the run stands, or NOT_FOUND.
    """
    hashed = [hash_ngrams(text, length) for text in texts]
    wanted, inverse = np.unique(np.concatenate([np.zeros(0, np.uint64), *hashed]), return_inverse=True)
    first = np.full(len(wanted), NOT_FOUND)
    for start in range(0, len(train) - length + 1 if len(wanted) else 0, CHUNK):
        hashes = hash_ngrams(train[start : start + CHUNK + length - 1], length)
        place = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
        hits = np.flatnonzero(wanted[place] == hashes)[::-1]  # the last one written is the first in the text
        found = np.full(len(wanted), NOT_FOUND)
        found[place[hits]] = hits + start
        first = np.where(first == NOT_FOUND, found, first)
    ends = np.cumsum([len(hashes) for hashes in hashed])
    return np.split(first[inverse], ends[:-1]) if hashed else []


def mark_overlap(texts: list[np.ndarray], train: np.ndarray, length: int) -> list[np.ndarray]:
    """Mark the tokens that lie in a run of at least `length` tokens of training.

    Returns:
        For each text a bool array of its length.
    """
    masks = []
    for text, places in zip(texts, find_ngrams(texts, train, length), strict=True):
        borders = np.zeros(len(text) + 1, np.int64)
        starts = np.flatnonzero(places != NOT_FOUND)
        np.add.at(borders, starts, 1)
        np.add.at(borders, starts + length, -1)
        masks.append(np.cumsum(borders)[: len(text)] > 0)
    return masks


def ngram_overlap(texts: list[np.ndarray], train: np.ndarray) -> dict[str, float | None]:
    """Return the share of tokens that lie in a verbatim run of training, by least length of the run.

    Returns:
        {"8": share, "16": share, "32": share}; None where there are no tokens.
    Source: equals a brute-force scan; tests/evaluation/test_ngrams.py.
    """
    total, rates = sum(map(len, texts)), {}
    for length in NGRAM_LENGTHS:
        copied = sum(int(mask.sum()) for mask in mark_overlap(texts, train, length))
        rates[str(length)] = copied / total if total else None
    return rates


def longest_overlap(texts: list[np.ndarray], train: np.ndarray) -> tuple[int, int, int, int]:
    """Find the longest run that a text shares with training.

    Returns:
        Its tokens, the text's number, its start in that text, its first place in train; zeros for none.
    """
    best, low, high = (0, 0, 0, 0), 1, max(map(len, texts), default=0)
    while low <= high:  # every part of a run is one too, so halving finds the greatest length
        length = (low + high) // 2
        hits = ((number, places) for number, places in enumerate(find_ngrams(texts, train, length)))
        number, places = next(((n, p) for n, p in hits if (p != NOT_FOUND).any()), (0, None))
        if places is None:
            high = length - 1
        else:
            start = int(np.argmax(places != NOT_FOUND))
            best, low = (length, number, start, int(places[start])), length + 1
    return best


def trace_spans(text: np.ndarray, train: np.ndarray, length: int) -> list[tuple[int, int, int]]:
    """List the runs of at least `length` tokens that cover all that a text copies.

    Returns:
        (start, end, place) of each, in order, where text[start:end] equals train[place:place + end - start]. Two may
        overlap: a text can go on from one place of the book to another.
    """
    runs, covered = [], 0
    for start in np.flatnonzero((places := find_ngrams([text], train, length)[0]) != NOT_FOUND).tolist():
        place, end = int(places[start]), start + length
        while end < len(text) and place + end - start < len(train) and text[end] == train[place + end - start]:
            end += 1
        if end > covered:
            runs.append((start, end, place))
            covered = end
    return runs


class NgramIndex:
    """What follows each run of `length` training tokens.

    Args:
        train: (N,) token ids.
        length: tokens a run.
    """

    def __init__(self, train: np.ndarray, length: int) -> None:
        self.train, self.length = train, length
        hashes = hash_ngrams(train[:-1], length)  # the last run has nothing after it
        self.places = np.argsort(hashes, kind="stable")
        self.hashes = hashes[self.places]

    def following(self, run: np.ndarray) -> np.ndarray:
        """Return the tokens that come after a run of exactly `length` tokens somewhere in training."""
        wanted = hash_ngrams(run, self.length)[0]
        low, high = np.searchsorted(self.hashes, wanted), np.searchsorted(self.hashes, wanted, side="right")
        return np.unique(self.train[self.places[low:high] + self.length])


def measure_leakage(train: np.ndarray, validation: np.ndarray) -> dict[str, Any]:
    """Count the runs of validation that also stand in training, and how far training repeats itself.

    Args:
        train, validation: (N,) token ids.
    Returns:
        validation_ngrams and leaked_ngrams (counts of runs of OVERLAP_TOKENS tokens), repeated_share (share of
        training runs that stood before; measured on a sample of run values in a large corpus).
    """
    places = find_ngrams([validation], train, OVERLAP_TOKENS)[0]
    seen = sample_ngrams(train, keep_one_in(len(train)))
    repeated = np.count_nonzero(seen[1:] == seen[:-1]) / len(seen) if len(seen) else 0.0
    return {
        "validation_ngrams": len(places),
        "leaked_ngrams": int((places != NOT_FOUND).sum()),
        "repeated_share": round(repeated, 6),
    }


def keep_one_in(n_tokens: int) -> int:
    """Return which share of a text's runs is enough to know it by: all of them up to eight million."""
    return 1 + n_tokens // (1 << 23)


def sample_ngrams(ids: np.ndarray, one_in: int) -> np.ndarray:
    """Return the sorted hashes of the runs of OVERLAP_TOKENS tokens whose hash is a multiple of `one_in`.

    Chosen by the hash itself, all copies of a run are in the sample or none: shares stay unbiased.
    """
    kept = [np.zeros(0, np.uint64)]
    for start in range(0, len(ids) - OVERLAP_TOKENS + 1, CHUNK):
        hashes = hash_ngrams(ids[start : start + CHUNK + OVERLAP_TOKENS - 1], OVERLAP_TOKENS)
        kept.append(hashes[hashes % np.uint64(one_in) == 0])
    return np.sort(np.concatenate(kept))  # np.unique hashes: 60 times slower


def measure_repetition(texts: list[list[int]]) -> dict[str, float | None]:
    """Measure how far texts repeat themselves.

    Args:
        texts: token ids of each.
    Returns:
        repeated_4grams (share of a text's 4-token runs that stood before in it), distinct_1 and distinct_2
        (different ones among all single tokens and pairs), loops (share of texts that end in a loop).
    Source: distinct-n is Li et al. 2016; repeated n-grams Welleck et al. 2020.
    """
    grams = {n: [list(zip(*(text[i:] for i in range(n)), strict=False)) for text in texts] for n in (1, 2, 4)}

    def distinct(n):
        every = [gram for text in grams[n] for gram in text]
        return len(set(every)) / len(every) if every else None

    n_ngrams = sum(map(len, grams[4]))
    again = sum(len(text) - len(set(text)) for text in grams[4])
    return {
        "repeated_4grams": again / n_ngrams if n_ngrams else None,
        "distinct_1": distinct(1),
        "distinct_2": distinct(2),
        "loops": sum(map(ends_in_loop, texts)) / len(texts) if texts else None,
    }


def ends_in_loop(ids: list[int], least: int = 12, times: int = 3) -> bool:
    """Say whether a text ends in the same tokens at least `times` over, `least` tokens in all."""
    for period in range(1, len(ids) // times + 1):
        tail = max(least, times * period)
        if tail <= len(ids) and ids[-tail:-period] == ids[-tail + period :]:
            return True
    return False
