"""The loss of a model on text, and what fine-tuning gained by it."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from utils.data.tokenizer import cut_pieces, encode_text, pieces_are_exact, start_ids
from utils.evaluation.bootstrap import Estimate, center, resample
from utils.model.layers import next_token_loss

MOST_NATS = 43.0  # perplexity of a higher loss, a diverged model's, is that of this one: less than 2**63
PASS_TOKENS = 1024  # GPT-2 on a CPU, blocks of 128: 1.27 times as fast as one block per pass; 2048: 1.2 times


def blocks_per_pass(block_size: int) -> int:
    """Return how many blocks to score in one forward pass."""
    return max(1, PASS_TOKENS // block_size)


@torch.no_grad()
def score_blocks(
    model,
    blocks,
    batch_size: int,
    autocast: Callable,
    progress: Callable[[int], Any] | None = None,
    stopping: object = False,
) -> tuple[list[float], int] | None:
    """Score the next tokens of blocks; no state of a training in progress changes, nor does the model's mode.

    Args:
        blocks: rows whose input_ids come as (B, T) int64.
        batch_size: blocks per forward pass.
        autocast: makes the context to compute in.
        progress: called with the number of blocks just scored.
        stopping: ends the scoring before the next pass when true.
    Returns:
        The summed nats of each block, N floats, and n_targets = N * (T - 1); None if it was stopped.
    Source: equals a log-softmax/gather scorer to 1e-5; tests/evaluation/test_loss.py.
    """
    was_training = model.training
    model.eval()  # no dropout, so no random number is drawn
    loss_sums, n_targets = [], 0
    for start in range(0, len(blocks), batch_size):
        if stopping:
            model.train(was_training)
            return None
        input_ids = blocks[start : start + batch_size]["input_ids"].to(model.device)
        with autocast():
            logits = model(input_ids=input_ids, use_cache=False).logits
        # One block at a time: the model's own loss is the mean of all blocks of the pass.
        pairs = zip(logits.split(1), input_ids.split(1), strict=True)
        means = torch.stack([next_token_loss(block, ids, block.shape[-1]) for block, ids in pairs])  # shifts inside
        loss_sums += (means * (input_ids.shape[1] - 1)).tolist()
        n_targets += input_ids[:, 1:].numel()
        if progress:
            progress(len(input_ids))
    model.train(was_training)
    return loss_sums, n_targets


def summarize_loss(loss_sum: float, n_targets: int, bytes_per_token: float) -> dict[str, float]:
    """Return eval/loss (nats per token), eval/perplexity and eval/bits_per_byte of a loss_sum in nats."""
    loss = loss_sum / n_targets
    return {
        "eval/loss": loss,
        "eval/perplexity": math.exp(min(loss, MOST_NATS)),
        "eval/bits_per_byte": loss / (math.log(2) * bytes_per_token),
    }


def describe_result(result: dict[str, float]) -> str:
    """Put an evaluation into one line."""
    if not result:
        return "no validation blocks"
    copied = f", copied {result['eval/copy_rate']:.1%}" if "eval/copy_rate" in result else ""
    return (f"validation loss {result['eval/loss']:.4f}, perplexity {result['eval/perplexity']:.2f}, "
            f"bits per byte {result['eval/bits_per_byte']:.4f}{copied}")  # fmt: skip


def cut_blocks(text: str, tokenizer, block_size: int) -> tuple[Dataset, float]:
    """Tokenize a text into whole blocks; return them as score_blocks takes them, and UTF-8 bytes per text token."""
    pieces = cut_pieces(text) if pieces_are_exact(tokenizer, text) else [text]
    ids = encode_text(tokenizer, pieces) if text else []
    start, n_text = start_ids(tokenizer), block_size - len(start_ids(tokenizer))
    rows = [start + ids[first : first + n_text] for first in range(0, len(ids) - n_text + 1, n_text)]
    return Dataset.from_dict({"input_ids": rows}).with_format("torch"), len(text.encode()) / max(1, len(ids))


def measure_gain(scored: dict[str, dict], seed: int) -> dict[str, dict[str, float]]:
    """Compare the gain of fine-tuning on the book with the gain on general text.

    Args:
        scored: for "book" and "control", if present: "base" and "finetuned", (N,) nats per block, and "bytes", the
            scored UTF-8 bytes per block. The bootstrap draws blocks, each with both its losses.
    Returns:
        book_gain, control_gain, style_gain = book_gain - control_gain (bits per byte) and forgetting (percent more
        bits for general text), each {value, low, high}, for the texts present.
    """
    estimates = {}
    for number, text in enumerate(("book", "control")):
        if text in scored:
            nats = np.stack([np.asarray(scored[text][name]) for name in ("base", "finetuned")], axis=1)
            count = len(nats)
            # Item 0: the blocks as they are; then those drawn.
            base, finetuned = (np.concatenate([np.ones((1, count)), resample(count, seed + number)]) @ nats).T
            gain = (base - finetuned) / (count * scored[text]["bytes"] * math.log(2))
            estimates[f"{text}_gain"] = center(gain[0], gain[1:], count)
    if len(estimates) == 2:
        book, general = estimates["book_gain"], estimates["control_gain"]
        estimates["style_gain"] = Estimate(book.value - general.value, book.draws - general.draws)
    if "control" in scored:  # the loop ended with it
        percent = 100 * (finetuned / base - 1)
        estimates["forgetting"] = center(percent[0], percent[1:], count)
    return {name: estimate.interval() for name, estimate in estimates.items()}
