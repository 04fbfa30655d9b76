"""What a model gives for text: its loss, what the fine-tuning gained and lost, what it knows by heart."""

import math

import numpy as np
import torch

from utils.evaluation.ngrams import NGRAM_LENGTHS, ngram_overlap
from utils.evaluation.stylometry import interval, resample
from utils.model.hub import position_limit

PREFIX_TOKENS = 32
PROBE_TOKENS = 64  # a validation prompt and its continuation, a quarter and three quarters
# A book repeats its own phrases: so many times what its unseen pages share with training is still no copying.
COPY_FACTOR, LEAST_COPY_RATE = 3, 0.01


@torch.no_grad()
def score_blocks(
    model, blocks, batch_size: int, autocast, progress=None, stopping: object = False
) -> tuple[list[float], int] | None:
    """Score the next tokens of blocks with a model; nothing of a training in progress changes.

    Args:
        model: causal language model on its device; its mode is put back at the end.
        blocks: rows whose input_ids come as (B, T) int64.
        batch_size: blocks a forward pass.
        autocast: function that gives the context to compute in.
        progress: called with the number of blocks just scored.
        stopping: looked at before each pass; true ends the scoring.
    Returns:
        The summed nats of each forward pass, and n_targets = N * (T - 1) of all; None when it was stopped.
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
            loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss  # shifts inside
        count = input_ids[:, 1:].numel()
        loss_sums.append(loss.item() * count)
        n_targets += count
        if progress:
            progress(len(input_ids))
    model.train(was_training)
    return loss_sums, n_targets


def summarize_loss(loss_sum: float, n_targets: int, bytes_per_token: float) -> dict[str, float]:
    """Turn a summed loss into the three figures that are reported.

    Args:
        loss_sum: nats.
        n_targets: tokens scored.
        bytes_per_token: UTF-8 bytes a token of the scored text, which makes models with different
            tokenizers comparable.
    Returns:
        eval/loss (nats a token), eval/perplexity, eval/bits_per_byte.
    """
    loss = loss_sum / n_targets
    return {
        "eval/loss": loss,
        "eval/perplexity": math.exp(min(loss, 700)),  # a diverged model must not crash the report
        "eval/bits_per_byte": loss / (math.log(2) * bytes_per_token),
    }


def describe_result(result: dict[str, float]) -> str:
    """Put an evaluation into a line."""
    if not result:
        return "no validation blocks"
    copied = f", copied {result['eval/copy_rate']:.1%}" if "eval/copy_rate" in result else ""
    return (f"validation loss {result['eval/loss']:.4f}, perplexity {result['eval/perplexity']:.2f}, "
            f"bits per byte {result['eval/bits_per_byte']:.4f}{copied}")  # fmt: skip


def cut_blocks(text: str, tokenizer, block_size: int):
    """Tokenize a text into whole blocks.

    Returns:
        Rows as score_blocks takes them, and UTF-8 bytes a token.
    """
    from datasets import Dataset

    from utils.data.tokenizer import cut_pieces, encode_text, pieces_are_exact

    pieces = cut_pieces(text) if pieces_are_exact(tokenizer, text) else [text]
    ids = encode_text(tokenizer, pieces) if text else []
    rows = [ids[start : start + block_size] for start in range(0, len(ids) - block_size + 1, block_size)]
    return Dataset.from_dict({"input_ids": rows}).with_format("torch"), len(text.encode()) / max(1, len(ids))


def measure_gain(scored: dict[str, dict], seed: int) -> dict:
    """Compare what fine-tuning gained on the book with what it gained on general text.

    Args:
        scored: for "book" and "control", either may lack: nats of each block by the base and the finetuned
            model, (N,), and bytes, the UTF-8 bytes of what was scored in a block.
        seed: of the bootstrap, which draws blocks, each with both its losses.
    Returns:
        book_gain, control_gain, style_gain = book_gain - control_gain (bits a byte), and forgetting (percent
        by which general text costs more bits than before), each {value, low, high}, as far as there is text.
    """
    bits, figures = {}, {}
    for number, text in enumerate(("book", "control")):
        if text in scored:
            nats = np.stack([np.asarray(scored[text][name]) for name in ("base", "finetuned")], axis=1)
            drawn = np.concatenate([np.ones((1, len(nats))), resample(len(nats), seed + number)])  # row 0: as it is
            bits[text] = (drawn @ nats) / (len(nats) * scored[text]["bytes"] * math.log(2))
            figures[f"{text}_gain"] = bits[text][:, 0] - bits[text][:, 1]
    if len(bits) == 2:
        figures["style_gain"] = figures["book_gain"] - figures["control_gain"]
    if "control" in bits:
        figures["forgetting"] = 100 * (bits["control"][:, 1] / bits["control"][:, 0] - 1)
    return {name: dict(zip(("value", "low", "high"), (float(v[0]), *interval(v[1:])), strict=True))
            for name, v in figures.items()}  # fmt: skip


def measure_extraction(model, eos_token_id: int, rows: list[list[int]], batch_size: int, autocast) -> dict:
    """Give a model the beginning of each row, and compare its greedy continuation with the rest.

    Args:
        rows: token ids, all of one length; the first half is the prefix.
    Returns:
        exact_match (share of rows continued to their end), mean_matched (tokens before the first difference),
        prefixes and tokens (how many, and how long the rest is).
    Source: Carlini et al. 2021 call a text that is continued so extractable.
    """
    from utils.evaluation.generation import Decoding, generate_ids

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


def default_copy_rate(heldout_rate: float) -> float:
    """Return the share of copied tokens up to which a model counts as not copying."""
    return COPY_FACTOR * max(heldout_rate, LEAST_COPY_RATE)


class CopyMonitor:
    """The same few validation prompts continued with the same seeds at every evaluation, to see copying grow.

    Args:
        args: the flags copy_samples (prompts, 0 for none), max_copy_rate (None: default_copy_rate), seed.
        data: Blocks; without validation text nothing is measured.
        model, tokenizer: of the training.
    """

    def __init__(self, args, data, model, tokenizer) -> None:
        total = min(PROBE_TOKENS, position_limit(model.config.to_dict()) or PROBE_TOKENS)
        self.prompts, self.seed, self.eos_token_id = [], args.seed, tokenizer.eos_token_id
        self.new_tokens, self.limit = total - total // 4, math.inf
        if args.copy_samples and len(data.validation):
            self.train = data.ids("train")
            pairs = data.validation_prompts(tokenizer, args.copy_samples, total // 4, self.new_tokens)
            self.prompts = [prompt for prompt, _ in pairs]
            heldout_rate = ngram_overlap(data.segments("validation"), self.train)
            self.limit = args.max_copy_rate or default_copy_rate(heldout_rate[str(NGRAM_LENGTHS[0])])

    def measure(self, model, autocast) -> dict[str, float]:
        """Return eval/copy_rate, the share of sampled tokens in runs of training; {} without a probe."""
        from utils.evaluation.generation import Decoding, generate_ids

        if not self.prompts:
            return {}
        seeds = [(self.seed + number) % 2**32 for number in range(len(self.prompts))]
        decoding = Decoding(max_new_tokens=self.new_tokens)
        new = generate_ids(model, self.eos_token_id, self.prompts, seeds, decoding, autocast)
        rate = ngram_overlap([np.array(ids, np.int64) for ids in new], self.train)[str(NGRAM_LENGTHS[0])]
        return {} if rate is None else {"eval/copy_rate": rate}
