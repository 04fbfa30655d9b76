"""Continue prompts: batches of different lengths, every sample with a seed of its own."""

from dataclasses import dataclass

import numpy as np
import torch

from utils.errors import UserError
from utils.evaluation.ngrams import NgramIndex
from utils.model.hub import position_limit


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen; names and meanings as in transformers' generate()."""

    max_new_tokens: int = 75
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.9
    do_sample: bool = True
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0


class SeededSampling:
    """A logits processor after which the greedy choice is a random draw, every row with a seed of its own.

    A token is drawn from all; it counts if it is among the top_k and the top_p, which the tokens likelier
    than it tell. If not, no token as unlikely is, and the next draw is among the likelier ones. That is a
    draw from what top-k and top-p leave, and nothing is sorted. A sample depends on its seed alone and not on
    the rows beside it, so base and fine-tuned model can be given the same luck.

    Source: von Neumann 1951 (rejection); tests/test_generate_text.py counts the draws.
    """

    def __init__(self, seeds: list[int], decoding: Decoding) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.decoding = decoding

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        weights = (scores.float() / self.decoding.temperature).softmax(-1)
        top_k = min(self.decoding.top_k or scores.shape[-1], scores.shape[-1])
        mass = weights.topk(top_k).values.sum(-1) if self.decoding.top_k else weights.sum(-1)
        if self.decoding.top_p == 1:  # rounding must not cut off what is very unlikely
            mass = torch.full_like(mass, torch.inf)
        drawn = torch.zeros(len(scores), 1, dtype=torch.long, device=scores.device)
        rows = torch.arange(len(scores), device=scores.device)
        while len(rows):
            found = self._draw(rows.tolist(), weights)
            likelier = weights > weights.gather(1, found)
            weights = weights * likelier
            # Not the other way round: where a diverged model gives NaN, no comparison holds, and any token will do.
            again = (weights.sum(-1) >= self.decoding.top_p * mass) | (likelier.sum(-1) >= top_k)
            drawn[rows] = found
            rows, weights, mass = rows[again], weights[again], mass[again]
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)

    def _draw(self, rows: list[int], weights: torch.Tensor) -> torch.Tensor:
        """Draw a token of each row by its weight; in float64, and so in NumPy: Apple's GPUs have no such type."""
        drawn = []
        for row, cumulative in zip(rows, np.cumsum(weights.cpu().numpy(), axis=-1, dtype=np.float64), strict=True):
            place = torch.rand(1, generator=self.generators[row], dtype=torch.float64).item() * cumulative[-1]
            drawn.append(min(int(np.searchsorted(cumulative, place, side="right")), len(cumulative) - 1))
        return torch.tensor(drawn, device=weights.device)[:, None]


class CopyGuard:
    """A logits processor that lets no verbatim run of training grow longer than the index's runs.

    What stands in the prompt counts too: a run that begins there is not drawn out.

    Args:
        index: of training, its run length is the longest run allowed.
        eos_token_id: rows that end in it are finished.
    """

    def __init__(self, index: NgramIndex, eos_token_id: int) -> None:
        self.index, self.eos_token_id, self.acted = index, eos_token_id, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for row, ids in enumerate(input_ids.cpu().numpy()):
            run = ids[(ids != self.eos_token_id).argmax() :][-self.index.length :]  # not what fills it up
            if len(run) == self.index.length and run[-1] != self.eos_token_id:
                forbidden = self.index.following(run)
                scores[row, torch.from_numpy(forbidden.astype("int64")).to(scores.device)] = -torch.inf
                self.acted += len(forbidden) > 0
        return scores


def encode_prompt(tokenizer, prompt: str) -> list[int]:
    """Tokenize a prompt; the empty one starts from the end-of-text token, as GPT-2's documents do."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError("prompt is not valid UTF-8") from None
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return ids or [tokenizer.eos_token_id]


def fit_context(model, prompt: list[int], new_tokens: int) -> tuple[list[int], int]:
    """Cut new tokens, then the prompt from its left, to a model's context; half of it at least is for what is new."""
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
    autocast,
    guard: CopyGuard | None = None,
) -> list[list[int]]:
    """Continue prompts in one batch.

    Args:
        model: causal language model; its mode is put back at the end.
        eos_token_id: ends a sample, and fills the rows to equal length from the left.
        prompts: token ids, of any lengths.
        seeds: one a prompt.
        decoding: how to choose tokens.
        autocast: function that gives the context to compute in.
        guard: keeps copied runs short; counts in `acted` the tokens before which it forbade something.
    Returns:
        New token ids of each prompt, without the end-of-text token.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    longest = max(map(len, prompts))
    input_ids = torch.full((len(prompts), longest), eos_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompts):
        input_ids[row, longest - len(ids) :] = torch.tensor(ids)
        attention_mask[row, longest - len(ids) :] = 1
    processors = LogitsProcessorList([guard] if guard else [])  # first: what is cut off is shared among the rest
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
    new = output[:, longest:].tolist()
    return [row[: row.index(eos_token_id)] if eos_token_id in row else row for row in new]
