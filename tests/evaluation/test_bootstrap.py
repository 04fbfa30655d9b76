"""The bootstrap draws with replacement, and its intervals hold the true value as often as they say."""

import functools
import math

import numpy as np
import pytest
from test_stylometry import cut, split_all, write

from utils.evaluation import bootstrap, stylometry
from utils.evaluation.bootstrap import Estimate, center, measure_gap_closed, resample, resample_groups
from utils.evaluation.stylometry import build_word_profile, measure_delta, measure_unknown


def test_resampling_draws_with_replacement():
    drawn = resample(10, seed=1)
    assert drawn.shape == (bootstrap.ROUNDS, 10)
    assert (drawn.sum(axis=1) == 10).all()
    assert (drawn == 0).any(axis=1).mean() > 0.99  # 10! / 10^10 is the chance of all ten
    assert drawn.mean(axis=0) == pytest.approx(np.ones(10), abs=4 * math.sqrt(0.9 / bootstrap.ROUNDS))
    assert (drawn == resample(10, seed=1)).all()
    assert (drawn != resample(10, seed=2)).any()
    assert set(resample(10, seed=1, size=3).sum(axis=1)) == {3}


def test_interval_by_hand():
    draws = np.random.default_rng(0).permutation(np.arange(2_001) / 2_000)
    found = Estimate(0.3, draws).interval()
    assert found == pytest.approx({"value": 0.3, "low": 0.025, "high": 0.975})
    assert Estimate(0.3, draws).interval(0.1, 0.9) == pytest.approx({"value": 0.3, "low": 0.1, "high": 0.9})
    moved = center(3.5, draws, 10**6).interval()
    assert moved == pytest.approx({"value": 3.5, "low": 3.025, "high": 3.975}, abs=1e-5)  # the mean, 0.5, moves to 3.5
    few = center(3.5, draws, 8).interval()
    assert few["high"] - 3.5 == pytest.approx(0.475 * 2.3646 / 1.95996 * math.sqrt(8 / 7), abs=1e-4)  # Student's t, 7


def test_one_item_has_no_interval():
    """Its draws are all alike, which says nothing about other items."""
    one = center(0.4, np.full(100, 0.4), 1)
    assert one.interval() == {"value": 0.4, "low": -math.inf, "high": math.inf}
    assert one.interval(0, 1) == {"value": 0.4, "low": 0, "high": 1}
    base, reference = (Estimate(value, np.full(100, value)) for value in (0.9, 0.1))
    assert measure_gap_closed(one, base, reference) == pytest.approx({"value": 0.625, "low": 0, "high": 1})
    assert measure_gap_closed(base, one, reference) is measure_gap_closed(reference, base, one) is None


def share_held(estimates, truth):
    held = [figure["low"] <= truth <= figure["high"] for figure in (estimate.interval() for estimate in estimates)]
    return np.mean(held)


def test_groups_are_drawn_whole():
    drawn, *counts = resample_groups([7, 7, 2, 7, 2, 9], seed=1)
    assert counts == [3, 3]
    assert (drawn[:, [1, 3, 4]] == drawn[:, [0, 0, 2]]).all()
    assert (drawn[:, 2] != drawn[:, 5]).any()
    assert (drawn[:, [0, 2, 5]].sum(axis=1) == 3).all()
    drawn, *counts = resample_groups([7, 7, 2, 7, 2, 9], 1, size=2)
    assert (drawn[:, [0, 2, 5]].sum(axis=1) == 1).all()
    assert counts == [1, 3]
    assert (resample_groups(range(10), 1, 4)[0] == resample(10, 1, 4)).all()


def test_copies_in_a_group_change_no_interval():
    """Twelve groups of 32 equal texts say as much as twelve texts, also where less than a group is compared."""
    profile, words = build_word_profile(write(10_000, "book", 1)), split_all(cut(write(600, "other", 3), 50))
    copies, groups = [text for text in words for _ in range(32)], [number // 32 for number in range(12 * 32)]
    for n_words, n_words_of_copies in ((50, 600), (150, 4800), (10**6, 10**6)):
        found = measure_delta(words, profile, n_words, 0)["delta"].interval()
        other = measure_delta(copies, profile, n_words_of_copies, 0, groups)["delta"].interval()
        assert other["high"] - other["low"] == pytest.approx(found["high"] - found["low"])


@pytest.mark.parametrize(("n_texts", "group_size"), [(12, 1), (40, 1), (120, 10)])
def test_intervals_of_words_and_spelling_hold(n_texts, group_size, monkeypatch):
    """Fresh texts of one author each time; the true value is the mean of the measure over all of them.

    Those of one group are equal, as samples of one prompt may nearly be: they say no more than one of them.
    """
    monkeypatch.setattr(bootstrap, "resample", functools.partial(resample, rounds=400))
    monkeypatch.setattr(stylometry, "SELECTIONS", 1)  # all texts are compared
    profile = build_word_profile(write(10_000, "book", 1))
    known, delta, unknown = set(split_all([write(300, "book", 1)])[0]), [], []
    groups = [number // group_size for number in range(n_texts)]
    for seed in range(200):
        words = split_all(cut(write(50 * n_texts // group_size, "other", 1000 + seed), 50))
        words = [words[group] for group in groups]
        delta.append(measure_delta(words, profile, 10**6, seed, groups)["delta"])
        unknown.append(measure_unknown(words, known, seed, groups))
    for found in (delta, unknown):
        assert share_held(found, np.mean([estimate.value for estimate in found])) >= 0.92


def estimate_mean(rng, mean, count):
    """The mean of so many texts' scores, as a measure."""
    scores = rng.normal(mean, 1, count)
    drawn = resample(count, int(rng.integers(2**31)), rounds=400)
    return center(scores.mean(), drawn @ scores / count, count)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_intervals_of_the_gap_hold(share):
    rng, held, found = np.random.default_rng(1), [], []
    for _ in range(300):
        base, reference, column = (estimate_mean(rng, mean, 40) for mean in (2, 0, 2 - 2 * share))
        found.append(measure_gap_closed(column, base, reference))
        assert found[-1] is not None
        assert 0 <= found[-1]["low"] <= found[-1]["value"] <= found[-1]["high"] <= 1
        held.append(found[-1]["low"] <= share <= found[-1]["high"])
    assert np.mean(held) >= 0.92
    assert np.mean([figure["value"] for figure in found]) == pytest.approx(share, abs=0.1)


@pytest.mark.parametrize(("base", "column", "reference"), [(0.32, 0.30, 0.318), (0.32, 0.34, 0.318)])
def test_a_gap_within_its_noise_has_no_share(base, column, reference):
    """517 % and -453 % of the way were printed for these."""
    draws = np.random.default_rng(0).normal(0, 0.04, (3, 500))
    figures = [Estimate(value, value + noise) for value, noise in zip((column, base, reference), draws, strict=True)]
    assert measure_gap_closed(*figures) is None
    wide = [figures[0], Estimate(0.9, 0.9 + draws[1]), figures[2]]
    assert measure_gap_closed(*wide)["high"] == 1


def test_the_share_is_of_the_gap_of_the_same_draw():
    gap = np.random.default_rng(0).uniform(0.8, 1.2, 500)
    base, column, reference = (Estimate(1 - share, 1 - share * gap) for share in (0, 0.75, 1))
    assert measure_gap_closed(column, base, reference) == pytest.approx({"value": 0.75, "low": 0.75, "high": 0.75})


def test_a_gap_in_which_the_author_could_miss_two_thirds_has_no_share():
    """The gap is surely above 0, but the author's texts, drawn again, would often get less than a third of it."""
    rng = np.random.default_rng(2)
    base, column, reference = (Estimate(v, v + rng.normal(0, 0.12, 2000)) for v in (0.4, 0.0, 0.0))
    assert np.percentile(base.draws - reference.draws, 2.5) > 0
    assert measure_gap_closed(column, base, reference) is None
