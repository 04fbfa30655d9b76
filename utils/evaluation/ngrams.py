"""N-grams of token ids: overlap with training text, leakage, and repetition within a text.

N-grams are found by a 64-bit hash, so the cost does not grow with their length.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from utils.data.workers import open_workers

NGRAM_LENGTHS = (8, 16, 32)
OVERLAP_TOKENS = 32  # an n-gram of this length in training and validation is no coincidence
NOT_FOUND = -1
CHUNK = 1 << 20  # training tokens hashed at once, to bound the memory
FACTOR = 0xBF58476D1CE4E5B9


def hash_ngrams(ids: np.ndarray, length: int) -> np.ndarray:
    """Hash every n-gram of (N,) token ids to 64 bits: a polynomial in FACTOR modulo 2^64, (N - length + 1,)."""
    n_ngrams = len(ids) - length + 1
    if n_ngrams < 1:
        return np.zeros(0, np.uint64)
    mixed = (np.asarray(ids).astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    # Sums of powers up to each token; the difference of two, divided by its first power, is an n-gram's.
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed * _powers(FACTOR, len(mixed)))])
    hashes = (sums[length:] - sums[:n_ngrams]) * _powers(pow(FACTOR, -1, 1 << 64), n_ngrams)
    return hashes ^ (hashes >> np.uint64(31))


def _powers(factor: int, count: int) -> np.ndarray:
    powers = np.full(count, factor, np.uint64)
    powers[0] = 1
    return np.multiply.accumulate(powers)


def find_ngrams(texts: Iterable[np.ndarray], train: np.ndarray, length: int) -> list[np.ndarray]:
    """Return for each text (n_ngrams,) int64: each n-gram's first position in (N,) training ids, or NOT_FOUND."""
    hashed = [hash_ngrams(text, length) for text in texts]
    wanted, inverse = np.unique(np.concatenate([np.zeros(0, np.uint64), *hashed]), return_inverse=True)
    first = np.full(len(wanted), NOT_FOUND)
    # From the end to the start: the position written last is the first in train.
    for start in reversed(range(0, len(train) - length + 1 if len(wanted) else 0, CHUNK)):
        hashes = hash_ngrams(train[start : start + CHUNK + length - 1], length)
        index = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
        hits = np.flatnonzero(wanted[index] == hashes)[::-1]
        first[index[hits]] = hits + start
    ends = np.cumsum([len(hashes) for hashes in hashed])
    return np.split(first[inverse], ends[:-1]) if hashed else []


def count_hashes(hashed: list[np.ndarray], train: np.ndarray, n: int) -> list[np.ndarray]:
    """Return for each text how often each of its hashed n-grams stands in (N,) training ids."""
    wanted, inverse = np.unique(np.concatenate(hashed), return_inverse=True)
    counts = np.zeros(len(wanted), np.int64)
    for start in range(0, len(train) - n + 1 if len(wanted) else 0, CHUNK):
        hashes = hash_ngrams(train[start : start + CHUNK + n - 1], n)
        index = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
        counts += np.bincount(index[wanted[index] == hashes], minlength=len(wanted))
    return np.split(counts[inverse], np.cumsum([len(hashes) for hashes in hashed])[:-1])


def mark_overlap(texts: list[np.ndarray], train: np.ndarray, length: int) -> list[np.ndarray]:
    """Mark the tokens that lie in an n-gram of training of `length` tokens; a bool array for each text."""
    found = find_ngrams(texts, train, length)
    return [_cover(text, positions != NOT_FOUND, length) for text, positions in zip(texts, found, strict=True)]


def _cover(text: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """Mark the tokens of a text that lie in n-grams of `length` tokens, from a mark for each n-gram."""
    # A token is covered by the n-grams that start at it and at the length - 1 tokens before it.
    return np.convolve(starts, np.ones(length)) > 0 if len(starts) else np.zeros(len(text), bool)


def mark_sources(texts: list[np.ndarray], train: np.ndarray, length: int) -> np.ndarray:
    """Mark the tokens of (N,) training ids that lie in an n-gram of a text, wherever it stands: (N,) bool."""
    edge = [int(train.max(initial=0)) + 1]  # a token that training does not have, so no n-gram crosses two texts
    joined = np.concatenate([np.zeros(0, np.int64), *(part for text in texts for part in (text, edge))])
    return mark_overlap([train], joined, length)[0]


def ngram_overlap(texts: list[np.ndarray], train: np.ndarray) -> dict[str, float | None]:
    """Return the share of tokens that lie in an n-gram of training: {"8": share, "16": share, "32": share}.

    Source: equals a brute-force scan; tests/evaluation/test_ngrams.py.
    """
    total, rates = sum(map(len, texts)), {}
    for length in NGRAM_LENGTHS:
        copied = sum(int(mask.sum()) for mask in mark_overlap(texts, train, length))
        rates[str(length)] = copied / total if total else None
    return rates


def longest_overlap(texts: list[np.ndarray], train: np.ndarray) -> tuple[int, int]:
    """Return length and first position in train of the longest span that a text shares with it; (0, 0) without one."""
    best, low, high = (0, 0), 1, max(map(len, texts), default=0)
    while low <= high:  # every part of a shared span is shared, so bisection finds the greatest length
        length = (low + high) // 2
        positions = np.concatenate(find_ngrams(texts, train, length))
        shared = positions[positions != NOT_FOUND]
        if len(shared):
            best, low = (length, int(shared[0])), length + 1
        else:
            high = length - 1
    return best


def trace_spans(text: np.ndarray, train: np.ndarray, length: int) -> list[tuple[int, int, int]]:
    """List (start, end, position) of the spans of at least `length` tokens that cover all a text shares with training.

    text[start:end] equals train[position : position + end - start]. Two may overlap where the text changes from one
    part of the training text to another.
    """
    spans, covered = [], 0
    positions = find_ngrams([text], train, length)[0]
    for start in np.flatnonzero(positions != NOT_FOUND).tolist():
        position, end = int(positions[start]), start + length
        while end < len(text) and position + end - start < len(train) and text[end] == train[position + end - start]:
            end += 1
        if end > covered:
            spans.append((start, end, position))
            covered = end
    return spans


class NgramIndex:
    """The n-grams of `length` tokens in (N,) training ids, and the tokens that follow each."""

    def __init__(self, train: np.ndarray, length: int) -> None:
        self.train, self.length = train, length
        hashes = hash_ngrams(train, length)
        self.positions = np.argsort(hashes, kind="stable")
        self.hashes = hashes[self.positions]

    def following(self, ngram: np.ndarray) -> np.ndarray:
        """Return the tokens that follow an n-gram anywhere in training."""
        wanted = hash_ngrams(ngram, self.length)[0]
        low, high = np.searchsorted(self.hashes, wanted), np.searchsorted(self.hashes, wanted, side="right")
        ends = self.positions[low:high] + self.length
        return np.unique(self.train[ends[ends < len(self.train)]])  # nothing follows the last n-gram

    def mark(self, text: np.ndarray) -> np.ndarray:
        """Mark the tokens of a text that lie in one of the n-grams, as mark_overlap does, without reading all again."""
        hashes = hash_ngrams(text, self.length)
        high, low = (np.searchsorted(self.hashes, hashes, side=side) for side in ("right", "left"))
        return _cover(text, high > low, self.length)


def measure_leakage(train: Sequence, validation: Sequence, n_workers: int = 0) -> dict[str, Any]:
    """Count validation's n-grams of OVERLAP_TOKENS tokens, those that training has too, and training's repetitions.

    Args:
        train, validation: token ids, (n_tokens,), of which slices are taken.
    Returns:
        validation_ngrams, leaked_ngrams and repeated_share, the share of training's n-grams that occurred before. Of
        a large corpus one n-gram in one_in is looked at: leaked_ngrams and repeated_share are estimates.
    """
    one_in = keep_one_in(max(len(train), len(validation)))
    seen, wanted = (sample_ngrams(ids, one_in, n_workers) for ids in (train, validation))
    n_ngrams = max(0, len(validation) - OVERLAP_TOKENS + 1)
    leaked = int(np.isin(wanted, seen).sum()) * n_ngrams // max(1, len(wanted))
    repeated = np.count_nonzero(seen[1:] == seen[:-1]) / len(seen) if len(seen) else 0.0
    found = {"validation_ngrams": n_ngrams, "leaked_ngrams": leaked, "repeated_share": round(repeated, 6)}
    return found | {"one_in": one_in} if one_in > 1 else found


def keep_one_in(n_tokens: int) -> int:
    """Return n where one in n of a text's n-grams is enough to recognize it: all of them up to eight million."""
    return 1 + n_tokens // (1 << 23)


def sample_ngrams(ids: Sequence, one_in: int, n_workers: int = 0) -> np.ndarray:
    """Return the sorted hashes of the n-grams of OVERLAP_TOKENS tokens whose hash is a multiple of `one_in`.

    All copies of an n-gram are in the sample or none, so shares are unbiased.
    """

    def sample_chunk(start: int) -> np.ndarray:
        hashes = hash_ngrams(ids[start : start + CHUNK + OVERLAP_TOKENS - 1], OVERLAP_TOKENS)
        return hashes[hashes % np.uint64(one_in) == 0]

    with open_workers(sample_chunk, n_workers if len(ids) > CHUNK else 0) as run:
        kept = [hashes for _, hashes in run(range(0, len(ids) - OVERLAP_TOKENS + 1, CHUNK))]
    return np.sort(np.concatenate([np.zeros(0, np.uint64), *kept]))  # np.unique hashes: 60 times slower


def measure_repetition(texts: list[list[int]]) -> dict[str, float | None]:
    """Measure repetition: the shares of 4-grams that occurred before in their text, and of texts that end in a loop.

    distinct_1 and distinct_2 are the shares of different ones among all tokens and all pairs of tokens.
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


def measure_quarters(texts: list[np.ndarray], train: np.ndarray) -> dict[str, list]:
    """Measure by position: tokens, copy_rate and repeated_4grams of each quarter of the texts, as lists of four.

    Copied are tokens in n-grams of 8 of training, repeated the 4-grams that occurred before in the same quarter of
    their text: counted from its start, more would be repeated at the end of any text.
    """
    masks, result = mark_overlap(texts, train, NGRAM_LENGTHS[0]), {"tokens": [], "copy_rate": [], "repeated_4grams": []}
    for quarter in range(4):
        parts = [slice(len(text) * quarter // 4, len(text) * (quarter + 1) // 4) for text in texts]
        copied = np.concatenate([np.zeros(0, bool), *(mask[part] for mask, part in zip(masks, parts, strict=True))])
        own = [text[part].tolist() for text, part in zip(texts, parts, strict=True)]
        result["tokens"].append(len(copied))
        result["copy_rate"].append(float(copied.mean()) if len(copied) else None)
        result["repeated_4grams"].append(measure_repetition(own)["repeated_4grams"])
    return result


def ends_in_loop(ids: list[int], least: int = 12, times: int = 3) -> bool:
    """Return whether a text ends in the same tokens at least `times` times, `least` tokens in all."""
    for period in range(1, len(ids) // times + 1):
        tail = max(least, times * period)
        if tail <= len(ids) and ids[-tail:-period] == ids[-tail + period :]:
            return True
    return False
