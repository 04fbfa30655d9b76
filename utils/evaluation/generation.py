"""Continue prompts: batches of different lengths, every sample with its own seed, longer than the context if wanted.

What chooses the next token sees the whole text of a sample; the model sees the end that fits into its context.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from utils.data.text import make_printable
from utils.data.tokenizer import encode_text, start_ids
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
        """Draw a token of each row by its weight, (B, 1). Integers add up exactly, in any order, on any device."""
        cumulative = (weights * 2.0**60).long().cumsum(-1)
        numbers = [torch.randint(2**53, (1,), generator=self.generators[row]).item() for row in rows]
        points = [number * total >> 53 for number, total in zip(numbers, cumulative[:, -1].tolist(), strict=True)]
        drawn = torch.searchsorted(cumulative, torch.tensor(points, device=weights.device)[:, None], right=True)
        return drawn.clamp_(max=weights.shape[-1] - 1)  # of a diverged model, whose weights are NaN


def encode_prompt(tokenizer, prompt: str) -> list[int]:
    """Tokenize a prompt after the start token; if both are empty, take the end-of-text token, as between documents."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError("prompt is not valid UTF-8") from None
    ids = start_ids(tokenizer) + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return ids or [tokenizer.eos_token_id]


def show_continued(tokenizer, prompt_ids: list[int], new_ids: list[int]) -> str:
    """Return a prompt, as encode_prompt gives it, and what was written to it as text that can be printed."""
    first = len(start_ids(tokenizer)) + (prompt_ids == [tokenizer.eos_token_id])
    return make_printable(tokenizer.decode(prompt_ids[first:] + new_ids))


def fit_prompt(ids: list[int], limit: int, new_tokens: int, truncate: bool, n_start: int = 0) -> list[int]:
    """Return a prompt that fits into the context of `limit` tokens; on request cut at its left, after n_start ids."""
    if len(ids) <= limit:
        return ids
    if not truncate:
        raise UserError(f"prompt has {len(ids)} tokens, the model takes {limit}; cut it or give --truncate")
    return ids[:n_start] + ids[n_start - max(limit - new_tokens, limit // 2) :]


class StopTexts:
    """Strings that end a text before them, also where they start or end within a token."""

    def __init__(self, tokenizer, stops: Sequence[str]) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        # A token has a byte at least; some tokenizers drop the space at the start of what they decode.
        self.n_tokens = max(len(stop.encode()) for stop in stops) + 4

    def cut(self, ids: list[int], n_prompt: int) -> list[int] | None:
        """Return a text's ids up to the string that its last token completes, None if there is none.

        Of a token that is cut, the part before the string is tokenized again. Where this would add a space, as some
        tokenizers do at the start of what they encode, that part is lost. The n_prompt ids of the prompt stay.
        """
        n_kept = max(0, len(ids) - self.n_tokens)
        tail = ids[n_kept:]
        text, n_seen = self.tokenizer.decode(tail), len(self.tokenizer.decode(tail[:-1]).rstrip("\ufffd"))
        found = [text.find(stop, max(0, n_seen - len(stop) + 1)) for stop in self.stops]
        if max(found) < 0:
            return None
        before = text[: min(position for position in found if position >= 0)]
        starts = [self.tokenizer.decode(tail[:n]) for n in range(len(tail) + 1)]
        fits = [n for n, start in enumerate(starts) if before.startswith(start) and n_kept + n >= n_prompt]
        for n in reversed([n for n in fits if n or not n_kept]):
            for rest in (before[len(starts[n]) :], before[len(starts[n]) :].removeprefix(" ")):
                new = encode_text(self.tokenizer, [rest])
                if self.tokenizer.decode(tail[:n] + new) == before:
                    return ids[: n_kept + n] + new
        return ids[: n_kept + fits[-1]] if fits else ids[:n_prompt]


class TokenChooser:
    """The logits processor that chooses the next token of every row by the row's whole text, prompt included.

    Args:
        rules: change the scores of a row, (V,), in place; called as rule(ids of the text, scores).
        stop: ends texts before a string; None without one.
        watch: called with the new ids of all rows after each token; generation ends when it returns True.
    """

    def __init__(
        self,
        prompts: list[list[int]],
        seeds: list[int],
        decoding: Decoding,
        eos_token_id: int,
        rules: Sequence[Callable],
        stop: StopTexts | None,
        watch: Callable[[list[list[int]]], object] | None,
    ) -> None:
        self.texts, self.windows = [list(ids) for ids in prompts], [list(ids) for ids in prompts]
        self.prompt_tokens = [len(ids) for ids in prompts]
        self.rows = list(range(len(prompts)))  # those in the batch
        self.finished = [False] * len(prompts)
        self.n_left, self.eos_token_id = decoding.max_new_tokens, eos_token_id
        self.rules, self.stop, self.watch = rules, stop, watch
        is_random = decoding.do_sample and decoding.temperature > 0
        self.sampling = SeededSampling(seeds, decoding) if is_random else None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Choose a token per row; its score becomes the highest."""
        writing = [(number, row) for number, row in enumerate(self.rows) if not self.finished[row]]
        for number, row in writing:
            for rule in self.rules:
                rule(self.texts[row], scores[number])
        if self.sampling:
            scores = self.sampling(input_ids, scores)
        chosen, self.n_left = scores.argmax(-1).tolist(), self.n_left - 1
        for number, row in writing:
            self._append(row, chosen[number])
        if self.watch and self.watch(self.new_ids()):
            self.finished = [True] * len(self.finished)
        return scores

    def _append(self, row: int, token: int) -> None:
        self.finished[row] = token == self.eos_token_id or self.n_left == 0
        if token != self.eos_token_id:
            self.texts[row].append(token)
            self.windows[row].append(token)
            cut = self.stop.cut(self.texts[row], self.prompt_tokens[row]) if self.stop else None
            if cut is not None:
                self.texts[row], self.finished[row] = cut, True

    def new_ids(self) -> list[list[int]]:
        """Return what was written to each prompt."""
        return [ids[n:] for ids, n in zip(self.texts, self.prompt_tokens, strict=True)]

    def are_finished(self, input_ids: torch.Tensor, _scores: object) -> torch.Tensor:
        """Return which rows of the batch are finished, (B,) bool: the stopping criterion of transformers."""
        return torch.tensor([self.finished[row] for row in self.rows], device=input_ids.device)

    def drop_finished(self) -> None:
        """Take the finished rows out of the batch."""
        kept = [number for number, row in enumerate(self.rows) if not self.finished[row]]
        self.rows = [self.rows[number] for number in kept]
        if self.sampling:
            self.sampling.generators = [self.sampling.generators[number] for number in kept]

    def cut_windows(self, limit: int, start: list[int]) -> list[list[int]]:
        """Return what the model sees of each row; one that reached the limit keeps `start` and its last half."""
        for row in self.rows:
            window = self.windows[row]
            if len(window) >= limit:
                self.windows[row] = start + window[len(window) - limit // 2 + len(start) :]
        return [self.windows[row] for row in self.rows]


def penalize_repetition(ids: list[int], scores: torch.Tensor, penalty: float) -> None:
    """Make the tokens of a text less likely (penalty > 1) in (V,) scores.

    Source: Keskar et al. 2019; equals transformers' processor, tests/evaluation/test_generation.py.
    """
    used = torch.tensor(sorted(set(ids)), device=scores.device)
    values = scores[used]
    scores[used] = torch.where(values < 0, values * penalty, values / penalty)


def forbid_repeated_ngrams(ids: list[int], scores: torch.Tensor, length: int) -> None:
    """Forbid the tokens that would complete an n-gram which the text has already."""
    text, n = np.array(ids), length - 1
    if len(text) > n:
        ngrams = np.lib.stride_tricks.sliding_window_view(text, n)[:-1] if n else np.zeros((len(text), 0))
        follows = text[n:][(ngrams == text[len(text) - n :]).all(axis=1)]
        scores[torch.from_numpy(follows).to(scores.device)] = -torch.inf


@torch.no_grad()
def generate_ids(
    model,
    eos_token_id: int,
    prompts: list[list[int]],
    seeds: list[int],
    decoding: Decoding,
    autocast: Callable,
    guard: Callable | None = None,
    stop: StopTexts | None = None,
    watch: Callable[[list[list[int]]], object] | None = None,
    start: Sequence[int] = (),
) -> list[list[int]]:
    """Continue prompts (token ids of any lengths) in one batch, each with its own seed; the model's mode is restored.

    A row that reaches the model's context keeps its last half and is read again from there, as often as needed. When
    this happens depends on the row's own length only.

    Args:
        eos_token_id: ends a sample, and pads the rows on their left.
        autocast: makes the context to compute in.
        guard: a rule of TokenChooser, such as a CopyGuard; stop and watch are TokenChooser's too.
        start: the tokenizer's start_ids, which stay at the start of what the model sees.
    Returns:
        New token ids of each prompt, without the end-of-text token.
    Source: equals a forward pass per token over the kept tokens, tests/evaluation/test_generation.py.
    """
    limit = position_limit(model.config.to_dict()) or sys.maxsize
    rules = [guard] if guard else []
    if decoding.no_repeat_ngram_size:
        rules.insert(0, functools.partial(forbid_repeated_ngrams, length=decoding.no_repeat_ngram_size))
    if decoding.repetition_penalty != 1:
        rules.insert(0, functools.partial(penalize_repetition, penalty=decoding.repetition_penalty))
    chooser = TokenChooser(prompts, seeds, decoding, eos_token_id, rules, stop, watch)
    pad = functools.partial(pad_sequence, batch_first=True, padding_side="left")
    was_training = model.training
    model.eval()
    with autocast():
        while chooser.rows:
            windows = chooser.cut_windows(limit, list(start))
            config = GenerationConfig(
                max_new_tokens=min(chooser.n_left, limit - max(map(len, windows))),
                # The chooser does these, whatever the model's own settings are.
                do_sample=False, repetition_penalty=1.0, no_repeat_ngram_size=0,
                eos_token_id=eos_token_id, pad_token_id=eos_token_id,
            )  # fmt: skip
            model.generate(
                pad([torch.tensor(ids) for ids in windows], padding_value=eos_token_id).to(model.device),
                attention_mask=pad([torch.ones(len(ids), dtype=torch.long) for ids in windows]).to(model.device),
                generation_config=config,
                logits_processor=LogitsProcessorList([chooser]),
                stopping_criteria=StoppingCriteriaList([chooser.are_finished]),
            )
            chooser.drop_finished()
    model.train(was_training)
    return chooser.new_ids()
