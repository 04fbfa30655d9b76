"""AdamW, its parameter groups, and the learning-rate schedule."""

import math
from collections.abc import Callable

import torch

from utils.errors import require_finite
from utils.training import sharding


def decay_groups(model, weight_decay: float) -> list[dict]:
    """Return AdamW parameter groups: matrices with weight decay, biases and norms without."""
    # Decay pulls towards zero, which makes no sense for a gain of 1.
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def build_optimizer(
    model, learning_rate: float, weight_decay: float, betas: tuple[float, float], eps: float
) -> torch.optim.AdamW:
    """Build AdamW over a model's parameters. Source: Loshchilov and Hutter 2019, arXiv 1711.05101."""
    groups = decay_groups(model, weight_decay)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=True)


def clip_gradients(model, max_norm: float) -> torch.Tensor:
    """Scale the gradients of a model down to a norm of max_norm at most; return their norm before, on the device."""
    return sharding.gather(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm))


class StepFigures:
    """Loss and gradient norm of the newest step, kept on the device: a GPU works on while they are not read.

    Where one is NaN or infinite, that step's figures stay, and AdamW leaves out its update and all later ones.
    """

    def __init__(self, device: torch.device) -> None:
        self._kept = torch.zeros(4, device=device)

    def note(self, optimizer: torch.optim.AdamW, step: int, loss: torch.Tensor, grad_norm: torch.Tensor) -> None:
        """Take the () figures of a step before its update."""
        lr = min(optimizer.param_groups[0]["lr"], torch.finfo(loss.dtype).max)
        figures = torch.stack([torch.full_like(loss, step), torch.full_like(loss, lr), loss, grad_norm])
        self._kept = torch.where(self._kept.isfinite().all(), figures, self._kept)
        # The name under which PyTorch's GradScaler tells its optimizers to leave out an update.
        optimizer.found_inf = 1 - self._kept.isfinite().all().float()

    def read(self) -> tuple[float, float]:
        """Wait for the device; return loss and norm, or raise UserError (exit status 4) where one is not finite."""
        step, lr, loss, grad_norm = self._kept.tolist()
        require_finite(f"{step:.0f} (lr {lr:g})", loss=loss, gradient=grad_norm)
        return loss, grad_norm


def build_schedule(kind: str, learning_rate: float, max_steps: int, warmup_ratio: float) -> Callable[[int], float]:
    """Return the learning rate as a function of the step, counted from 0.

    After a linear warm-up from zero to the peak learning_rate over a warmup_ratio of the steps, 'cosine' and 'linear'
    decay to zero at max_steps, 'constant' does not decay.
    """
    warmup = math.ceil(max_steps * warmup_ratio)

    def schedule(step: int) -> float:
        if step < warmup:
            return learning_rate * (step + 1) / warmup
        done = (step - warmup) / max(1, max_steps - warmup)
        factor = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
        return learning_rate * factor[kind]

    return schedule


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> float:
    """Set the learning rate of every parameter group, and return it."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr
