"""Continue prompts: batches of different lengths, every sample with its own seed."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessorList

from utils.errors import UserError
from utils.model.hub import position_limit


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen; names and meanings as in transformers' generate()."""

    max_new_tokens: int = 75
    temperature: float = 0.9
    top_k: int = 0
    top_p: float = 1.0
    do_sample: bool = True
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0


class SeededSampling:
    """A logits processor that leaves one token per row, drawn with the row's own seed whatever the rows beside it.

    A token is drawn from all and accepted if it is among the top_k and the top_p. If not, the next draw is among the
    likelier tokens: the result is a draw from the top-k and top-p tokens, without sorting.
    Source: von Neumann 1951 (rejection); tests/test_generate_text.py counts the draws.
    """

    def __init__(self, seeds: list[int], decoding: Decoding) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.decoding = decoding

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return 0 for the drawn token of each row and -inf for all others."""
        weights = (scores.float() / self.decoding.temperature).softmax(-1)
        top_k = min(self.decoding.top_k or scores.shape[-1], scores.shape[-1])
        mass = weights.topk(top_k).values.sum(-1) if self.decoding.top_k else weights.sum(-1)
        if self.decoding.top_p == 1:  # rounding must not cut off very unlikely tokens
            mass = torch.full_like(mass, torch.inf)
        drawn = torch.zeros(len(scores), 1, dtype=torch.long, device=scores.device)
        rows = torch.arange(len(scores), device=scores.device)
        while len(rows):
            found = self._draw(rows.tolist(), weights)
            likelier = weights > weights.gather(1, found)
            weights = weights * likelier
            # Comparisons with NaN are false: for a diverged model this accepts any token, and the loop ends.
            again = (weights.sum(-1) >= self.decoding.top_p * mass) | (likelier.sum(-1) >= top_k)
            drawn[rows] = found
            rows, weights, mass = rows[again], weights[again], mass[again]
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)

    def _draw(self, rows: list[int], weights: torch.Tensor) -> torch.Tensor:
        """Draw a token of each row by its weight; float64 is NumPy's alone, because Apple's GPUs do not have it."""
        drawn = []
        for row, cumulative in zip(rows, np.cumsum(weights.cpu().numpy(), axis=-1, dtype=np.float64), strict=True):
            point = torch.randint(2**53, (1,), generator=self.generators[row]).item() / 2**53 * cumulative[-1]
            drawn.append(min(int(np.searchsorted(cumulative, point, side="right")), len(cumulative) - 1))
        return torch.tensor(drawn, device=weights.device)[:, None]


def encode_prompt(tokenizer, prompt: str) -> list[int]:
    """Tokenize a prompt; an empty one becomes the end-of-text token, as between GPT-2's documents."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError("prompt is not valid UTF-8") from None
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return ids or [tokenizer.eos_token_id]


def fit_context(model, prompt: list[int], new_tokens: int) -> tuple[list[int], int]:
    """Cut the new tokens to half the context at least, then the prompt from its left, so that both fit."""
    limit = position_limit(model.config.to_dict())
    if limit:
        new_tokens = min(new_tokens, max(limit - len(prompt), limit // 2))
        prompt = prompt[-(limit - new_tokens) :]
    return prompt, new_tokens


@torch.no_grad()
def generate_ids(
    model,
    eos_token_id: int,
    prompts: list[list[int]],
    seeds: list[int],
    decoding: Decoding,
    autocast: Callable,
    guard: Callable | None = None,
) -> list[list[int]]:
    """Continue prompts (token ids of any lengths) in one batch, each with its own seed; the model's mode is restored.

    Args:
        eos_token_id: ends a sample, and pads the rows on their left.
        autocast: makes the context to compute in.
        guard: logits processor applied first, such as a CopyGuard.
    Returns:
        New token ids of each prompt, without the end-of-text token.
    """
    pad = functools.partial(pad_sequence, batch_first=True, padding_side="left")
    input_ids = pad([torch.tensor(ids) for ids in prompts], padding_value=eos_token_id)
    attention_mask = pad([torch.ones(len(ids), dtype=torch.long) for ids in prompts])
    processors = LogitsProcessorList([guard] if guard else [])
    if decoding.do_sample and decoding.temperature > 0:
        processors.append(SeededSampling(seeds, decoding))
    config = GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        do_sample=False,  # the draw is SeededSampling's
        repetition_penalty=decoding.repetition_penalty,
        no_repeat_ngram_size=decoding.no_repeat_ngram_size,
        eos_token_id=eos_token_id,
        pad_token_id=eos_token_id,
    )
    was_training = model.training
    model.eval()
    with autocast():
        output = model.generate(
            input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            generation_config=config,
            logits_processor=processors,
        )
    model.train(was_training)
    new = output[:, input_ids.shape[1] :].tolist()
    return [row[: row.index(eos_token_id)] if eos_token_id in row else row for row in new]
