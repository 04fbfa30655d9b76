"""The training setup: everything that is decided before the first step."""

import ctypes
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from utils.data.blocks import BatchOrder
from utils.evaluation.memorization import CopyMonitor
from utils.model.hub import hash_model
from utils.storage import hash_files

# Flags that do not shape the result: a run may be resumed with other values of these.
FREE_FLAGS = {
    "data_dir", "output_dir", "overwrite", "device", "num_workers", "save_every", "keep_checkpoints", "log_every",
    "report_to", "sample_prompt", "sample_tokens", "micro_batch_size", "dry_run", "process_timeout",
    "gradient_checkpointing",
}  # fmt: skip


@dataclass(frozen=True)
class TrainingSetup:
    """Settings of a training, decided once and never changed. Fields named like a flag have that flag's meaning.

    Steps are optimizer steps. `autocast` returns the context of a forward pass, `schedule` the learning rate of a step
    counted from 0; `micro_batch_size` is in blocks per forward pass; `save_every` is None where the forecast decides.
    """

    device: torch.device
    dtype: str
    autocast: Callable[[], AbstractContextManager]
    order: BatchOrder
    max_steps: int
    micro_batch_size: int
    schedule: Callable[[int], float]
    max_grad_norm: float
    seed: int
    output_dir: Path
    eval_every: int
    eval_batch_size: int
    early_stopping_patience: int | None
    copy_monitor: CopyMonitor
    sample_ids: list[int]
    sample_tokens: int
    save_every: int | None
    save_dtype: str
    keep_checkpoints: int
    log_every: int
    report_to: str
    num_workers: int


def collect_settings(flags: dict, data_sha256: str, base: str, folder: Path | None) -> dict:
    """Return everything that shapes the result of a run; equal settings, equal run.

    Args:
        base: name of the base model, in `folder`; None where a hub model has left the cache.
    """
    settings = {name: value for name, value in flags.items() if name not in {*FREE_FLAGS, "model_name"}}
    config = settings["from_scratch"]
    settings |= {"from_scratch": config and str(config), "lora_rank": settings["lora_rank"] or None}
    settings |= {"data_sha256": data_sha256, "model_name": None if config else base}
    if config and config.is_file():
        settings["base_sha256"] = hash_files([config])
    elif folder:
        settings["base_sha256"] = hash_model(folder)
    return settings


def keep_freed_memory(most: int = 2**30) -> None:
    """Have glibc keep freed memory for this process; does nothing with another C library, or under torchrun.

    By default it returns every tensor above 32 MB, such as a batch of logits, to the system, which zeroes each page
    before it hands it out again: a tenth of a training's time on a CPU. `most` is the largest tensor kept, in bytes.
    Several processes share the memory, and what they gather has many sizes: kept, it would take a third more.
    """
    is_alone = os.environ.get("WORLD_SIZE", "1") == "1"
    libc = ctypes.CDLL(None) if sys.platform == "linux" and is_alone else None
    if hasattr(libc, "mallopt"):
        map_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD in malloc.h
        libc.mallopt(map_threshold, most)
        libc.mallopt(trim_threshold, min(2 * most, 2**31 - 1))
