"""Faster forms of a model's activation, dropout, attention and loss, equal to them up to rounding.

notes/03_training_loop.md has the measurements.
"""

import functools
from collections.abc import Callable

import torch
from torch.nn.functional import linear, pad
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.activations import NewGELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer

# Rows of logits per pass: on a CPU their float32 copies stay in the cache; on a GPU fewer kernel launches count.
CPU_ROWS, GPU_ROWS = 16, 2048
ALIGNED = 64  # GPT-2's 50,257 logits per token make a GPU's matrix product several times slower than 50,304 do
SHORT = 256  # tokens up to which sdpa's backward pass takes longer than that of plain matrix products, in bf16
FAST_ATTENTION, CAUSAL_ATTENTION = "sdpa_fast_training", "sdpa_causal"
CAUSAL_FAMILIES = {"gpt2", "llama"}  # without windows and position biases: nothing but the future is hidden


def use_fast_layers(model, device: torch.device, compiled: bool = False) -> None:
    """Replace a model's layers and loss by faster forms; weights and saved config stay as they are.

    Dropout and attention are replaced where PyTorch's are slow: on a CPU, unless the model's repeated layers are
    `compiled`. On a GPU, the output layer gets a width that suits its matrix units, and the loss is compiled along with
    the layers.
    """
    is_slow = device.type == "cpu" and not compiled
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            faster = torch.nn.GELU(approximate="tanh") if isinstance(child, NewGELUActivation) else None
            if type(child) is torch.nn.Dropout and is_slow:
                faster = FastDropout(child.p)
            if faster:
                setattr(module, name, faster.train(child.training))
        if compiled and isinstance(module, GradientCheckpointingLayer):  # the base class of repeated layers
            module.compile()
    if is_slow and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(FAST_ATTENTION)
    model.loss_function = next_token_loss
    if device.type == "cuda":
        head = model.get_output_embeddings()
        if type(head) is torch.nn.Linear and head.bias is None:
            head.forward = functools.partial(align_logits, head)
        if model.config.model_type in CAUSAL_FAMILIES and model.config._attn_implementation == "sdpa":
            model.register_forward_pre_hook(leave_out_mask, with_kwargs=True)
        if compiled:
            model.loss_function = functools.partial(next_token_loss, compute=torch.compile(compute_fused, dynamic=True))


def leave_out_mask(model, _inputs: tuple, options: dict) -> None:
    """Choose the attention of a forward pass: without padding and cache, one that needs no mask.

    transformers looks for packed sequences before it makes a mask, and waits for the GPU to see the answer.
    """
    needs_mask = options.get("attention_mask") is not None or options.get("use_cache", True)
    model.config._attn_implementation = "sdpa" if needs_mask else CAUSAL_ATTENTION


def align_logits(head: torch.nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    """Return an output layer's logits, in training with columns of zeros up to a multiple of ALIGNED."""
    extra = -head.out_features % ALIGNED if head.training else 0
    return linear(hidden, pad(head.weight, (0, 0, 0, extra)) if extra else head.weight)


class FastDropout(torch.nn.Dropout):
    """Dropout that draws 64 random bits per four elements; PyTorch draws a number per element, in one thread."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return fast_dropout(values, self.p) if self.training else values


def fast_dropout(values: torch.Tensor, rate: float) -> torch.Tensor:
    """Zero each element with probability `rate`, exact to 2 ** -17, and scale up the others."""
    n_dropped = round(rate * 2**16)  # of the 2 ** 16 values that 16 bits have
    if not n_dropped:
        return values
    if n_dropped == 2**16:  # 16 bits cannot keep less than one in 2 ** 16
        return torch.nn.functional.dropout(values, rate)
    drawn = torch.empty(-(-values.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = drawn.view(torch.int16)[: values.numel()].view(values.shape) >= n_dropped - 2**15
    return values * (kept.to(values.dtype) * (2**16 / (2**16 - n_dropped)))


def fast_attention(module, query, key, value, attention_mask, dropout=0.0, **options):
    """Compute transformers' sdpa attention; on a CPU, PyTorch's is slow with dropout, and in training on short blocks.

    It computes in float32. A trained model's scores are large: rounded to bf16, they put more noise than signal into
    the gradient (tests/model/test_layers.py).

    Args:
        query, key: (B, H, T, D).
        value: (B, H, T, V).
        attention_mask: None for causal attention; any other, a position bias and grouped keys are left to sdpa.
    Returns:
        (B, T, H, V), and None in place of the attention weights.
    """
    is_causal = options.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    is_plain = attention_mask is None and options.get("position_bias") is None and query.shape == key.shape
    is_slow = dropout or (module.training and query.shape[2] <= SHORT)
    if not (is_causal and is_plain and is_slow):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, **options)
    n_tokens, width = query.shape[2:]
    q, k, v = (part.reshape(-1, n_tokens, part.shape[-1]).float() for part in (query, key, value))
    future = torch.full((n_tokens, n_tokens), -torch.inf).triu(1)
    with torch.autocast("cpu", enabled=False):
        scores = torch.baddbmm(future, q, k.transpose(1, 2), alpha=options.get("scaling") or width**-0.5)
        output = torch.bmm(fast_dropout(scores.softmax(-1), dropout), v)
    return output.to(query.dtype).view(value.shape).transpose(1, 2).contiguous(), None


# A name of its own: under "sdpa" it would replace the attention of every model in the process.
AttentionInterface.register(FAST_ATTENTION, fast_attention)
AttentionMaskInterface.register(FAST_ATTENTION, sdpa_mask)
AttentionInterface.register(CAUSAL_ATTENTION, sdpa_attention_forward)  # and no mask for it


def next_token_loss(
    logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, compute: Callable | None = None, **_options
) -> torch.Tensor:
    """Return the mean next-token loss in nats per token, float32, as the loss_function of a transformers model.

    Args:
        logits: (B, T, V) or wider, of any float type; columns from vocab_size on do not count.
        labels: (B, T) input_ids, unshifted; a negative one is no target.
        compute: compute_fused, or by default compute_in_rows.
    Source: equals a log-softmax/gather scorer to 1e-5; tests/model/test_layers.py.
    """
    targets = pad(labels, (0, 1), value=-1)[:, 1:].reshape(-1)
    return _NextTokenLoss.apply(logits.view(-1, logits.shape[-1]), targets, vocab_size, compute or compute_in_rows)


class _NextTokenLoss(torch.autograd.Function):
    """Compute the gradient along with the loss, so that float32 logits exist for a few rows at a time only."""

    @staticmethod
    def forward(ctx, logits: torch.Tensor, targets: torch.Tensor, vocab_size: int, compute: Callable) -> torch.Tensor:
        loss, gradient = compute(logits, targets, vocab_size, ctx.needs_input_grad[0])
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx, outer: torch.Tensor):
        (gradient,) = ctx.saved_tensors
        # In place, since it is as large as the logits; autograd refuses a second backward pass over what was changed.
        return gradient.mul_(outer), None, None, None


def compute_in_rows(
    logits: torch.Tensor, targets: torch.Tensor, vocab_size: int, wants_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the loss of (N, W) logits and its gradient, a few rows at a time; None where no gradient is wanted."""
    rows = CPU_ROWS if logits.device.type == "cpu" else GPU_ROWS
    gradient = torch.empty_like(logits) if wants_gradient else None
    loss_sum = torch.zeros((), device=logits.device)
    n_targets = (targets >= 0).sum()
    # One buffer for all rows: the system fills newly allocated memory with zeros each time.
    buffer = torch.empty(min(rows, len(logits)), vocab_size, device=logits.device)
    for start in range(0, len(logits), rows):
        column = targets[start : start + rows, None]
        weight = (column >= 0).float() / n_targets  # a block's last token has no target
        column = column.clamp(min=0)
        scores = buffer[: len(column)].copy_(logits[start : start + rows, :vocab_size])
        scores -= scores.amax(-1, keepdim=True)  # so that no exponential overflows
        chosen = scores.gather(1, column)
        total = scores.exp_().sum(-1, keepdim=True)
        loss_sum -= ((chosen - total.log()) * weight).sum()
        if gradient is not None:
            gradient[start : start + rows, vocab_size:] = 0
            gradient[start : start + rows, :vocab_size] = scores.mul_(weight / total).scatter_add_(1, column, -weight)
    return loss_sum, gradient


def compute_fused(
    logits: torch.Tensor, targets: torch.Tensor, vocab_size: int, wants_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the same as compute_in_rows, in a form that torch.compile makes two kernels of."""
    columns = torch.arange(logits.shape[1], device=logits.device)
    scores = logits.float().masked_fill(columns >= vocab_size, -torch.inf)
    weight = (targets >= 0).float() / (targets >= 0).sum()
    column = targets.clamp(min=0)[:, None]
    log_total = scores.logsumexp(-1, keepdim=True)
    loss = ((log_total - scores.gather(1, column))[:, 0] * weight).sum()
    if not wants_gradient:
        return loss, None
    gradient = ((scores - log_total).exp() - (columns == column).float()) * weight[:, None]
    return loss, gradient.to(logits.dtype)
