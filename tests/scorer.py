"""The scorer that shares no code with the project."""

import torch


def independent_loss(model, rows):
    """Mean nats a token, by log-softmax and gather on raw logits; rows: (N, T) ids."""
    with torch.no_grad():
        logits = model(input_ids=rows).logits.double()
    log_probs = logits[:, :-1].log_softmax(-1)
    targets = rows[:, 1:]
    return -log_probs.gather(-1, targets.unsqueeze(-1)).mean().item()
