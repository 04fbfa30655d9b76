"""Style: the distance of texts from a book in words, sentences and characters; measures on plain text."""

import unicodedata
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass

import numpy as np
import regex
from sklearn.feature_extraction.text import CountVectorizer

from utils.data.text import LETTER, MARKS, UNSPACED
from utils.evaluation.bootstrap import Estimate, center, resample_groups

SPACED = rf"[\p{{L}}--{UNSPACED}]"
WORD = regex.compile(
    rf"{LETTER.pattern}|"
    rf"(?<![{SPACED}\p{{N}}]{MARKS})(?:{SPACED}{MARKS})+(?:['\u2019](?:{SPACED}{MARKS})+)*",
    regex.VERSION1,
)
# STerm: the full stops, question and exclamation marks of all scripts. No white space follows those of Chinese.
SENTENCE_END = regex.compile(r"[\p{STerm}\u2026]+(?=[\"'\u201d\u2019)\]]*(?:\s|$))|[\u3002\uff01\uff1f\uff61]+")
PARAGRAPH_END = regex.compile(r"\n(?:[^\S\n]*\n)+")
# With fewer words, even the rates of the most frequent ones are mostly chance.
MIN_WORDS = 1500
N_FREQUENT = 150  # words that Delta counts
# Least share of them in general text of the same language: of English books in English text, 0.46 to 0.57.
MIN_SHARED = 0.15
WINDOW_WORDS = 500  # the book's own variation is measured between windows of this length
N_SHOWN = 15
SELECTIONS = 200


def split_words(text: str) -> list[str]:
    """Return the words of a text in lower case: "O'Neill, 14th" -> ["o'neill"]; of Chinese and the like, letters."""
    words = WORD.findall(unicodedata.normalize("NFC", text))
    return [word.lower().replace("\u2019", "'") for word in words]


def split_terms(text: str) -> list[str]:
    """Return what word profiles and spelling count: words; of Chinese and the like, letters and pairs of neighbors.

    "\u6211\u6765\u4e86\u3002" -> ["\u6211", "\u6765", "\u6211\u6765", "\u4e86", "\u6765\u4e86"]
    """
    if not LETTER.search(text):
        return split_words(text)
    terms, last, end = [], "", -1
    for match in WORD.finditer(unicodedata.normalize("NFC", text)):
        [word], is_letter = split_words(match[0]), LETTER.match(match[0]) is not None
        terms += [word, last + word] if is_letter and last and match.start() == end else [word]
        last, end = word if is_letter else "", match.end()
    return terms


def is_unspaced(words: list[str]) -> bool:
    """Return whether most words are letters of scripts without spaces between words."""
    return sum(LETTER.match(word) is not None for word in words) > len(words) / 2


def is_other_language(general: list[str], book: list[str]) -> bool:
    """Return whether the most frequent words of a book are rare in general text."""
    frequent = {word for word, _ in Counter(book).most_common(N_FREQUENT)}
    return sum(word in frequent for word in general) < MIN_SHARED * len(general)


@dataclass(frozen=True)
class WordProfile:
    """The most frequent words (MFW) of a book, which Delta compares; the arrays are (W,)."""

    words: list[str]
    rates: np.ndarray  # share of the book's words
    spread: np.ndarray  # standard deviation of that share between windows of the book
    origin: np.ndarray | None  # share of general text


def build_word_profile(book: str, control: str | None = None) -> WordProfile:
    """Build the profile of a training text and of general text; without words if none varies between two windows."""
    tokens = split_terms(book)
    totals = Counter(tokens)
    frequent = sorted(totals, key=lambda word: (-totals[word], word))[:N_FREQUENT]
    windows = [tokens[i : i + WINDOW_WORDS] for i in range(0, len(tokens) - WINDOW_WORDS + 1, WINDOW_WORDS)]
    if len(windows) < 2:
        return WordProfile([], np.zeros(0), np.zeros(0), None)
    spread = count_words(windows, frequent).std(axis=0, ddof=1) / WINDOW_WORDS  # of counts: exactly 0 for no change
    words = [word for word, deviation in zip(frequent, spread, strict=True) if deviation > 0]
    origin = word_rates([split_terms(control)], words) if control and split_terms(control) else None
    return WordProfile(words, word_rates([tokens], words), spread[spread > 0], origin)


def count_words(texts: list[list[str]], words: list[str]) -> np.ndarray:
    """Count words in texts that are lists of words: (n_texts, W)."""
    vectorizer = CountVectorizer(vocabulary=words, analyzer=lambda text: text, dtype=np.float64)
    return vectorizer.transform(texts).toarray()


def word_rates(texts: list[list[str]], words: list[str]) -> np.ndarray:
    """Return the share of each word in all texts together: (W,)."""
    return count_words(texts, words).sum(axis=0) / sum(map(len, texts))


def burrows_delta(rates: np.ndarray, profile: WordProfile) -> np.ndarray:
    """Return the mean distance of (..., W) rates from the book's, in the book's own standard deviations.

    Source: Burrows 2002, against one author; tests/evaluation/test_stylometry.py calculates it by hand.
    """
    return np.abs((rates - profile.rates) / profile.spread).mean(axis=-1)


def cosine_delta(rates: np.ndarray, profile: WordProfile) -> np.ndarray:
    """Return 1 - cosine of the differences of text and book from general text.

    Source: Smith and Aldridge 2011; Evert et al. 2017.
    """
    text, book = ((r - profile.origin) / profile.spread for r in (rates, profile.rates))
    lengths = np.linalg.norm(text, axis=-1) * np.linalg.norm(book)
    return 1 - (text @ book) / np.maximum(lengths, 1e-12)


def measure_delta(
    texts: list[list[str]], profile: WordProfile, n_words: int, seed: int, groups: Sequence[int] | None = None
) -> dict[str, Estimate]:
    """Measure delta and, with an origin, cosine_delta between texts (lists of words) and the book.

    Delta falls as a text grows, so only equal amounts are comparable: the value is the mean over SELECTIONS selections
    of about n_words words. Texts of one group (default: each is one) are drawn together.
    """
    counts, lengths = count_words(texts, profile.words), np.array([len(text) for text in texts])
    size = min(len(texts), max(1, round(n_words / lengths.mean())))
    chosen = np.random.default_rng(seed).random((SELECTIONS, len(texts))).argsort(axis=1) < size
    drawn, n_drawn, n_groups = resample_groups(groups or range(len(texts)), seed, size)
    rates, redrawn = ((rows @ counts) / np.maximum(rows @ lengths, 1)[:, None] for rows in (chosen, drawn))
    measures = {"delta": burrows_delta} | ({} if profile.origin is None else {"cosine_delta": cosine_delta})
    # Draws vary as one selection does, their mean over all texts varies less.
    spread = np.sqrt(n_drawn / n_groups)
    return {
        name: center(measure(rates, profile).mean(), spread * measure(redrawn, profile), n_groups)
        for name, measure in measures.items()
    }


def measure_unknown(
    texts: list[list[str]], known: Set[str], seed: int, groups: Sequence[int] | None = None
) -> Estimate:
    """Measure the share of the words of texts that are not among the known ones; groups as in measure_delta."""
    counts = np.array([[sum(word not in known for word in text), len(text)] for text in texts])
    drawn, _, n_groups = resample_groups(groups or range(len(texts)), seed)
    unknown, total = (drawn @ counts).T
    return center(counts[:, 0].sum() / counts[:, 1].sum(), unknown / np.maximum(total, 1), n_groups)


def measure_lengths(text: str) -> dict[str, float | None]:
    """Return the words per sentence and per paragraph that ends (a sample's last one is cut off); None without any."""
    n_words = len(split_words(text))
    ends = {"sentence_words": SENTENCE_END, "paragraph_words": PARAGRAPH_END}
    counts = {name: len(end.findall(text)) for name, end in ends.items()}
    return {name: n_words / count if count else None for name, count in counts.items()}


def tabulate_words(profile: WordProfile, texts: dict[str, list[list[str]]]) -> list[dict]:
    """List the words by which the book differs most from general text, with their rates per 1,000 words, by column.

    The choice depends on training and general text only, not on any sample.
    """
    origin = np.zeros(len(profile.words)) if profile.origin is None else profile.origin
    order = np.argsort(-np.abs((profile.rates - origin) / profile.spread), kind="stable")[:N_SHOWN]
    columns = {"book": profile.rates} | ({} if profile.origin is None else {"control": profile.origin})
    columns |= {name: word_rates(words, profile.words) for name, words in texts.items()}
    return [
        {"word": profile.words[i]} | {name: round(1000 * float(rates[i]), 2) for name, rates in columns.items()}
        for i in order
    ]
