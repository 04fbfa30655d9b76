"""Held-out loss: what a model gives for text it has not seen."""

import math

import torch


@torch.no_grad()
def score_blocks(
    model, blocks, batch_size: int, autocast, progress=None, stopping: object = False
) -> tuple[float, int] | None:
    """Sum the next-token loss of a model over blocks; nothing of a training in progress changes.

    Args:
        model: causal language model on its device; its mode is put back at the end.
        blocks: rows whose input_ids come as (B, T) int64.
        batch_size: blocks a forward pass.
        autocast: function that gives the context to compute in.
        progress: called with the number of blocks just scored.
        stopping: looked at before each pass; true ends the scoring.
    Returns:
        loss_sum in nats and n_targets = N * (T - 1); None when it was stopped before the end.
    Source: equals a log-softmax/gather scorer to 1e-5; tests/test_evaluation.py.
    """
    was_training = model.training
    model.eval()  # no dropout, so no random number is drawn
    loss_sum, n_targets = 0.0, 0
    for start in range(0, len(blocks), batch_size):
        if stopping:
            model.train(was_training)
            return None
        input_ids = blocks[start : start + batch_size]["input_ids"].to(model.device)
        with autocast():
            loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss  # shifts inside
        count = input_ids[:, 1:].numel()
        loss_sum += loss.item() * count
        n_targets += count
        if progress:
            progress(len(input_ids))
    model.train(was_training)
    return loss_sum, n_targets


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
