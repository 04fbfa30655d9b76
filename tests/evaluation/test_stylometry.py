"""Delta equals figures from code that shares nothing with them, and words and ends are counted as by hand."""

import itertools
import math
import random
import statistics
import unicodedata
from collections import Counter

import numpy as np
import pytest

from utils.evaluation import stylometry
from utils.evaluation.stylometry import (
    build_word_profile,
    measure_delta,
    measure_lengths,
    measure_unknown,
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
    assert found["delta"].value == pytest.approx(hand_delta(words, profile), abs=1e-6)
    expected = hand_cosine_delta(words, profile, hand_words(CONTROL))
    assert found["cosine_delta"].value == pytest.approx(expected, abs=1e-6)
    for figures in (estimate.interval(0) for estimate in found.values()):
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
        near, far = (part[name].interval(0)["high"], author[name].interval(0)["high"]), other[name].interval(0)["low"]
        assert max(near) < far
    copy = measure_delta([split_words(BOOK)], profile, 10**6, 0)
    assert [copy[name].value for name in ("delta", "cosine_delta")] == pytest.approx([0, 0], abs=1e-9)
    parts = measure_delta(split_all(cut(BOOK, 900)), profile, 10**6, 0)
    assert parts["delta"].interval(0)["low"] == 0 < parts["delta"].interval(0)["high"]  # there is no distance below 0


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
        assert min(values) < found[name].value < max(values)
        assert abs(found[name].value - statistics.mean(values)) < 4 * error


def test_delta_of_drawn_selections_equals_a_loop():
    texts, profile = cut(OTHER, 250), hand_profile(BOOK)
    order = np.random.default_rng(5).random((stylometry.SELECTIONS, len(texts))).argsort(axis=1)
    values = []
    for row in order.tolist():
        selection = [hand_words(text) for text, rank in zip(texts, row, strict=True) if rank < 2]
        values.append(hand_delta([word for words in selection for word in words], profile))
    found = measure_delta(split_all(texts), build_word_profile(BOOK), 500, seed=5)
    assert len(set(values)) == 15
    assert found["delta"].value == pytest.approx(statistics.mean(values), abs=1e-6)


def test_delta_is_compared_between_equal_amounts():
    """Delta falls as a text grows; ten times the texts at the same n_words have the same Delta."""
    profile = build_word_profile(BOOK, CONTROL)
    few, many = (split_all(cut(write(n, "book", 7), 100)) for n in (1_000, 10_000))
    small, same, large = (
        measure_delta(texts, profile, n_words, 0)["delta"].value
        for texts, n_words in ((few, 1_000), (many, 1_000), (many, 10_000))
    )
    assert same == pytest.approx(small, rel=0.15)
    assert large < 0.6 * same


def test_intervals_contain_the_value_and_shrink_with_more_text():
    profile, widths = build_word_profile(BOOK, CONTROL), []
    for n_texts in (10, 40):
        texts = cut(write(40 * n_texts, "other", 2), 40)
        found = measure_delta(split_all(texts), profile, 10**6, 0)
        figures = [estimate.interval(0) for estimate in found.values()]
        assert all(figure["low"] < figure["value"] < figure["high"] for figure in figures)
        widths.append([figure["high"] - figure["low"] for figure in figures])
    for few, many in zip(*widths, strict=True):
        assert many < 0.75 * few


def test_words_are_split():
    text = "Don't -- O\u2019Neill's well-known 'tis, the dogs\u2019 bone; 3rd x2y CAF\u00c9 \u0416\u0443\u043a 1984."
    expected = "don't o'neill's well known tis the dogs bone x caf\u00e9 \u0436\u0443\u043a"
    assert split_words(text) == expected.split()
    assert split_words("") == split_words("12 -- 3,4 ' \u2019 _!") == []


def test_words_in_italics_are_words():
    assert split_words("He was _so_ tired, _very tired_.") == ["he", "was", "so", "tired", "very", "tired"]


@pytest.mark.parametrize(
    ("text", "expected", "n_sentences"),
    [
        ("de\u0301ja\u0300 vu.", "d\u00e9j\u00e0 vu", 1),
        ("नमस्ते दुनिया।", "नमस्ते दुनिया", 1),
        ("שָׁלוֹם عَرَبِي؟", "שָׁלוֹם عَرَبِي", 1),
        ("我来了。你好！", "我 来 了 你 好", 2),
        ("かなカ abc漢x", "か な カ abc 漢 x", 0),
        ("สวัสดี", "ส วั ส ดี", 0),
        ("5किलो दूध।", "दूध", 1),
        ("می\u200cروم क्\u200dया", "می\u200cروم क्\u200dया", 0),
        ("スーーabc｡", "ス ー ー abc", 1),
        ("ພາສາ", "ພ າ ສ າ", 0),
        ("ភាសា។ ပါ။", "ភា សា ပါ", 2),
        ("اردو۔ Այո։", "اردو այո", 2),
    ],
    ids=["decomposed", "Devanagari", "Hebrew and Arabic", "Chinese", "Japanese", "Thai", "after a digit", "joiners",
         "long vowels", "Lao", "Khmer and Myanmar", "Urdu and Armenian"],
)  # fmt: skip
def test_words_of_other_scripts(text, expected, n_sentences):
    """A word keeps its marks; in scripts without spaces, each letter counts."""
    words = unicodedata.normalize("NFC", expected).split()
    assert split_words(text) == words
    assert measure_lengths(text)["sentence_words"] == (len(words) / n_sentences if n_sentences else None)


def test_unknown_words_by_hand():
    texts = [["a", "b", "b"], ["c"], ["a", "a", "a", "d"]] * 5
    found = measure_unknown(texts, {"a", "d"}, 0)
    assert found.value == 3 / 8
    assert measure_unknown(texts, set("abcd"), 0).interval() == {"value": 0, "low": 0, "high": 0}
    # The standard error of a ratio of sums, from unknown - 3 / 8 * words of each text, times Student's t of 15 texts
    error = math.sqrt(5 * ((2 - 9 / 8) ** 2 + (1 - 3 / 8) ** 2 + (12 / 8) ** 2)) / 40 * math.sqrt(15 / 14)
    assert found.interval()["high"] - found.interval()["low"] == pytest.approx(2 * 2.1448 * error, rel=0.1)
    halves = [["a", "b"] * n for n in range(1, 20)]  # long or short, half the words of each are unknown
    assert measure_unknown(halves, {"a"}, 0).interval() == {"value": 0.5, "low": 0.5, "high": 0.5}


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
