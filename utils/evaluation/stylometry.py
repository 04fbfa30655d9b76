"""Style: how near texts stand to a book by their words, their sentences and their characters.

Owns measures on plain text. The book's own training text is the profile, a general text the origin.
Intervals come from the bootstrap: the texts are drawn anew, with replacement, many times.
"""

import re
from dataclasses import dataclass

import numpy as np

WORD = re.compile(r"(?<![^\W_])[^\W\d_]+(?:['\u2019][^\W\d_]+)*")
SENTENCE_END = re.compile(r"[.!?\u2026]+(?=[\"'\u201d\u2019)\]]*(?:\s|$))")
PARAGRAPH_END = re.compile(r"\n(?:[^\S\n]*\n)+")
# Below about so many words, the rates of even the commonest words are mostly chance.
MIN_WORDS = 1500
N_FREQUENT = 150  # words that Delta counts
WINDOW_WORDS = 500  # the book's own variation is measured between windows of so many words
N_SHOWN = 15
ROUNDS, SELECTIONS, FOLDINGS = 2000, 200, 5


def split_words(text: str) -> list[str]:
    """Return the words of a text in lower case; O'Neill is one, the end of 14th is none."""
    return [word.lower().replace("\u2019", "'") for word in WORD.findall(text)]


def resample(count: int, seed: int, size: int | None = None) -> np.ndarray:
    """Draw `size` (default: count) of `count` items with replacement, ROUNDS times.

    Returns:
        (ROUNDS, count): how often each was drawn.
    """
    return np.random.default_rng(seed).multinomial(size or count, np.full(count, 1 / count), size=ROUNDS)


def interval(values: np.ndarray, estimate: float | None = None) -> list[float]:
    """Return the 2.5 and 97.5 % points of bootstrap values.

    Args:
        values: (ROUNDS,).
        estimate: the values are moved to have it as their mean; for measures to which resampling itself adds.
    """
    if estimate is not None:
        values = values - values.mean() + estimate
    return [float(point) for point in np.percentile(values, [2.5, 97.5])]


@dataclass(frozen=True)
class WordProfile:
    """The frequent words of a book, and how much their rates vary within it.

    words are W; rates, spread and origin are (W,) shares of all words: the book's mean, its standard
    deviation between windows of WINDOW_WORDS words, and the general text's rate.
    """

    words: list[str]
    rates: np.ndarray
    spread: np.ndarray
    origin: np.ndarray | None


def build_word_profile(book: str, control: str | None = None) -> WordProfile:
    """Measure the most frequent words of the training text.

    Args:
        book: training text, two windows of words at least.
        control: general text, the origin of cosine Delta.
    """
    tokens = split_words(book)
    ranked, totals = np.unique(tokens, return_counts=True)
    frequent = ranked[np.lexsort((ranked, -totals))][:N_FREQUENT].tolist()
    whole = len(tokens) // WINDOW_WORDS * WINDOW_WORDS
    windows = [tokens[start : start + WINDOW_WORDS] for start in range(0, whole, WINDOW_WORDS)]
    spread = count_words(windows, frequent).std(axis=0, ddof=1) / WINDOW_WORDS  # of counts: exactly 0 for no change
    words = [word for word, deviation in zip(frequent, spread, strict=True) if deviation > 0]
    origin = word_rates([split_words(control)], words) if control and split_words(control) else None
    return WordProfile(words, word_rates([tokens], words), spread[spread > 0], origin)


def count_words(texts: list[list[str]], words: list[str]) -> np.ndarray:
    """Count words in texts: (n_texts, W)."""
    column = {word: index for index, word in enumerate(words)}
    counts = np.zeros((len(texts), len(words)))
    for row, text in enumerate(texts):
        for word in text:
            if word in column:
                counts[row, column[word]] += 1
    return counts


def word_rates(texts: list[list[str]], words: list[str]) -> np.ndarray:
    """Return the share of each word in all texts together: (W,)."""
    return count_words(texts, words).sum(axis=0) / sum(map(len, texts))


def burrows_delta(rates: np.ndarray, profile: WordProfile) -> np.ndarray:
    """Mean distance from the book over the frequent words, in the book's own standard deviations.

    Args:
        rates: (..., W) shares of the frequent words.
    Source: Burrows 2002, against one author; tests/evaluation/test_stylometry.py calculates it by hand.
    """
    return np.abs((rates - profile.rates) / profile.spread).mean(axis=-1)


def cosine_delta(rates: np.ndarray, profile: WordProfile) -> np.ndarray:
    """1 - cosine between text and book, both seen from the general text: do they differ from it the same way?

    Source: Smith and Aldridge 2011; Evert et al. 2017.
    """
    text, book = ((r - profile.origin) / profile.spread for r in (rates, profile.rates))
    lengths = np.linalg.norm(text, axis=-1) * np.linalg.norm(book)
    return 1 - (text @ book) / np.maximum(lengths, 1e-12)


def measure_delta(texts: list[list[str]], profile: WordProfile, n_words: int, seed: int) -> dict[str, dict]:
    """Measure Burrows' and cosine Delta between texts and the book.

    Args:
        texts: words of each.
        profile: of the book.
        n_words: Delta falls as a text grows, so it is comparable between equal amounts only: the value is the
            mean over many selections of about n_words words of the texts.
        seed: of the selections and the bootstrap.
    Returns:
        delta and cosine_delta, each {value, low, high}; cosine_delta only with an origin.
    """
    counts, lengths = count_words(texts, profile.words), np.array([len(text) for text in texts])
    size = min(len(texts), max(1, round(n_words / lengths.mean())))
    chosen = np.random.default_rng(seed).random((SELECTIONS, len(texts))).argsort(axis=1) < size
    drawn = resample(len(texts), seed, size)
    rates, redrawn = ((rows @ counts) / np.maximum(rows @ lengths, 1)[:, None] for rows in (chosen, drawn))
    measures = {"delta": burrows_delta} | ({} if profile.origin is None else {"cosine_delta": cosine_delta})
    result = {}
    for name, measure in measures.items():
        value = float(measure(rates, profile).mean())
        low, high = interval(measure(redrawn, profile), value)
        result[name] = {"value": value, "low": max(low, 0.0), "high": high}
    return result


def measure_auc(book: list[str], texts: list[str], n_texts: int, seed: int) -> dict[str, float]:
    """Ask a classifier on character n-grams to tell texts from the book: 0.5 it cannot, 1.0 always.

    Args:
        book: windows of training text, as long as the texts.
        texts: samples, or windows the author wrote.
        n_texts: a classifier that sees more texts is better, so that equal numbers are compared: the value is the
            mean over FOLDINGS selections of so many texts, each divided in its own way.
        seed: of selections, folds and bootstrap.
    Returns:
        value, low, high; every text is judged by a classifier that has not seen it (5 folds).
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline

    grams = TfidfVectorizer(analyzer="char", ngram_range=(1, 4), lowercase=False, sublinear_tf=True)
    classifier = make_pipeline(grams, LogisticRegression(C=10, max_iter=1000))
    is_book, values, redrawn = np.array([True] * len(book) + [False] * n_texts), [], []
    for number in range(seed, seed + FOLDINGS):
        chosen = np.random.default_rng(number).permutation(len(texts))[:n_texts]
        folds = StratifiedKFold(5, shuffle=True, random_state=number % 2**32)
        both = book + [texts[i] for i in chosen]
        scores = cross_val_predict(classifier, both, is_book, cv=folds, method="decision_function")
        wins = scores[is_book][:, None] - scores[~is_book][None, :]
        wins = (wins > 0) + 0.5 * (wins == 0)  # AUC is the share of pairs that stand in the right order
        values.append(wins.mean())
        drawn = resample(len(book), number), resample(n_texts, number + 1)
        redrawn.append(((drawn[0] @ wins) * drawn[1]).sum(axis=1) / wins.size - wins.mean())
    value = float(np.mean(values))
    low, high = interval(np.concatenate(redrawn), value)
    return {"value": value, "low": max(low, 0.0), "high": min(high, 1.0)}


def measure_lengths(text: str) -> dict[str, float | None]:
    """Return the words a sentence and a paragraph, None where no end of one was seen.

    Ends are counted, not sentences: a sample is cut off in the middle of its last one.
    """
    n_words = len(split_words(text))
    ends = {"sentence_words": SENTENCE_END, "paragraph_words": PARAGRAPH_END}
    counts = {name: len(end.findall(text)) for name, end in ends.items()}
    return {name: n_words / count if count else None for name, count in counts.items()}


def tabulate_words(profile: WordProfile, texts: dict[str, list[list[str]]]) -> list[dict]:
    """List the words by which the book differs most from the general text, with their rates per mille.

    Chosen by training and general text alone: no model's sample has a say in what it is measured by.

    Args:
        profile: of the book.
        texts: words of each text, by column.
    """
    origin = np.zeros(len(profile.words)) if profile.origin is None else profile.origin
    order = np.argsort(-np.abs((profile.rates - origin) / profile.spread), kind="stable")[:N_SHOWN]
    columns = {"book": profile.rates, "control": profile.origin}
    columns |= {name: word_rates(words, profile.words) for name, words in texts.items()}
    return [
        {"word": profile.words[i]} | {name: round(1000 * float(rates[i]), 2)
                                        for name, rates in columns.items() if rates is not None}
        for i in order
    ]  # fmt: skip
