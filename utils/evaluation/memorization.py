"""Memorization: what a model reproduces of its training text, and a guard that keeps it from doing so."""

import math
from collections.abc import Callable

import numpy as np
import torch

from utils.evaluation.generation import Decoding, generate_ids
from utils.evaluation.ngrams import NGRAM_LENGTHS, NgramIndex, ngram_overlap
from utils.model.hub import position_limit

MONITOR_TOKENS = 64  # of a prompt and its continuation: a quarter and three quarters
# A book repeats its own phrases, so a rate up to this multiple of its validation text's is not copying.
COPY_FACTOR, MIN_COPY_RATE = 3, 0.01


def measure_extraction(model, eos_token_id: int, rows: list[list[int]], batch_size: int, autocast: Callable) -> dict:
    """Compare a model's greedy continuation of the first half of each row, all of one length, with the second half.

    Returns:
        exact_match (share of rows continued to their end), mean_matched (tokens before the first difference),
        prefixes (number of rows) and tokens (length of the second half).
    Source: extractable memorization, Carlini et al. 2021.
    """
    half, matched = len(rows[0]) // 2, []
    greedy = Decoding(max_new_tokens=len(rows[0]) - half, do_sample=False)
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        new = generate_ids(model, eos_token_id, [row[:half] for row in part], [0] * len(part), greedy, autocast)
        for row, ids in zip(part, new, strict=True):
            agrees = [a == b for a, b in zip(row[half:], ids, strict=False)] + [False]
            matched.append(agrees.index(False))
    exact = sum(n == greedy.max_new_tokens for n in matched) / len(matched)
    return {"exact_match": exact, "mean_matched": sum(matched) / len(matched),
            "prefixes": len(rows), "tokens": greedy.max_new_tokens}  # fmt: skip


def default_copy_rate(reference_rate: float) -> float:
    """Return the highest share of copied tokens at which a model does not count as copying."""
    return COPY_FACTOR * max(reference_rate, MIN_COPY_RATE)


class CopyMonitor:
    """Copying at every evaluation of a training: the same validation prompts, continued with the same seeds.

    Without validation text nothing is measured. `limit` is max_copy_rate, or default_copy_rate of the validation text.
    """

    def __init__(self, data, model, tokenizer, n_samples: int, max_copy_rate: float | None, seed: int) -> None:
        total = min(MONITOR_TOKENS, position_limit(model.config.to_dict()) or MONITOR_TOKENS)
        self.prompts, self.seed, self.eos_token_id = [], seed, tokenizer.eos_token_id
        self.new_tokens, self.limit = total - total // 4, math.inf
        if n_samples and len(data.validation):
            self.train = data.ids("train")
            pairs = data.validation_prompts(tokenizer, n_samples, total // 4, self.new_tokens)
            self.prompts = [prompt for prompt, _ in pairs]
            reference = ngram_overlap(data.segments("validation"), self.train)
            self.limit = max_copy_rate or default_copy_rate(reference[str(NGRAM_LENGTHS[0])])

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
    """A logits processor that lets no copied span, prompt included, grow longer than the n-grams of a training index.

    `acted` counts the tokens before which it forbade others.
    """

    def __init__(self, index: NgramIndex, eos_token_id: int) -> None:
        self.index, self.eos_token_id, self.acted = index, eos_token_id, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Forbid the tokens that would continue an n-gram of training."""
        for row, ids in enumerate(input_ids.cpu().numpy()):
            ngram = ids[(ids != self.eos_token_id).argmax() :][-self.index.length :]  # without the padding
            if len(ngram) == self.index.length and ngram[-1] != self.eos_token_id:
                forbidden = self.index.following(ngram)
                scores[row, torch.from_numpy(forbidden.astype("int64")).to(scores.device)] = -torch.inf
                self.acted += len(forbidden) > 0
        return scores
