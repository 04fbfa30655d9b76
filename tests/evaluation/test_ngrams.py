"""Copying equals brute force that shares no code with it, loops equal hand counts."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.evaluation import ngrams
from utils.evaluation.ngrams import (
    NOT_FOUND,
    NgramIndex,
    ends_in_loop,
    find_ngrams,
    hash_ngrams,
    longest_overlap,
    mark_overlap,
    mark_sources,
    measure_quarters,
    measure_repetition,
    ngram_overlap,
    trace_spans,
)

LENGTHS = (1, 2, 5, 8, 16, 32)


def array(ids, dtype=np.int64):
    return np.array(ids, dtype)


def first_place(run, train):
    """Return where a tuple stands first in another, or -1."""
    for place in range(len(train) - len(run) + 1):
        if train[place : place + len(run)] == run:
            return place
    return -1


def mark_copied(text, train, length):
    """Mark, token by token, what lies in a run of training."""
    mask = [False] * len(text)
    for start in range(len(text) - length + 1):
        if first_place(text[start : start + length], train) >= 0:
            for i in range(start, start + length):
                mask[i] = True
    return mask


def longest_shared(text, train):
    """Return the tokens of the longest run in both, by the lengths of all common endings."""
    best, before = 0, [0] * (len(train) + 1)
    for token in text:
        now = [0] * (len(train) + 1)
        for place, other in enumerate(train):
            if token == other:
                now[place + 1] = before[place] + 1
                best = max(best, now[place + 1])
        before = now
    return best


def followers(run, train):
    """Return, in order, the tokens that stand after a run."""
    ends = range(len(run), len(train))
    return sorted({train[end] for end in ends if train[end - len(run) : end] == run})


@st.composite
def corpora(draw):
    """Draw training and up to three texts, made of its parts and of noise; any of them may be empty."""
    rng = random.Random(draw(st.integers(0, 1 << 32)))
    highest = draw(st.sampled_from([0, 1, 1, 3, 50_000]))

    def noise(most):
        return [rng.randint(0, highest) for _ in range(rng.randint(0, most))]

    train = noise(draw(st.sampled_from([0, 10, 90])))
    if draw(st.booleans()):
        train += train[: rng.randint(0, 40)]  # it repeats itself, so a run has a first place and others
    texts = []
    for _ in range(draw(st.integers(0, 3))):
        text = noise(9)
        for _ in range(rng.randint(0, 2)):
            start = rng.randint(0, len(train))
            text += train[start : start + rng.randint(0, 40)] + noise(9)
        texts.append(tuple(text))
    return tuple(train), texts


@settings(max_examples=60, deadline=None)
@given(corpus=corpora(), length=st.sampled_from(LENGTHS))
def test_copied_tokens_equal_a_brute_force_scan(corpus, length):
    train, texts = corpus
    masks = mark_overlap([array(text) for text in texts], array(train), length)
    assert [mask.tolist() for mask in masks] == [mark_copied(text, train, length) for text in texts]


@settings(max_examples=60, deadline=None)
@given(corpus=corpora(), length=st.sampled_from(LENGTHS))
def test_sources_equal_a_brute_force_scan(corpus, length):
    """Every place of training counts, not only the first, but none that only two texts together have."""
    train, texts = corpus
    masks = [[False] * len(train), *(mark_copied(train, text, length) for text in texts)]
    marked = mark_sources([array(text) for text in texts], array(train, np.uint16), length)
    assert marked.tolist() == [any(marks) for marks in zip(*masks, strict=True)]


@settings(max_examples=50, deadline=None)
@given(corpus=corpora())
def test_copy_rates_equal_a_brute_force_scan(corpus):
    train, texts = corpus
    total = sum(len(text) for text in texts)
    expected = {
        str(n): sum(sum(mark_copied(text, train, n)) for text in texts) / total if total else None for n in (8, 16, 32)
    }
    assert ngram_overlap([array(text) for text in texts], array(train, np.uint16)) == expected


@settings(max_examples=60, deadline=None)
@given(corpus=corpora(), length=st.sampled_from(LENGTHS), chunk=st.sampled_from([1, 7, 1 << 20]))
def test_the_first_position_is_found(corpus, length, chunk):
    train, texts = corpus
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngrams, "CHUNK", chunk)
        found = find_ngrams([array(text) for text in texts], array(train, np.uint16), length)
    assert len(found) == len(texts)
    for text, places in zip(texts, found, strict=True):
        runs = [text[start : start + length] for start in range(len(text) - length + 1)]
        assert places.tolist() == [first_place(run, train) for run in runs]


def test_an_ngram_does_not_cross_two_texts():
    train = array(range(100, 140))
    apart = [train[:7], train[7:12], train[12:19]]
    assert ngram_overlap(apart, train) == {"8": 0.0, "16": 0.0, "32": 0.0}
    assert longest_overlap(apart, train)[0] == 7
    joined = ngram_overlap([np.concatenate(apart)], train)
    assert joined == {"8": 1.0, "16": 1.0, "32": 0.0}


@settings(max_examples=60, deadline=None)
@given(corpus=corpora())
def test_the_longest_span_is_the_longest(corpus):
    train, texts = corpus
    tokens, place = longest_overlap([array(text) for text in texts], array(train, np.uint16))
    assert tokens == max((longest_shared(text, train) for text in texts), default=0)
    if tokens:
        run = train[place : place + tokens]
        assert len(run) == tokens
        assert any(first_place(run, text) >= 0 for text in texts)
        assert place == first_place(run, train)
    else:
        assert place == 0


@settings(max_examples=60, deadline=None)
@given(corpus=corpora(), length=st.sampled_from(LENGTHS))
def test_spans_equal_training_and_cover_what_is_copied(corpus, length):
    train, texts = corpus
    for text in texts:
        covered, starts, ends = [False] * len(text), [-1], [0]
        for start, end, place in trace_spans(array(text), array(train, np.uint16), length):
            assert start > starts[-1]
            assert end > ends[-1]  # each adds something to what those before it cover
            assert end - start >= length
            assert 0 <= place <= len(train) - (end - start)
            assert text[start:end] == train[place : place + end - start]
            covered[start:end] = [True] * (end - start)
            starts.append(start)
            ends.append(end)
        assert covered == mark_copied(text, train, length)


def test_a_copied_segment_is_one_span():
    train = array(range(200))
    text = np.concatenate([[900], train[20:60], [901, 902], train[150:157], train[3:11], train[190:]])
    assert trace_spans(text, train, 8) == [(1, 41, 20), (50, 58, 3), (58, 68, 190)]
    # One place ends inside the run that goes on from another.
    assert trace_spans(array([1, 2, 3, 4, 5, 6, 7, 8]), array([1, 2, 3, 4, 5, 0, 3, 4, 5, 6, 7, 8]), 4) == [
        (0, 5, 0), (2, 8, 6),
    ]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(corpus=corpora(), length=st.sampled_from([1, 2, 5, 8]))
def test_what_follows_an_ngram_equals_brute_force(corpus, length):
    train, texts = corpus
    index = NgramIndex(array(train, np.uint16), length)
    for text in (*texts, train):  # the end of training has nothing after it
        for start in range(len(text) - length + 1):
            run = text[start : start + length]
            assert index.following(array(run)).tolist() == followers(run, train)


@settings(max_examples=40, deadline=None)
@given(corpus=corpora(), length=st.sampled_from(LENGTHS), shift=st.integers(0, 3_000))
def test_an_ngram_has_one_hash_at_any_position(corpus, length, shift):
    train, _ = corpus
    runs = [train[start : start + length] for start in range(len(train) - length + 1)]
    alone = [int(hash_ngrams(array(run, np.uint16), length)[0]) for run in runs]
    later = hash_ngrams(array([7] * shift + list(train), np.uint32), length)
    assert later.dtype == np.uint64
    assert later[shift : shift + len(runs)].tolist() == hash_ngrams(array(train), length).tolist() == alone
    assert len(set(alone)) == len(set(runs))


def test_planted_copies_are_measured():
    """40 % of 100,000 tokens are runs of 40 out of a book of 1 MB."""
    rng = np.random.default_rng(0)
    train = rng.integers(0, 50_000, 300_000).astype(np.uint16)
    texts = list(rng.integers(0, 50_000, (50, 2_000)))
    for text in texts:
        for start in range(0, 2_000, 100):
            place = rng.integers(0, len(train) - 40)
            text[start + 30 : start + 70] = train[place : place + 40]
    rates = ngram_overlap(texts, train)
    assert rates["8"] == pytest.approx(0.40, abs=0.01)
    assert rates["16"] == pytest.approx(0.40, abs=0.01)
    assert rates["32"] == pytest.approx(0.40, abs=0.01)
    assert ngram_overlap([text[:69] for text in texts], train)["32"] == pytest.approx(39 / 69, abs=0.01)
    assert ngram_overlap([text[:61] for text in texts], train)["32"] == 0  # 31 tokens are no run of 32


def test_empty_texts_and_short_training():
    none, some = array([]), array([1, 2, 3])
    assert ngram_overlap([], some) == ngram_overlap([none, none], some) == {"8": None, "16": None, "32": None}
    assert ngram_overlap([array([1, 2, 3] * 4)], some) == {"8": 0.0, "16": 0.0, "32": 0.0}
    assert ngram_overlap([array(range(40)), none], none) == {"8": 0.0, "16": 0.0, "32": 0.0}
    assert [places.tolist() for places in find_ngrams([some, none, array([5, 1, 2, 3])], some, 3)] == [[0], [], [-1, 0]]
    assert find_ngrams([], some, 2) == []
    assert find_ngrams([some], none, 2)[0].tolist() == [NOT_FOUND] * 2
    assert [mask.tolist() for mask in mark_overlap([none, some], some, 8)] == [[], [False] * 3]
    assert longest_overlap([], some) == longest_overlap([none], some) == longest_overlap([some], none) == (0, 0)
    assert longest_overlap([none, array([9, 2, 3])], some) == (2, 1)
    assert trace_spans(none, some, 2) == trace_spans(some, none, 2) == []
    for train in (none, array([1]), some):  # three tokens are one run of three, with nothing after it
        assert NgramIndex(train, 3).following(some).tolist() == []
    assert len(hash_ngrams(some, 4)) == len(hash_ngrams(none, 1)) == 0


def test_repetition_by_hand():
    # 1234 2341 3412 4123 1234 2341: two of six stood before. 5 of 11 tokens, 12 23 34 41 55 of 9 pairs.
    assert measure_repetition([[1, 2, 3, 4, 1, 2, 3, 4, 1], [5, 5]]) == {
        "repeated_4grams": 2 / 6, "distinct_1": 5 / 11, "distinct_2": 5 / 9, "loops": 0.0,
    }  # fmt: skip
    # A text does not repeat another one; all texts together have few different tokens.
    assert measure_repetition([[1, 2, 3, 4], [1, 2, 3, 4]]) == {
        "repeated_4grams": 0.0, "distinct_1": 4 / 8, "distinct_2": 3 / 6, "loops": 0.0,
    }  # fmt: skip
    # 13 times 7: of 10 runs 9 stood before.
    assert measure_repetition([[7] * 13, [1, 2, 3], []]) == {
        "repeated_4grams": 9 / 10, "distinct_1": 4 / 16, "distinct_2": 3 / 14, "loops": 1 / 3,
    }  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(corpus=corpora())
def test_quarters_equal_a_brute_force_scan(corpus):
    train, texts = corpus
    found = measure_quarters([array(text) for text in texts], array(train))
    masks = [mark_copied(text, train, 8) for text in texts]
    for quarter in range(4):
        spans = [(len(text) * quarter // 4, len(text) * (quarter + 1) // 4) for text in texts]
        marks = [mark for mask, (a, b) in zip(masks, spans, strict=True) for mark in mask[a:b]]
        assert found["tokens"][quarter] == len(marks)
        assert found["copy_rate"][quarter] == (pytest.approx(sum(marks) / len(marks)) if marks else None)
        parts = [list(text[a:b]) for text, (a, b) in zip(texts, spans, strict=True)]
        assert found["repeated_4grams"][quarter] == measure_repetition(parts)["repeated_4grams"]
    assert sum(found["tokens"]) == sum(map(len, texts))


def test_quarters_by_hand():
    """A text of 40 tokens whose last quarter repeats one pair, after a copy of 8 tokens in the second."""
    text = array([*range(100, 112), *range(8), *range(120, 130), *[7, 8] * 5])
    found = measure_quarters([text], array(range(50)))
    assert found == {"tokens": [10] * 4, "copy_rate": [0.0, 0.8, 0.0, 0.0], "repeated_4grams": [0.0, 0.0, 0.0, 5 / 7]}
    nothing = [None] * 4
    assert measure_quarters([], text) == {"tokens": [0] * 4, "copy_rate": nothing, "repeated_4grams": nothing}


def test_repetition_of_nothing():
    nothing = {"repeated_4grams": None, "distinct_1": None, "distinct_2": None}
    assert measure_repetition([]) == {**nothing, "loops": None}
    assert measure_repetition([[], []]) == {**nothing, "loops": 0.0}
    assert measure_repetition([[1], [2, 3, 2]]) == {
        "repeated_4grams": None, "distinct_1": 3 / 4, "distinct_2": 1.0, "loops": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("ids", "loops"),
    [
        ([7] * 12, True),
        ([7] * 11, False),
        ([9] + [7] * 11, False),
        ([7] * 20 + [8], False),  # it found out again
        ([1, 2] * 6, True),
        ([1, 2] * 5 + [1], False),
        ([2] + [1, 2] * 6, True),
        ([9] + [2] + [1, 2] * 5, False),  # 11 tokens of period 2
        ([1, 2, 3, 4] * 3, True),
        ([9, 2, 3, 4] + [1, 2, 3, 4] * 2, False),
        ([1, 2, 3, 4, 5] * 3, True),
        ([1, 2, 3, 4, 5] * 3 + [1, 2], True),  # the loop is cut off in its middle
        ([8, 8] + [1, 2, 3, 4, 5] * 3, True),
        ([9, 2, 3, 4, 5] + [1, 2, 3, 4, 5] * 2, False),
        ([1, 2, 3] * 2 + [1, 9, 3] + [1, 2, 3] * 2, False),
        ([1, 9, 3] + [1, 2, 3] * 4, True),
        (list(range(30)) * 3, True),
        (list(range(30)) * 2, False),
        (list(range(30)) * 2 + list(range(29)), False),
        ([], False),
        ([1, 1, 1], False),
    ],
)
def test_loops_by_hand(ids, loops):
    assert ends_in_loop(ids) is loops


@settings(max_examples=150, deadline=None)
@given(
    noise=st.lists(st.integers(0, 2), max_size=5),
    pattern=st.lists(st.integers(0, 2), min_size=1, max_size=7),
    times=st.integers(1, 13),
    rest=st.lists(st.integers(0, 2), max_size=2),
)
def test_loops_equal_brute_force(noise, pattern, times, rest):
    ids = noise + pattern * times + rest
    found = False
    for period in range(1, len(ids) + 1):
        alike = 0  # tokens from the end on that equal the one a period before, or are the first period
        while alike + period < len(ids) and ids[-1 - alike] == ids[-1 - alike - period]:
            alike += 1
        found = found or (alike + period >= 12 and alike + period >= 3 * period)
    assert ends_in_loop(ids) == found
