"""The reader: a classifier on what a language model sees in a text tells the text from the book.

Features of a text in three groups: the mean hidden states of the model's middle and last layer; the surprise per
token; and how much of it the training text has elsewhere. The last needs no model and sharpens a weak one, which does
not see the faults of its own writing.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from utils.data.tokenizer import start_ids
from utils.evaluation.bootstrap import Estimate, center, resample
from utils.evaluation.ngrams import count_hashes, hash_ngrams
from utils.evaluation.stylometry import split_terms
from utils.model.hub import position_limit

NGRAMS = (1, 2, 3, 4)  # tokens
NEIGHBORHOOD = 300  # tokens around a window of training that do not count as elsewhere: one scene, the same names
FOLDS, FOLDINGS, REFITS = 5, 5, 300
RIDGE = 1.0
RUNS = 5 * FOLDS  # of neighboring windows of training, which stay on one side
PASS_TOKENS = 4096  # per forward pass, to bound the memory of its logits


@torch.no_grad()
def read_texts(model, tokenizer, texts: list[str], batch_size: int, autocast: Callable) -> list[np.ndarray]:
    """Read texts with a language model of any tokenizer.

    Returns:
        (N, 2 * width) mean hidden states of the middle and the last layer, and (N, 4) mean, standard deviation,
        median and maximum of the surprise in nats per token.
    """
    limit, hidden, surprise, lead = position_limit(model.config.to_dict()), [], [], start_ids(tokenizer)
    encoded = [lead + ids for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    # Of a single token no surprise is known: it stands twice.
    encoded = [torch.tensor((ids if len(ids) > 1 else (ids or [0]) * 2)[:limit]) for ids in encoded]
    batch_size = max(1, min(batch_size, PASS_TOKENS // max(map(len, encoded))))
    for start in tqdm(range(0, len(texts), batch_size), desc="reading", unit="batch", delay=2, leave=False):
        rows = encoded[start : start + batch_size]
        input_ids = pad_sequence(rows, batch_first=True).to(model.device)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(model.device)
        with autocast():
            output = model(input_ids=input_ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        layers = output.hidden_states[len(output.hidden_states) // 2], output.hidden_states[-1]
        for number, row in enumerate(rows):
            means = [layer[number, len(lead) : len(row)].float().mean(0) for layer in layers]
            hidden.append(torch.cat(means).cpu().numpy())
            logits = output.logits[number, : len(row) - 1].float()
            nats = F.cross_entropy(logits, input_ids[number, 1 : len(row)], reduction="none").cpu().numpy()
            surprise.append([nats.mean(), nats.std(), np.median(nats), nats.max()])
    return [np.array(hidden, np.float64), np.array(surprise, np.float64)]


class Familiarity:
    """How much of a text the training text has: its n-grams of 1 to 4 tokens, and its words.

    Args:
        train: (N,) training ids.
        words: of the training text, all or a sample of them, in which no neighborhood is looked for.
        general: words that count as known as well.
    """

    def __init__(self, train: np.ndarray, words: list[str], is_whole: bool, general: set[str], tokenizer) -> None:
        self.train, self.words, self.general = train, Counter(words), general
        self.is_whole, self.tokenizer = is_whole, tokenizer

    def measure(self, texts: list[str], starts: Sequence[int] | None = None, length: int = 0) -> np.ndarray:
        """Return (N, 9): for each n the share of n-grams known and mean log(1 + count), and the share of unknown words.

        Args:
            starts: positions in train of texts that are windows of `length` tokens of it; known is then what stands
                outside of their neighborhood.
        """
        encoded = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        near = [self.train[max(0, i - NEIGHBORHOOD) : i + length + NEIGHBORHOOD] for i in starts or ()]
        columns = []
        for n in NGRAMS:
            hashed = [hash_ngrams(np.array(ids, np.int64), n) for ids in encoded]
            counts = count_hashes(hashed, self.train, n)
            if near:
                own = [count_hashes([some], part, n)[0] for some, part in zip(hashed, near, strict=True)]
                counts = [total - part for total, part in zip(counts, own, strict=True)]
            columns.append([(count > 0).mean() if len(count) else 0.0 for count in counts])
            columns.append([np.log1p(count).mean() if len(count) else 0.0 for count in counts])
        near_words = [Counter()] * len(texts)
        if near and self.is_whole:
            near_words = [Counter(split_terms(text)) for text in self.tokenizer.batch_decode(near)]
        unknown = []
        for text, own in zip(texts, near_words, strict=True):
            words = split_terms(text)
            found = [w for w in words if self.words[w] <= own[w] and w not in self.general]
            unknown.append(len(found) / max(1, len(words)))
        return np.array([*columns, unknown]).T


def measure_auc(
    book: list[np.ndarray], texts: list[np.ndarray], groups: np.ndarray, n_texts: int, seed: int
) -> Estimate:
    """Measure how well a classifier tells texts from the book: 0.5 not at all, 1.0 always.

    More texts make a better classifier, so only equal numbers are comparable: the value is the mean over FOLDINGS
    selections of n_texts texts, each with its own cross-validation. For the draws, whole groups of texts are resampled
    and the classifier is fitted again; equal copies are one text with a weight, so none is on both sides.

    Args:
        book: feature groups of windows of training, in the book's order, each (B, F).
        texts: the same feature groups, each (N, F).
        groups: (N,) integers; texts of one group (a prompt, a longer text, the same words) stay on one side, as do
            those of a group below B and the training window of that number.
    """
    n_book = len(book[0])
    gram = _multiply([np.concatenate(both) for both in zip(book, texts, strict=True)])
    is_book = np.arange(len(gram)) < n_book
    members = np.unique(groups, return_inverse=True)[1]
    groups = np.concatenate([np.arange(n_book), groups])
    values = []
    for number in range(seed, seed + FOLDINGS):
        rng = np.random.default_rng(number)
        weights = np.ones(len(gram))
        weights[n_book + rng.permutation(len(gram) - n_book)[n_texts:]] = 0
        values.append(_cross_validate(gram, is_book, weights, _fold(groups, is_book, rng)))
    n_groups = members.max() + 1
    drawn = resample(n_groups, seed, max(1, round(n_texts * n_groups / len(members))), REFITS)[:, members]
    drawn_book, rng = resample(n_book, seed + 1, rounds=REFITS), np.random.default_rng(seed + 2)
    draws = [
        _cross_validate(gram, is_book, np.concatenate(both).astype(float), _fold(groups, is_book, rng))
        for both in zip(drawn_book, drawn, strict=True)
    ]
    return center(np.mean(values), np.array(draws), min(n_texts, n_groups))


def _multiply(features: list[np.ndarray]) -> np.ndarray:
    """Return the inner products of all texts, (N, N): every feature standardized, every group of the same weight."""
    groups = [(group - group.mean(0)) / np.maximum(group.std(0), 1e-9) / np.sqrt(group.shape[1]) for group in features]
    joined = np.concatenate(groups, axis=1)
    return joined @ joined.T


def _fold(groups: np.ndarray, is_book: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Assign texts to FOLDS parts, whole groups to one; neighbors in the book stay together."""
    names, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    n_book = is_book[first].sum()  # groups below the number of windows come first
    runs = np.arange(n_book) * RUNS // max(1, n_book)
    book = rng.permutation(RUNS)[runs] % FOLDS
    return np.concatenate([book, rng.permutation(len(names) - n_book) % FOLDS])[inverse]


def _cross_validate(gram: np.ndarray, is_book: np.ndarray, weights: np.ndarray, folds: np.ndarray) -> float:
    """Return the AUC of weighted texts by a ridge classifier that was fitted to the other folds.

    Both classes have the same weight. Solved in the dual, since there are more features than texts.
    """
    scores, targets = np.zeros(len(gram)), np.where(is_book, 1.0, -1.0)
    for fold in range(FOLDS):
        seen, unseen = np.flatnonzero((folds != fold) & (weights > 0)), np.flatnonzero(folds == fold)
        if len(set(is_book[seen])) < 2:  # all texts lie in this fold: from the others nothing can be learned, all tie
            continue
        share = weights[seen].copy()
        for side in (is_book[seen], ~is_book[seen]):
            share[side] *= 0.5 / share[side].sum()
        inner, outer = gram[np.ix_(seen, seen)], gram[np.ix_(unseen, seen)]
        mean = inner @ share
        inner = inner - mean[:, None] - mean + share @ mean  # products of differences from the weighted mean
        outer = outer - (outer @ share)[:, None] - mean + share @ mean
        root = np.sqrt(share)
        system = root[:, None] * inner * root + RIDGE / len(seen) * np.eye(len(seen))
        scores[unseen] = outer @ (root * np.linalg.solve(system, root * targets[seen]))
    used = weights > 0
    ours, theirs = is_book & used, ~is_book & used
    wins = (scores[ours][:, None] > scores[theirs]) + 0.5 * (scores[ours][:, None] == scores[theirs])
    return float(weights[ours] @ wins @ weights[theirs] / (weights[ours].sum() * weights[theirs].sum()))
