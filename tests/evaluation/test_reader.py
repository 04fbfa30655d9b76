"""The reader: its features equal plain loops, its classifier equals scikit-learn's, its intervals hold."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score
from transformers import AutoModelForCausalLM, AutoTokenizer

from utils.evaluation import ngrams, reader
from utils.evaluation.ngrams import count_hashes, hash_ngrams
from utils.evaluation.reader import Familiarity, measure_auc, read_texts
from utils.evaluation.stylometry import split_words
from utils.model.loading import autocast

FP32 = lambda: autocast(torch.device("cpu"), "fp32")  # noqa: E731


@pytest.fixture(scope="module")
def tiny(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model).eval(), AutoTokenizer.from_pretrained(tiny_model)


def test_features_equal_a_plain_loop(tiny):
    """One text at a time, without padding, from the log probabilities of all tokens."""
    model, tokenizer = tiny
    texts = ["Day 3. Ada went to the mill and slept.", "It was", "Bram counted the stars. " * 40, "D", "\U0001f600"]
    hidden, surprise = read_texts(model, tokenizer, texts, 3, FP32)
    assert hidden.shape == (5, 64)
    for text, states, figures in zip(texts, hidden, surprise, strict=True):
        ids = tokenizer(text)["input_ids"]
        ids = (ids * 2 if len(ids) == 1 else ids)[:64]
        with torch.no_grad():
            output = model(torch.tensor([ids]), output_hidden_states=True)
        chosen = output.hidden_states[1][0], output.hidden_states[2][0]
        assert states == pytest.approx(np.concatenate([layer.mean(0).numpy() for layer in chosen]), abs=1e-5)
        logs = output.logits[0].log_softmax(-1)
        nats = [-float(logs[i, token]) for i, token in enumerate(ids[1:])]
        by_hand = [np.mean(nats), np.std(nats), np.median(nats), max(nats)]
        assert figures == pytest.approx(by_hand, abs=1e-4)


@pytest.mark.parametrize("chunk", [7, 1000])
def test_counts_of_ngrams_equal_a_scan(chunk, monkeypatch):
    monkeypatch.setattr(ngrams, "CHUNK", chunk)
    rng = np.random.default_rng(0)
    train, texts = rng.integers(0, 4, 60), [rng.integers(0, 5, n) for n in (9, 2, 0)]
    for n in (1, 3):
        stands = Counter(tuple(train[i : i + n]) for i in range(len(train) - n + 1))
        found = count_hashes([hash_ngrams(text, n) for text in texts], train, n)
        for text, counts in zip(texts, found, strict=True):
            assert counts.tolist() == [stands[tuple(text[i : i + n])] for i in range(len(text) - n + 1)]


def test_a_window_of_training_is_not_known_by_its_own_neighborhood(tiny, monkeypatch):
    """A word that stands near the window only is new; elsewhere, in general text or in another text it is known."""
    monkeypatch.setattr(reader, "NEIGHBORHOOD", 4)
    tokenizer = tiny[1]
    rare, book = "zyx zyx", "Ada slept. Bram slept. Cleo slept. Dov slept. Edda slept. "
    text = book * 3 + rare + " " + book * 3
    ids = np.array(tokenizer(text)["input_ids"])
    start = len(tokenizer(book * 3)["input_ids"])
    length = len(tokenizer(rare)["input_ids"])
    familiarity = Familiarity(ids, split_words(text), True, {"hat"}, tokenizer)
    window = tokenizer.decode(ids[start : start + length])
    inside = familiarity.measure([window], [start], length)[0]
    outside = familiarity.measure([window, "a hat", "Ada slept."])
    assert (inside[-1], *outside[:, -1]) == (1, 0, 0.5, 0)  # unknown words: zyx; none; "a"; none
    assert inside[6] == 0 < outside[0][6] == 1  # 4-grams
    own, total = Counter(), 0
    tokens = tokenizer("Ada slept.")["input_ids"]
    for i in range(len(ids)):
        own[int(ids[i])] += 1
    total = sum(math.log1p(own[token]) for token in tokens) / len(tokens)
    assert outside[2][1] == pytest.approx(total)


def test_a_sample_of_the_book_has_no_neighborhood_of_words(tiny):
    tokenizer = tiny[1]
    ids = np.array(tokenizer("zyx slept.")["input_ids"])
    window = [tokenizer.decode(ids)]
    for is_whole, unknown in ((True, 1.0), (False, 0.0)):
        assert (
            Familiarity(ids, ["zyx", "slept"], is_whole, set(), tokenizer).measure(window, [0], len(ids))[0][-1]
            == unknown
        )


def make_features(rng, count, shift=0.0):
    """Three groups of features, of which the second says something if there is a shift."""
    groups = [rng.normal(size=(count, n)) for n in (12, 3, 5)]
    groups[1][:, 0] += shift
    return groups


@pytest.mark.parametrize("weighted", [False, True])
def test_classifier_equals_scikit_learn(weighted):
    rng = np.random.default_rng(1)
    book, texts = make_features(rng, 40), make_features(rng, 25, 1.5)
    joined = [np.concatenate(both) for both in zip(book, texts, strict=True)]
    x = np.concatenate([(g - g.mean(0)) / g.std(0) / math.sqrt(g.shape[1]) for g in joined], axis=1)
    is_book, folds = np.arange(65) < 40, rng.integers(0, 5, 65)
    weights = rng.integers(0, 3, 65).astype(float) if weighted else np.ones(65)
    scores = np.zeros(65)
    for fold in range(5):
        seen = (folds != fold) & (weights > 0)
        share = weights[seen].copy()
        share[is_book[seen]] /= 2 * share[is_book[seen]].sum()
        share[~is_book[seen]] /= 2 * share[~is_book[seen]].sum()
        ridge = Ridge(alpha=1 / seen.sum()).fit(x[seen], np.where(is_book[seen], 1.0, -1.0), sample_weight=share)
        scores[folds == fold] = ridge.predict(x[folds == fold]) - ridge.predict(share[None] @ x[seen])
    expected = roc_auc_score(is_book, scores, sample_weight=weights)
    assert reader._cross_validate(reader._multiply(joined), is_book, weights, folds) == pytest.approx(
        expected, abs=1e-9
    )
    assert 0.55 < expected < 0.95


def test_texts_of_a_group_are_on_one_side():
    """Samples of one prompt, copies of a training window and neighbors in the book; both classes in every fold."""
    groups = np.concatenate([np.arange(50), [3, 17], 50 + np.arange(40) // 4])
    is_book = np.arange(92) < 50
    for seed in range(20):
        folds = reader._fold(groups, is_book, np.random.default_rng(seed))
        assert all(len(set(folds[groups == group])) == 1 for group in set(groups))
        assert (folds[0:50:2] == folds[1:50:2]).all()
        for fold in range(5):
            assert (is_book & (folds == fold)).sum() == 10
            assert (~is_book[52:] & (folds[52:] == fold)).sum() == 8


def test_texts_of_one_prompt_do_not_help_each_other():
    """Each prompt leaves its mark on its samples, which says nothing about the next prompt's."""
    rng = np.random.default_rng(2)
    book, texts, groups = make_features(rng, 100), make_features(rng, 40), np.arange(40) // 8
    for features, marks in ((book, rng.normal(size=(100, 12)) * 4), (texts, rng.normal(size=(5, 12))[groups] * 4)):
        features[0] += marks
    apart = measure_auc(book, texts, 100 + groups, 40, 0).value
    mixed = measure_auc(book, texts, 100 + np.arange(40), 40, 0).value
    assert mixed > apart + 0.1


def test_auc_of_one_source_and_of_another(monkeypatch):
    monkeypatch.setattr(reader, "REFITS", 50)
    rng = np.random.default_rng(3)
    book = make_features(rng, 100)
    same, other = (measure_auc(book, make_features(rng, 40, shift), 100 + np.arange(40), 40, 0) for shift in (0, 6))
    assert 0.3 < same.value < 0.7
    assert same.interval()["low"] < 0.5 < same.interval()["high"]
    assert other.value > 0.99


def test_intervals_of_texts_of_one_source_hold(monkeypatch):
    """Nominal 95 % intervals hold the mean of the measure over many sets of texts, as chance alone makes it."""
    monkeypatch.setattr(reader, "REFITS", 40)
    for n_texts, runs in ((12, 100), (40, 60)):
        found = []
        for seed in range(runs):
            rng = np.random.default_rng(seed)
            found.append(measure_auc(make_features(rng, 60), make_features(rng, n_texts), 60 + np.arange(n_texts),
                                     n_texts, seed))  # fmt: skip
        truth = np.mean([estimate.value for estimate in found])
        held = [figure["low"] <= truth <= figure["high"] for figure in (estimate.interval() for estimate in found)]
        assert np.mean(held) >= 0.92
        assert truth == pytest.approx(0.5, abs=0.05)


@pytest.mark.filterwarnings("error")
def test_without_a_text_to_learn_from_there_is_no_classifier(monkeypatch):
    """Few texts are compared of many samples per prompt: one prompt is drawn, or several of one fold."""
    monkeypatch.setattr(reader, "REFITS", 50)
    rng = np.random.default_rng(5)
    book, texts, groups = make_features(rng, 60), make_features(rng, 120), 60 + np.arange(120) // 10
    for n_texts in (10, 20):
        found = measure_auc(book, texts, groups, n_texts, 0).interval(0, 1)
        assert found["low"] < 0.5 < found["high"]
    gram = reader._multiply([np.concatenate(both) for both in zip(book, texts, strict=True)])
    is_book, folds = np.arange(180) < 60, np.where(np.arange(180) < 60, np.arange(180) % 5, 0)
    one_fold = reader._cross_validate(gram, is_book & (folds == 0), np.where(folds == 0, 1.0, 0.0), folds)
    assert one_fold == 0.5  # nothing was learned


def test_only_equal_numbers_are_compared(monkeypatch):
    monkeypatch.setattr(reader, "REFITS", 2)
    rng = np.random.default_rng(4)
    book, texts = make_features(rng, 80), make_features(rng, 200, 1.0)
    few = [group[:30] for group in texts]
    many_of_many, few_of_many, few_of_few = (
        measure_auc(book, some, 80 + np.arange(len(some[0])), n, 0).value
        for some, n in ((texts, 200), (texts, 30), (few, 30))
    )
    assert abs(few_of_many - few_of_few) < 0.1
    assert few_of_many < many_of_many + 0.05
