"""Delta and AUC equal figures from code that shares nothing with them, and words and ends are counted as by hand."""

import itertools
import math
import random
import statistics
from collections import Counter

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.model_selection import StratifiedKFold

from utils.evaluation import bootstrap, stylometry
from utils.evaluation.bootstrap import interval, resample
from utils.evaluation.stylometry import (
    build_word_profile,
    measure_auc,
    measure_delta,
    measure_lengths,
    split_words,
    tabulate_words,
)

SYLLABLES = ["ba", "co", "du", "fe", "gi", "ha", "jo", "ku", "le", "mi"]
# The commonest have one syllable, so words have all lengths; none is another one's part by design.
WORDS = ["".join(parts) for n in (1, 2, 3) for parts in itertools.product(SYLLABLES, repeat=n)][:400]


def write(n_words, author, seed):
    """Write words of a Zipf-like vocabulary, each author with frequencies of his own, in sentences."""
    taste = random.Random(author)
    weights = [math.exp(taste.gauss(0, 0.5)) / (rank + 3) for rank in range(len(WORDS))]
    words = random.Random(seed).choices(WORDS, weights, k=n_words)
    for i in range(0, n_words, 9):
        words[i] = words[i].capitalize()
        words[i - 1] += "."
    return " ".join(words)


BOOK, CONTROL, OTHER = write(6_300, "book", 1), write(4_000, "control", 2), write(1_500, "other", 3)


def hand_words(text):
    return text.replace(".", "").lower().split()


def hand_rates(words, chosen):
    counts = Counter(words)
    return [counts[word] / len(words) for word in chosen]


def hand_profile(book):
    """Return the 150 commonest words that vary, with mean and standard deviation over windows of 500 words."""
    words = hand_words(book)
    totals = Counter(words)
    frequent = sorted(totals, key=lambda word: (-totals[word], word))[:150]
    windows = [Counter(words[start : start + 500]) for start in range(0, len(words) - 499, 500)]
    chosen, spread = [], []
    for word in frequent:
        counts = [window[word] for window in windows]
        if len(set(counts)) > 1:
            chosen.append(word)
            spread.append(statistics.stdev(count / 500 for count in counts))
    return chosen, hand_rates(words, chosen), spread


def hand_delta(words, profile):
    chosen, rates, spread = profile
    own = hand_rates(words, chosen)
    return sum(abs(a - b) / s for a, b, s in zip(own, rates, spread, strict=True)) / len(chosen)


def hand_cosine_delta(words, profile, control):
    chosen, rates, spread = profile
    origin = hand_rates(control, chosen)
    text = [(a - o) / s for a, o, s in zip(hand_rates(words, chosen), origin, spread, strict=True)]
    book = [(b - o) / s for b, o, s in zip(rates, origin, spread, strict=True)]
    product = sum(a * b for a, b in zip(text, book, strict=True))
    return 1 - product / math.sqrt(sum(a * a for a in text)) / math.sqrt(sum(b * b for b in book))


def cut(text, n_words):
    """Cut a text into texts of so many words."""
    words = text.split()
    return [" ".join(words[start : start + n_words]) for start in range(0, len(words) - n_words + 1, n_words)]


def split_all(texts):
    return [split_words(text) for text in texts]


@pytest.mark.parametrize("text", [OTHER, write(1_500, "book", 4), CONTROL[:9_000]], ids=["other", "author", "control"])
def test_delta_equals_a_hand_calculation(text):
    texts = cut(text, 100)
    texts = [" ".join(texts[:4]), *texts[4:]]  # the texts count by their words, not each alike
    words = [word for part in texts for word in hand_words(part)]
    found = measure_delta(split_all(texts), build_word_profile(BOOK, CONTROL), 10**6, seed=0)
    profile = hand_profile(BOOK)
    assert found["delta"]["value"] == pytest.approx(hand_delta(words, profile), abs=1e-6)
    expected = hand_cosine_delta(words, profile, hand_words(CONTROL))
    assert found["cosine_delta"]["value"] == pytest.approx(expected, abs=1e-6)
    for figures in found.values():
        assert 0 <= figures["low"] < figures["value"] < figures["high"]


def test_word_profile_equals_a_hand_calculation():
    """Words as frequent as others that stand equally often in every window say nothing and are left out."""
    words = BOOK.lower().replace(".", "").split()[:2_000]
    words[::25] = ["steady"] * 80  # 20 in each of four windows
    words += ["ending"] * 400  # after the last whole window: it counts for the rates, not for the spread
    book = " ".join(words)
    found, (chosen, rates, spread) = build_word_profile(book, CONTROL), hand_profile(book)
    assert {"steady", "ending"} < {word for word, _ in Counter(words).most_common(10)}
    assert not {"steady", "ending"} & set(found.words)
    assert found.words == chosen
    assert 100 < len(chosen) < 150
    assert found.rates == pytest.approx(rates, abs=1e-12)
    assert found.spread == pytest.approx(spread, abs=1e-12)
    assert found.origin == pytest.approx(hand_rates(hand_words(CONTROL), chosen), abs=1e-12)


@pytest.mark.parametrize(("n_windows", "times"), [(3, 3), (3, 25), (6, 3)])
def test_words_without_variation_are_left_out_whatever_the_rounding(n_windows, times):
    words = hand_words(BOOK)[: 500 * n_windows]
    for start in range(0, len(words), 500):
        words[start : start + times] = ["steady"] * times
    profile = build_word_profile(" ".join(words))
    assert "steady" not in profile.words
    assert profile.spread.min() > 1e-9


def test_ties_do_not_depend_on_the_order_of_the_words():
    """100 words as frequent as each other at the end of the list: the first of the alphabet stay."""
    words = [word for word in WORDS[:100] for _ in range(6)] + [word for word in WORDS[100:300] for _ in range(3)]
    rng, chosen = random.Random(0), set()
    for _ in range(3):
        rng.shuffle(words)
        profile = build_word_profile(" ".join(words))
        assert profile.words == hand_profile(" ".join(words))[0]
        chosen.update(profile.words)
    assert len(chosen) <= 150


def test_without_general_text_there_is_no_cosine_delta():
    for control in (None, "", "12 - 3."):
        profile = build_word_profile(BOOK, control)
        assert profile.origin is None
        assert list(measure_delta(split_all(cut(OTHER, 100)), profile, 10**6, 0)) == ["delta"]


def test_the_author_is_nearer_than_another():
    profile = build_word_profile(BOOK, CONTROL)
    part, author, other = (
        measure_delta(split_all(cut(text, 100)), profile, 1_500, 0)
        for text in (" ".join(BOOK.split()[:1_500]), write(1_500, "book", 4), OTHER)
    )
    for name in ("delta", "cosine_delta"):
        assert max(part[name]["high"], author[name]["high"]) < other[name]["low"]
    copy = measure_delta([split_words(BOOK)], profile, 10**6, 0)
    assert [copy[name]["value"] for name in ("delta", "cosine_delta")] == pytest.approx([0, 0], abs=1e-9)
    parts = measure_delta(split_all(cut(BOOK, 900)), profile, 10**6, 0)
    assert parts["delta"]["low"] == 0 < parts["delta"]["high"]  # there is no distance below 0


def test_delta_of_selections_is_their_mean():
    """Three of six texts are compared at a time, so the value is near the mean of all 20 selections."""
    texts, profile = cut(OTHER, 250), hand_profile(BOOK)
    control = hand_words(CONTROL)
    words = [[hand_words(text) for text in some] for some in itertools.combinations(texts, 3)]
    selections = [list(itertools.chain(*some)) for some in words]
    found = measure_delta(split_all(texts), build_word_profile(BOOK, CONTROL), 760, seed=5)
    for name, values in (
        ("delta", [hand_delta(selection, profile) for selection in selections]),
        ("cosine_delta", [hand_cosine_delta(selection, profile, control) for selection in selections]),
    ):
        error = statistics.stdev(values) / math.sqrt(stylometry.SELECTIONS)
        assert min(values) < found[name]["value"] < max(values)
        assert abs(found[name]["value"] - statistics.mean(values)) < 4 * error


def test_delta_of_drawn_selections_equals_a_loop():
    texts, profile = cut(OTHER, 250), hand_profile(BOOK)
    order = np.random.default_rng(5).random((stylometry.SELECTIONS, len(texts))).argsort(axis=1)
    values = []
    for row in order.tolist():
        selection = [hand_words(text) for text, rank in zip(texts, row, strict=True) if rank < 2]
        values.append(hand_delta([word for words in selection for word in words], profile))
    found = measure_delta(split_all(texts), build_word_profile(BOOK), 500, seed=5)
    assert len(set(values)) == 15
    assert found["delta"]["value"] == pytest.approx(statistics.mean(values), abs=1e-6)


def test_delta_is_compared_between_equal_amounts():
    """Delta falls as a text grows; ten times the texts at the same n_words have the same Delta."""
    profile = build_word_profile(BOOK, CONTROL)
    few, many = (split_all(cut(write(n, "book", 7), 100)) for n in (1_000, 10_000))
    small, same, large = (
        measure_delta(texts, profile, n_words, 0)["delta"]["value"]
        for texts, n_words in ((few, 1_000), (many, 1_000), (many, 10_000))
    )
    assert same == pytest.approx(small, rel=0.15)
    assert large < 0.6 * same


def hand_tfidf(texts, vocabulary=None):
    """Return rows of sublinear tf-idf of character 1- to 4-grams, l2-normed, and (column, idf) by gram."""
    counted = []
    for text in texts:
        counted.append(Counter(text[i : i + n] for n in (1, 2, 3, 4) for i in range(len(text) - n + 1)))
    if vocabulary is None:
        documents = Counter(gram for counts in counted for gram in counts)
        idf = {gram: math.log((1 + len(texts)) / (1 + n)) + 1 for gram, n in documents.items()}
        vocabulary = {gram: (column, idf[gram]) for column, gram in enumerate(sorted(idf))}
    rows = np.zeros((len(texts), len(vocabulary)))
    for row, counts in zip(rows, counted, strict=True):
        for gram, n in counts.items():
            if gram in vocabulary:
                column, idf = vocabulary[gram]
                row[column] = (1 + math.log(n)) * idf
        row /= math.sqrt(sum(row * row))
    return rows, vocabulary


def fit_logistic(rows, labels):
    """Return weights and intercept of least 0.5 |w|^2 + 10 * summed log-loss; labels are -1 and 1."""

    def objective(parameters):
        weights, intercept = parameters[:-1], parameters[-1]
        margins = labels * (rows @ weights + intercept)
        pulls = -10 * labels / (1 + np.exp(margins))
        value = 0.5 * weights @ weights + 10 * np.logaddexp(0, -margins).sum()
        return value, np.append(weights + rows.T @ pulls, pulls.sum())

    fitted = minimize(objective, np.zeros(rows.shape[1] + 1), jac=True, method="L-BFGS-B", options={"gtol": 1e-6})
    return fitted.x[:-1], fitted.x[-1]


def hand_auc(book, texts, seed):
    """Count the pairs in which the book's text has the higher score of a classifier that saw neither."""
    every, is_book = book + texts, [1] * len(book) + [0] * len(texts)
    scores = [0.0] * len(every)
    for seen, unseen in StratifiedKFold(5, shuffle=True, random_state=seed).split(every, is_book):
        rows, vocabulary = hand_tfidf([every[i] for i in seen])
        weights, intercept = fit_logistic(rows, np.array([2 * is_book[i] - 1 for i in seen]))
        for i, row in zip(unseen, hand_tfidf([every[i] for i in unseen], vocabulary)[0], strict=True):
            scores[i] = float(row @ weights) + intercept
    pairs = list(itertools.product(scores[: len(book)], scores[len(book) :]))
    return sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)


@pytest.mark.parametrize("n_texts", [20, 14])
def test_auc_equals_an_independent_implementation(n_texts):
    """Texts so short that the figure is neither 0.5 nor 1: the mean of five selections, each with its own folds."""
    book, texts = cut(write(1_000, "book", 1), 40), cut(write(800, "other", 2), 40)
    orders = [np.random.default_rng(seed).permutation(20)[:n_texts] for seed in range(3, 8)]
    values = [hand_auc(book, [texts[i] for i in order], seed) for seed, order in enumerate(orders, start=3)]
    found = measure_auc(book, texts, n_texts, seed=3)
    assert found["value"] == pytest.approx(statistics.mean(values), abs=0.01)
    assert max(values) - min(values) > 0.03  # so one of them alone would not do
    assert 0.6 < found["value"] < 0.98
    assert 0 <= found["low"] < found["value"] < found["high"] <= 1


def test_auc_of_the_same_source_and_of_another():
    # Few texts of one source get less than 0.5: one that is left out is missed on its own side.
    equal = measure_auc(cut(write(4_000, "book", 1), 50), cut(write(4_000, "book", 2), 50), 80, 0)
    book, same = cut(write(1_500, "book", 1), 100), cut(write(1_500, "book", 2), 100)
    other = measure_auc(book, cut(write(1_500, "other", 2), 100), 15, 0)
    shouted = measure_auc(book, [text.upper() for text in same], 15, 0)
    assert equal["low"] <= 0.5 <= equal["high"]
    assert abs(equal["value"] - 0.5) < 0.15
    assert other["value"] > 0.9
    assert (shouted["value"], shouted["low"], shouted["high"]) == (1, 1, 1)


def test_intervals_contain_the_value_and_shrink_with_more_text():
    profile, widths = build_word_profile(BOOK, CONTROL), []
    for n_texts in (10, 40):
        texts = cut(write(40 * n_texts, "other", 2), 40)
        auc = measure_auc(cut(write(40 * n_texts, "book", 1), 40), texts, n_texts, 0)
        found = {"auc": auc} | measure_delta(split_all(texts), profile, 10**6, 0)
        for figures in found.values():
            assert figures["low"] < figures["value"] < figures["high"]
        widths.append([figures["high"] - figures["low"] for figures in found.values()])
    for few, many in zip(*widths, strict=True):
        assert many < 0.75 * few


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
    values = np.random.default_rng(0).permutation(np.arange(2_001) / 2_000)
    assert interval(values) == pytest.approx([0.025, 0.975])
    assert interval(values**2) == pytest.approx([0.025**2, 0.975**2])
    assert interval(values, estimate=3.5) == pytest.approx([3.025, 3.975])  # the mean, 0.5, moves to 3.5


def test_words_are_split():
    text = "Don't -- O\u2019Neill's well-known 'tis, the dogs\u2019 bone; 3rd x2y CAF\u00c9 \u0416\u0443\u043a 1984."
    expected = "don't o'neill's well known tis the dogs bone x caf\u00e9 \u0436\u0443\u043a"
    assert split_words(text) == expected.split()
    assert split_words("") == split_words("12 -- 3,4 ' \u2019 _!") == []


def test_words_in_italics_are_words():
    assert split_words("He was _so_ tired, _very tired_.") == ["he", "was", "so", "tired", "very", "tired"]


def test_lengths_by_hand():
    text = (
        'The dog ran home. "Where is it?" asked Ada!\n'
        "\u201cHere.\u201d She slept\u2026 (Or so he said.) Pi is 3.14 or so...\n"
        " \t\n"
        "A new day?! It rained.\n\n"
        "And then she"
    )
    # 4 + 3 + 2, 1 + 2 + 4 + 4, 3 + 2, 3 words; the ends are . ? ! . ... .) ... ?! . and not that in 3.14
    assert measure_lengths(text) == {"sentence_words": 28 / 9, "paragraph_words": 28 / 2}
    assert measure_lengths("No end, no\nother paragraph") == {"sentence_words": None, "paragraph_words": None}
    assert measure_lengths("") == {"sentence_words": None, "paragraph_words": None}
    assert measure_lengths("One two.") == {"sentence_words": 2.0, "paragraph_words": None}


@pytest.mark.parametrize("empty_lines", [3, 4, 7])
def test_many_empty_lines_are_one_end_of_a_paragraph(empty_lines):
    text = "One two." + "\n" * (empty_lines + 1) + "Three four."
    assert measure_lengths(text)["paragraph_words"] == 4


def test_the_table_equals_a_hand_calculation():
    chosen, rates, spread = hand_profile(BOOK)
    origin = hand_rates(hand_words(CONTROL), chosen)
    differs = {w: abs(a - b) / s for w, a, b, s in zip(chosen, rates, origin, spread, strict=True)}
    texts = cut(OTHER, 100)
    words = [word for text in texts for word in hand_words(text)]
    columns = {"book": hand_words(BOOK), "control": hand_words(CONTROL), "base": words}
    table = tabulate_words(build_word_profile(BOOK, CONTROL), {"base": split_all(texts)})
    assert [row["word"] for row in table] == sorted(chosen, key=lambda word: -differs[word])[:15]
    for row in table:
        assert list(row) == ["word", "book", "control", "base"]
        for name, source in columns.items():
            assert row[name] == pytest.approx(1000 * source.count(row["word"]) / len(source), abs=0.005_001)


def test_samples_have_no_say_in_what_the_table_shows():
    profile = build_word_profile(BOOK, CONTROL)
    first, second = (
        tabulate_words(profile, {"base": split_all(base), "finetuned": split_all(tuned)})
        for base, tuned in ((cut(OTHER, 100), cut(CONTROL, 100)), (["Ba ba! Mimimi ba."], cut(BOOK, 250)))
    )
    chosen = [[(row["word"], row["book"], row["control"]) for row in table] for table in (first, second)]
    assert chosen[0] == chosen[1]
    assert [row["base"] for row in first] != [row["base"] for row in second]
    assert len(first) == 15


def test_the_table_without_general_text():
    table = tabulate_words(build_word_profile(BOOK), {"base": [["ba"]]})
    chosen, rates, spread = hand_profile(BOOK)
    steadiest = sorted(range(len(chosen)), key=lambda i: -rates[i] / spread[i])[:15]
    assert [row["word"] for row in table] == [chosen[i] for i in steadiest]
    assert all(list(row) == ["word", "book", "base"] for row in table)
