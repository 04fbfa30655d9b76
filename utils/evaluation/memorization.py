"""Memorization: what a model reproduces of its training text, and a guard that keeps it from doing so."""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from utils.data.tokenizer import start_ids
from utils.evaluation.generation import Decoding, generate_ids
from utils.evaluation.ngrams import NGRAM_LENGTHS, NgramIndex, longest_overlap, mark_sources, ngram_overlap
from utils.model.hub import position_limit

MONITOR_TOKENS = 64  # of a prompt and its continuation: a quarter and three quarters
MONITOR_TRAIN = 1 << 26  # training tokens that the monitor reads at each evaluation, in a second or two
N_WINDOWS = 200  # of validation text, as long as a continuation, show how much the author copies
# A book repeats its own phrases, so a rate up to this multiple of its validation text's is not copying.
COPY_FACTOR, MIN_COPY_RATE = 3, 0.01
COVERED_WORDS, COVERED_LETTERS = 5, 10  # the shortest span that covers a book; a letter of Chinese is half a word
SAMPLE_COUNTS, MOST_SAMPLES = (1, 100, 10_000), 10**12


@torch.no_grad()
def measure_extraction(
    model, rows: list[list[int]], decoding: Decoding, batch_size: int, autocast: Callable
) -> dict[str, Any]:
    """Measure how often a model continues the first half of rows, all of one length, with their second half.

    Args:
        decoding: how samples would be drawn; its penalties for repetition are left out.
    Returns:
        By greedy decoding, exact_match (share of rows continued to their end), mean_matched (tokens before the first
        difference), prefixes (number of rows) and tokens (length of the second half). Without sampling, extractable
        (for each n of SAMPLE_COUNTS, the share of rows that n samples hold with a probability of at least half),
        samples_needed (the least such n of any row, None above MOST_SAMPLES) and mean_log_prob (of the second half
        under the plain model, in nats per token).
    Source: extractable memorization, Carlini et al. 2021; (n, p)-discoverable extraction, Hayes et al. 2024.
    """
    half, matched, drawn, plain = len(rows[0]) // 2, [], [], []
    n_tokens = len(rows[0]) - half
    was_training = model.training
    model.eval()
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        input_ids = torch.tensor(part, device=model.device)
        with autocast():
            logits = model(input_ids=input_ids, use_cache=False).logits[:, half - 1 : -1]
        for targets, scores in zip(input_ids[:, half:], logits, strict=True):
            # As long as the likeliest token is the row's, greedy decoding writes the row.
            matched.append([*(scores.argmax(-1) == targets).tolist(), False].index(False))
            drawn.append(decoding_log_probs(scores, decoding).gather(1, targets[:, None]).sum().item())
            plain.append(scores.float().log_softmax(-1).gather(1, targets[:, None]).sum().item())
    model.train(was_training)
    needed = count_samples(np.array(drawn))
    return {
        "exact_match": sum(n == n_tokens for n in matched) / len(matched),
        "mean_matched": sum(matched) / len(matched),
        "prefixes": len(rows),
        "tokens": n_tokens,
        "extractable": {str(n): float((needed <= n).mean()) for n in SAMPLE_COUNTS},
        "samples_needed": int(needed.min()) if needed.min() <= MOST_SAMPLES else None,
        "mean_log_prob": sum(plain) / (len(rows) * n_tokens),
    }


def decoding_log_probs(logits: torch.Tensor, decoding: Decoding) -> torch.Tensor:
    """Return the log probabilities with which generation.SeededSampling draws each token, (T, V), from (T, V) logits.

    Source: equals transformers' warpers; tests/evaluation/test_memorization.py.
    """
    if not (decoding.do_sample and decoding.temperature > 0):
        return torch.full_like(logits, -torch.inf).scatter_(1, logits.argmax(-1, keepdim=True), 0.0)
    scores = logits.float() / decoding.temperature
    if decoding.top_p == 1 and not decoding.top_k:
        return scores.log_softmax(-1)
    weights = scores.softmax(-1)
    # NumPy sorts a vocabulary four times as fast as PyTorch on a CPU.
    ranked = np.sort(weights.cpu().numpy(), axis=-1)[:, ::-1][:, : decoding.top_k or None]
    likelier = ranked.cumsum(-1, dtype=np.float64) - ranked
    kept = (likelier < decoding.top_p * ranked.sum(-1, keepdims=True)) | (decoding.top_p == 1)
    lowest = torch.from_numpy(np.where(kept, ranked, np.inf).min(-1, keepdims=True)).to(weights)
    return scores.masked_fill(weights < lowest, -torch.inf).log_softmax(-1)


def count_samples(log_probs: np.ndarray) -> np.ndarray:
    """Return for log p, nats, the least n with 1 - (1 - p)^n >= 0.5; inf where p is 0."""
    with np.errstate(divide="ignore"):
        return np.ceil(np.log(0.5) / np.log1p(-np.exp(log_probs))).clip(min=1)


def measure_coverage(texts: list[list[str]], book: list[str], shortest: int = COVERED_WORDS) -> dict[str, float]:
    """Measure which share of a book's words stands in texts (words too), in spans of at least `shortest` words.

    Returns:
        covered (share, of all texts together), longest_words (longest span of one text) and n_words (of the book).
    Source: bmc@5 of "Alignment Whack-a-Mole", arXiv 2603.20957.
    """
    numbers = defaultdict(itertools.count().__next__)
    *rows, words = (np.array([numbers[word] for word in text], np.int64) for text in (*texts, book))
    covered = int(mark_sources(rows, words, shortest).sum())
    return {"covered": covered / max(1, len(words)), "longest_words": longest_overlap(rows, words)[0],
            "n_words": len(words)}  # fmt: skip


def default_copy_rate(reference_rate: float) -> float:
    """Return the highest share of copied tokens at which a model does not count as copying."""
    return min(COPY_FACTOR * max(reference_rate, MIN_COPY_RATE), (1 + reference_rate) / 2)


def monitor_lengths(model, tokenizer) -> tuple[int, int]:
    """Return the tokens of a prompt and of its continuation, of the texts that a training measures copying on."""
    limit = position_limit(model.config.to_dict()) or math.inf
    total = min(MONITOR_TOKENS, limit - len(start_ids(tokenizer)))
    return total // 4, total - total // 4


def measure_copy_limit(data, train: np.ndarray, n_tokens: int) -> float:
    """Return default_copy_rate of the validation text, in windows of n_tokens as the continuations."""
    # Cut like the samples: no n-gram reaches over an edge.
    windows = data.windows("validation", n_tokens, N_WINDOWS) or data.segments("validation")
    return default_copy_rate(ngram_overlap(windows, train)[str(NGRAM_LENGTHS[0])] or 0.0)


class CopyMonitor:
    """Copying at every evaluation of a training: the same validation prompts, continued with the same seeds.

    Without validation text nothing is measured. `limit` is max_copy_rate, or default_copy_rate of the validation text.
    """

    def __init__(self, data, model, tokenizer, n_samples: int, max_copy_rate: float | None, seed: int) -> None:
        start, (n_prompt, self.new_tokens) = start_ids(tokenizer), monitor_lengths(model, tokenizer)
        self.prompts, self.seed, self.eos_token_id, self.limit = [], seed, tokenizer.eos_token_id, math.inf
        if n_samples and len(data.validation):
            train = data.view("train")
            self.train = train[:MONITOR_TRAIN]
            if len(train) > MONITOR_TRAIN:
                print(f"copying is measured against the first {MONITOR_TRAIN:,} of {len(train):,} training tokens")
            pairs = data.validation_prompts(tokenizer, n_samples, n_prompt, self.new_tokens)
            self.prompts = [start + prompt for prompt, _ in pairs]
            self.limit = max_copy_rate or measure_copy_limit(data, self.train, self.new_tokens)

    def measure(self, model, autocast: Callable) -> dict[str, float]:
        """Return eval/copy_rate, the share of sampled tokens in n-grams of training; {} without prompts."""
        if not self.prompts:
            return {}
        seeds = [(self.seed + number) % 2**32 for number in range(len(self.prompts))]
        decoding = Decoding(max_new_tokens=self.new_tokens)
        new = generate_ids(model, self.eos_token_id, self.prompts, seeds, decoding, autocast)
        rate = ngram_overlap([np.array(ids, np.int64) for ids in new], self.train)[str(NGRAM_LENGTHS[0])]
        return {} if rate is None else {"eval/copy_rate": rate}


class CopyGuard:
    """Lets no copied span of a text, prompt included, grow longer than the n-grams of a training index.

    A rule of generation.TokenChooser. `acted` counts the tokens before which it forbade others.
    """

    def __init__(self, index: NgramIndex, eos_token_id: int) -> None:
        self.index, self.eos_token_id, self.acted = index, eos_token_id, 0

    def __call__(self, ids: list[int], scores: torch.Tensor) -> None:
        """Forbid, in (V,) scores, the tokens that would continue an n-gram of training; it never spans two books."""
        ngram = ids[-self.index.length :]
        if len(ngram) == self.index.length and self.eos_token_id not in ngram:
            forbidden = self.index.following(np.array(ngram))
            scores[torch.from_numpy(forbidden.astype("int64")).to(scores.device)] = -torch.inf
            self.acted += len(forbidden) > 0
