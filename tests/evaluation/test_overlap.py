"""Leakage: what validation shares with training equals a brute-force count, and hashes tell n-grams apart."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.evaluation import ngrams
from utils.evaluation.ngrams import hash_ngrams, measure_leakage


def count_overlap(train, validation, run):
    """Count as measure_leakage does, by comparing tuples."""
    runs = [tuple(train[i : i + run]) for i in range(len(train) - run + 1)]
    validation = [tuple(validation[i : i + run]) for i in range(len(validation) - run + 1)]
    return {
        "validation_ngrams": len(validation),
        "leaked_ngrams": sum(r in set(runs) for r in validation),
        "repeated_share": round(1 - len(set(runs)) / len(runs), 6) if runs else 0.0,
    }


@st.composite
def token_streams(draw):
    """Draw two streams over a small vocabulary, with parts of one planted in the other and in itself."""
    ids = st.lists(st.integers(0, draw(st.sampled_from([1, 3, 60_000]))), max_size=60)
    train, validation = draw(ids), draw(ids)
    for _ in range(draw(st.integers(0, 3))):
        a, length = draw(st.integers(0, 50)), draw(st.integers(1, 12))
        source, target = draw(st.sampled_from([(train, validation), (train, train), (validation, validation)]))
        place = draw(st.integers(0, len(target)))
        target[place:place] = source[a : a + length]
    return train, validation


@settings(max_examples=150, deadline=None)
@given(streams=token_streams(), run=st.integers(1, 6), chunk=st.sampled_from([1, 2, 7, 1 << 20]))
def test_overlap_equals_a_brute_force_count(streams, run, chunk):
    train, validation = (np.array(ids, np.uint16) for ids in streams)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngrams, "OVERLAP_TOKENS", run)
        patch.setattr(ngrams, "CHUNK", chunk)
        found = measure_leakage(train, validation)
    assert found == count_overlap(train.tolist(), validation.tolist(), run)


def test_overlap_of_32_token_ngrams(monkeypatch):
    rng = np.random.default_rng(0)
    train = rng.integers(0, 500, 4_000).astype(np.uint16)
    validation = rng.integers(0, 500, 900).astype(np.uint16)
    validation[100:140] = train[3_960:]  # the last 40: 9 runs of 32
    validation[500:531] = train[:31]  # one token short of a run
    train[2_000:2_040] = train[50:90]
    monkeypatch.setattr(ngrams, "CHUNK", 100)
    found = measure_leakage(train, validation)
    assert found == count_overlap(train.tolist(), validation.tolist(), 32)
    assert (found["leaked_ngrams"], found["validation_ngrams"]) == (9, 869)
    assert found["repeated_share"] == round(9 / 3_969, 6)


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 2), max_size=80), run=st.integers(1, 5))
def test_two_ngrams_have_one_hash_if_and_only_if_they_are_equal(ids, run):
    hashes = hash_ngrams(np.array(ids, np.uint16), run).tolist()
    runs = [tuple(ids[i : i + run]) for i in range(len(ids) - run + 1)]
    assert len(hashes) == len(runs)
    assert len(set(zip(hashes, runs, strict=True))) == len(set(hashes)) == len(set(runs))
