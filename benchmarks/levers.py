"""Levers: how much slower the training is when one of its means is taken away, and what did not help."""

import contextlib
import operator
import random
import statistics
import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.activations import NewGELUActivation
from transformers.loss.loss_utils import ForCausalLMLoss

from benchmarks.timing import main
from benchmarks.training import BLOCK, TINY
from finetune_generative import forward_backward
from utils.model.layers import FastDropout, use_fast_layers
from utils.model.loading import autocast
from utils.training.setup import keep_freed_memory

TOKENS = 4096  # of a step: two micro-batches of 16 blocks
LABELS = {"nothing": "all means", "all of them": "bf16 alone", "--compile": "all means, and --compile"}


def build(quick: bool, without: str):
    """Return a function that does TOKENS tokens of forward and backward pass with all means but one, or with none."""
    device, none = torch.device("cpu"), without == "all of them"
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**(TINY if quick else {}))).train()
    if not none:
        use_fast_layers(model, device, compiled=without == "--compile")
    replaced = {"fused GELU": (torch.nn.GELU, lambda _: NewGELUActivation()),
                "fast dropout": (FastDropout, lambda layer: torch.nn.Dropout(layer.p))}  # fmt: skip
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if without in replaced and isinstance(child, replaced[without][0]):
                setattr(module, name, replaced[without][1](child))
    if without == "loss with its gradient":
        model.loss_function = ForCausalLMLoss
    at_once = 8 if none or without == "16 blocks at once (8)" else 16
    if without == "own attention under dropout":
        model.set_attn_implementation("sdpa")
    each = none or without == "weights cast once per step"
    dtype = "fp32" if without == "bf16" else "bf16"
    blocks = torch.randint(0, model.config.vocab_size, (TOKENS // BLOCK, BLOCK))

    kept = 2**25 if none or without == "freed memory kept" else 2**30  # glibc's own limit, and ours

    def call() -> None:
        keep_freed_memory(kept)
        with contextlib.nullcontext() if each else autocast(device, dtype):
            for input_ids in blocks.split(at_once):
                with autocast(device, dtype) if each else contextlib.nullcontext():
                    forward_backward(model, input_ids, len(input_ids) / len(blocks))
        model.zero_grad(set_to_none=True)

    return call


def measure(quick: bool) -> dict:
    """Time the training with all of its means, and without each in turn."""
    names = ["nothing", "bf16", "fused GELU", "loss with its gradient", "weights cast once per step", "fast dropout",
             "own attention under dropout", "16 blocks at once (8)", "freed memory kept", "all of them",
             "--compile"]  # fmt: skip
    calls = {LABELS.get(name, f"without {name}"): build(quick, name) for name in names}
    values: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for repeat in range(2 if quick else 5):
        for name in random.Random(repeat).sample([*calls], len(calls)):  # none always follows the same one
            started = time.perf_counter()
            calls[name]()
            values[name].append(TOKENS / (time.perf_counter() - started))
    # Each repeat has a ratio of its own: other load slows both sides.
    shares = {name: round(statistics.median(map(operator.truediv, speeds, values["all means"])), 4)
              for name, speeds in values.items()}  # fmt: skip
    return {"title": "Levers of the training, GPT-2 124M, block 128, dropout 0.1", "unit": "tokens/s",
            "values": values, "ours": "all means", "targets": [], "facts": {"speed, of all means": shares}}  # fmt: skip


if __name__ == "__main__":
    main(measure)
