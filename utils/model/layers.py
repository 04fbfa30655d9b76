"""A model's own functions in fewer passes over memory: activation, dropout, attention, loss.

Each computes what the layer it replaces computes, up to rounding. Where the time goes: notes/03_training_loop.md.
"""

import torch
from torch.nn.functional import pad

# Rows of logits at once: float32 copies of so few stay in a processor's cache; on a GPU fewer launches count.
ROWS = {"cpu": 16}
ROWS_ELSEWHERE = 2048


def use_fast_layers(model, device: torch.device, compiled: bool = False) -> None:
    """Give a model the faster forms of its layers and of its loss; weights and config stay as they are.

    Args:
        model: causal language model of transformers.
        device: only a CPU's dropout is replaced, a GPU's is fast.
        compiled: compile the model's repeated layers, which then have fast dropout of their own.
    """
    from transformers.activations import NewGELUActivation
    from transformers.modeling_layers import GradientCheckpointingLayer
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    slow_dropout = device.type == "cpu" and not compiled
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            faster = torch.nn.GELU(approximate="tanh") if isinstance(child, NewGELUActivation) else None
            if type(child) is torch.nn.Dropout and slow_dropout:
                faster = FastDropout(child.p)
            if faster:
                setattr(module, name, faster.train(child.training))
        if slow_dropout and hasattr(module, "is_causal"):
            module.drops_cheaply = True  # attend() is called for every model of this process
        if compiled and isinstance(module, GradientCheckpointingLayer):  # what transformers' models are stacked from
            module.compile()
    if slow_dropout:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    model.loss_function = next_token_loss


class FastDropout(torch.nn.Dropout):
    """Dropout that draws one random number of 64 bits for four elements."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return drop(values, self.p) if self.training else values


def drop(values: torch.Tensor, rate: float) -> torch.Tensor:
    """Set each element to zero with a probability of `rate`, to within 2 ** -17, and scale up the others.

    PyTorch's dropout on a CPU draws a random number for each element, in one thread.
    """
    n_dropped = round(rate * 2**16)  # of the 2 ** 16 values that 16 bits have
    if not n_dropped:
        return values
    drawn = torch.empty(-(-values.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = drawn.view(torch.int16)[: values.numel()].view(values.shape) >= n_dropped - 2**15
    return values * (kept.to(values.dtype) * (2**16 / (2**16 - n_dropped)))


def attend(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **options):
    """Attend as transformers' sdpa does; its dropout on a CPU falls back to a slow form, this one does not.

    Args:
        query, key, value: (B, H, T, D).
        attention_mask: None for plain causal attention.
        dropout: rate, on the attention weights.
        scaling: of the scores.
    Returns:
        (B, T, H, D) and None, for the attention weights that are not returned.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    wanted = dropout and getattr(module, "drops_cheaply", False) and query.device.type == "cpu"
    if not wanted or attention_mask is not None or not module.is_causal or query.shape != key.shape:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    n_tokens, width = query.shape[2:]
    q, k, v = (part.reshape(-1, n_tokens, width) for part in (query, key, value))
    future = torch.full((n_tokens, n_tokens), -torch.inf, dtype=q.dtype).triu(1)
    scores = torch.baddbmm(future, q, k.transpose(1, 2), alpha=width**-0.5 if scaling is None else scaling)
    output = torch.bmm(drop(scores.softmax(-1), dropout), v)
    return output.view(query.shape).transpose(1, 2).contiguous(), None


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **_options) -> torch.Tensor:
    """Return the mean next-token loss; takes the place of transformers' loss, which it equals.

    The model calls it as it calls that one, with labels = input_ids: the shift is here, in the model's own loss.

    Args:
        logits: (B, T, V), of any float type.
        labels: (B, T), not shifted.
        vocab_size: V.
    Returns:
        Nats a token, float32.
    Source: equals a log-softmax/gather scorer to 1e-5; tests/model/test_layers.py.
    """
    targets = pad(labels, (0, 1), value=-1)[:, 1:].reshape(-1)
    return _NextTokenLoss.apply(logits.view(-1, vocab_size), targets, labels[:, 1:].numel())


class _NextTokenLoss(torch.autograd.Function):
    """The gradient is made along with the loss, so that float32 logits of a few rows only are ever there."""

    @staticmethod
    def forward(ctx, logits: torch.Tensor, targets: torch.Tensor, n_targets: int) -> torch.Tensor:
        rows = ROWS.get(logits.device.type, ROWS_ELSEWHERE)
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        loss_sum = torch.zeros((), device=logits.device)
        # One for all rows: memory that is asked for anew is filled with zeros by the system each time.
        room = torch.empty(min(rows, len(logits)), logits.shape[1], device=logits.device)
        for start in range(0, len(logits), rows):
            column = targets[start : start + rows, None]
            weight = (column >= 0).float() / n_targets  # a block's last token has no target
            column = column.clamp(min=0)
            scores = room[: len(column)].copy_(logits[start : start + rows])
            scores -= scores.amax(-1, keepdim=True)  # so that no exponential overflows
            chosen = scores.gather(1, column)
            total = scores.exp_().sum(-1, keepdim=True)
            loss_sum -= ((chosen - total.log()) * weight).sum()
            if gradient is not None:
                gradient[start : start + rows] = scores.mul_(weight / total).scatter_add_(1, column, -weight)
        ctx.save_for_backward(gradient)
        return loss_sum

    @staticmethod
    def backward(ctx, outer: torch.Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(outer.to(gradient.dtype)), None, None
