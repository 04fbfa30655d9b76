"""Saving: how much of the loop's time the best model and the checkpoints take at the default intervals, 124M."""

import math
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from benchmarks.timing import main
from benchmarks.training import BLOCK, TINY
from finetune_generative import forward_backward
from utils.model.layers import use_fast_layers
from utils.model.loading import autocast, pick_dtype
from utils.training.checkpoint import TrainState, checkpoint_bytes, save_best, save_checkpoint
from utils.training.forecast import NOTICED_SECONDS, SAVED_BYTES_PER_SECOND, SAVING_FACTOR
from utils.training.optim import build_optimizer
from utils.training.setup import keep_freed_memory

BASE = Path("results/base_model")
BOOKS = {"a book of 300 blocks": 300, "a book of 2,650 blocks": 2650}


def measure(quick: bool) -> dict:
    """Time the two saves and a step of 8 blocks in turn; figure their share of a run of 3 epochs."""
    keep_freed_memory()
    device, tokenizer = torch.device("cpu"), AutoTokenizer.from_pretrained(BASE)
    model = GPT2LMHeadModel(GPT2Config(**(TINY if quick else {}))).train()
    use_fast_layers(model, device)
    optimizer = build_optimizer(model, 5e-5, 0.01, (0.9, 0.999), 1e-8)
    input_ids = torch.randint(0, 50257, (8, BLOCK))
    values: dict[str, list[float]] = {"step of 8 blocks": [], "best model": [], "checkpoint": []}

    def update() -> None:
        with autocast(device, pick_dtype("auto", device)):
            forward_backward(model, input_ids, 1.0)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    update()
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name)
        for step in range(2 if quick else 5):
            for what, call in (
                ("step of 8 blocks", update),
                ("best model", lambda: save_best(folder, model, tokenizer, torch.float32)),
                ("checkpoint", lambda: save_checkpoint(folder, model, tokenizer, optimizer, TrainState(step=step), 2)),  # noqa: B023
            ):
                started = time.perf_counter()
                call()
                values[what].append(time.perf_counter() - started)
    middle = {what: statistics.median(seconds) for what, seconds in values.items()}
    targets = []
    for book, n_blocks in BOOKS.items():
        between = max(1, 3 * math.ceil(n_blocks / 8) // 10) * middle["step of 8 blocks"]
        expected, times = checkpoint_bytes(model) / SAVED_BYTES_PER_SECOND, 1
        if expected > NOTICED_SECONDS:
            times = math.ceil(SAVING_FACTOR * expected / between)
        share = (middle["best model"] + middle["checkpoint"] / times) / between
        targets.append({"what": f"share of the loop's time, {book}, a checkpoint every {times} evaluations",
                        "value": share, "wanted": "<= 0.05"})  # fmt: skip
    title, facts = (
        "Saving, GPT-2 124M, every evaluation the best so far",
        {"checkpoint_gb": checkpoint_bytes(model) / 1e9},
    )
    return {"title": title, "unit": "s", "values": values, "ours": "checkpoint", "targets": targets, "facts": facts}


if __name__ == "__main__":
    main(measure)
