"""What is decided before the first step of a training: device, length, batch order, schedule, intervals."""

import ctypes
import sys

import torch

from utils.data.blocks import BatchOrder
from utils.model.loading import autocast, pick_dtype
from utils.training.optim import build_schedule


class TrainingSetup:
    """The way of a training, from its flags, its data and its device.

    What the model must be there for comes later: the copy probe, and how many blocks it takes at once.

    Args:
        args: the flags.
        data: Blocks.
        device: to compute on.
        begun_on: what the state of a run that goes on says of its machine.
    """

    def __init__(self, args, data, device: torch.device, begun_on: dict | None = None) -> None:
        self.device, self.dtype = device, pick_dtype(args.dtype, device)
        self.order = BatchOrder(len(data.train), args.batch_size, args.grad_accum_steps, args.seed)
        self.max_steps = args.max_steps or args.epochs * self.order.steps_per_epoch
        self.eval_every = args.eval_every or max(1, self.max_steps // 10)
        self.save_every = args.save_every or self.eval_every
        self.schedule = build_schedule(args.lr_schedule, args.learning_rate, self.max_steps, args.warmup_ratio)
        # A run begun before there were faster layers goes on without them, to the same end.
        self.layers = begun_on.get("layers", "plain") if begun_on else "fast"
        self.micro_batch_size, self.probe = args.batch_size, None

    def autocast(self):
        """Return the context to compute in."""
        return autocast(self.device, self.dtype)


def keep_freed_memory(most: int = 2**30) -> None:
    """Have the C library keep freed memory for this process; does nothing where it is not glibc.

    By itself it gives every tensor of more than 32 MB, such as a batch's logits, back to the system, from where it
    comes again page by page, each filled with zeros first: a tenth of a training's time on a CPU.

    Args:
        most: bytes of the largest tensor that is kept.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        map_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD in malloc.h
        libc.mallopt(map_threshold, most)
        libc.mallopt(trim_threshold, min(2 * most, 2**31 - 1))
