"""Training: this project's loop beside transformers' Trainer, and beside the matrix products that both must do.

GPT-2 of 124 million parameters with random weights and its own dropout, block 128, batch 64. Each measurement is a
process of its own that does two steps: the first makes room and loads what is compiled, the second is timed.
"""

import contextlib
import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from benchmarks.timing import main, run_alone
from finetune_generative import forward_backward
from utils.model.layers import use_fast_layers
from utils.model.loading import autocast, pick_dtype
from utils.training.forecast import choose_micro_batch
from utils.training.optim import StepFigures, build_optimizer, clip_gradients
from utils.training.setup import keep_freed_memory

BLOCK, BATCH, TUNED_MICRO_BATCH = 128, 64, 16
TINY = {"n_layer": 2, "n_embd": 64, "n_head": 2}
DEFAULTS, TUNED = "Trainer, defaults", "Trainer, tuned (bf16, compiled, accumulation)"
ROOFLINE = "roofline (matrix products alone)"


def build_model(quick: bool):
    """Make the model of the comparison."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**(TINY if quick else {}))).train()


class FakeBlocks:
    """Random token ids that are asked for as prepared blocks are."""

    def __init__(self, blocks: torch.Tensor) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, rows) -> dict:
        return {"input_ids": self.blocks[rows]}


def make_step(model, device: torch.device, dtype: str, batches: Sequence[torch.Tensor]) -> Callable[[int], None]:
    """Return a function that does a step, given its number, over these batches as finetune_generative.py does it."""
    optimizer, figures = build_optimizer(model, 5e-5, 0.01, (0.9, 0.999), 1e-8), StepFigures(device)
    n_blocks = sum(map(len, batches))

    def step(number: int) -> None:
        mean_loss = torch.zeros((), device=device)
        with autocast(device, dtype):
            for batch in batches:
                input_ids = batch.to(device, non_blocking=True)
                mean_loss += forward_backward(model, input_ids, len(input_ids) / n_blocks)
        figures.note(optimizer, number, mean_loss, clip_gradients(model, 1.0))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def train_here(quick: bool) -> dict:
    """Do two steps as finetune_generative.py does them; return tokens per second of the second and of the roofline."""
    keep_freed_memory()
    device, model = torch.device("cpu"), build_model(quick)
    dtype = pick_dtype("auto", device)
    use_fast_layers(model, device)
    blocks = torch.randint(0, model.config.vocab_size, (BATCH, BLOCK))
    data = SimpleNamespace(train=FakeBlocks(blocks), block_size=BLOCK)
    size = choose_micro_batch(model, data, functools.partial(autocast, device, dtype), BATCH, None)
    step = make_step(model, device, dtype, blocks.split(size))
    for number in range(2):
        started = time.perf_counter()
        step(number)
        seconds = time.perf_counter() - started
    return {"this project": blocks.numel() / seconds, ROOFLINE: roofline(model.config, size * BLOCK), "at once": size}


def train_with_trainer(quick: bool, tuned: bool) -> dict:
    """Do two steps with transformers' Trainer; return tokens per second of the second.

    Args:
        tuned: bf16, compiled, micro-batches of TUNED_MICRO_BATCH; else its defaults on a CPU.
    """
    moments = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            moments.append(time.perf_counter())

    at_once = TUNED_MICRO_BATCH if tuned else BATCH
    options = {"bf16": True, "torch_compile": True} if tuned else {}
    model = build_model(quick)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 50257, (2 * BATCH, BLOCK))]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        arguments = TrainingArguments(
            output_dir=folder, use_cpu=True, per_device_train_batch_size=at_once, max_steps=2,
            gradient_accumulation_steps=BATCH // at_once, save_strategy="no", report_to=[], disable_tqdm=True,
            logging_strategy="no", **options)  # fmt: skip
        Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Clock()]).train()
    return {TUNED if tuned else DEFAULTS: BATCH * BLOCK / (moments[1] - moments[0])}


def roofline(config, rows: int) -> float:
    """Return tokens per second if a training were its bf16 matrix products alone, forward and backward.

    Args:
        config: of the model.
        rows: tokens of a micro-batch.
    """
    width, layers, vocabulary = config.n_embd, config.n_layer, config.vocab_size
    products = [(width, 3 * width, layers), (width, width, layers), (width, 4 * width, layers),
                (4 * width, width, layers), (width, vocabulary, 1)]  # fmt: skip
    seconds = 0.0
    for n_in, n_out, times in products:
        x, gradient, weight = (torch.randn(*shape).bfloat16() for shape in ((rows, n_in), (rows, n_out), (n_in, n_out)))
        for product in (lambda: x @ weight, lambda: gradient @ weight.t(), lambda: x.t() @ gradient):  # noqa: B023
            product()
            started = time.perf_counter()
            for _ in range(3):
                product()
            seconds += times * (time.perf_counter() - started) / 3
    return rows / seconds


def measure_alone(variant: str, quick: bool) -> tuple[dict, float]:
    """Return the figures of a variant in a process of its own, and its peak of resident memory in gigabytes."""
    printed, peak = run_alone("-m", "benchmarks.training", "--variant", variant, *(["--quick"] if quick else []))
    return json.loads(printed.splitlines()[-1]), peak


def measure(quick: bool) -> dict:
    """Compare tokens per second of a step, and peak memory."""
    values: dict[str, list[float]] = {name: [] for name in ("this project", DEFAULTS, TUNED, ROOFLINE)}
    peaks: dict[str, list[float]] = {name: [] for name in VARIANTS}
    micro_batch_size = None
    for _ in range(1 if quick else 2):
        for variant in VARIANTS:
            figures, peak = measure_alone(variant, quick)
            peaks[variant].append(peak)
            micro_batch_size = figures.pop("at once", None) or micro_batch_size
            for name, tokens_per_second in figures.items():
                values[name].append(tokens_per_second)
    us, memory = ({name: statistics.median(several) for name, several in kind.items()} for kind in (values, peaks))
    targets = [(name, us["this project"] / us[peer], wanted) for name, peer, wanted in (
        ("speed / the Trainer's defaults", DEFAULTS, ">= 2.5"), ("speed / the Trainer tuned by hand", TUNED, ">= 1.2"),
        ("speed / matrix products alone (roofline)", ROOFLINE, ">= 0.9"))]  # fmt: skip
    targets.append(("peak memory / the Trainer's defaults", memory["this project"] / memory[DEFAULTS], "<= 0.25"))
    return {"title": "Training, GPT-2 124M, block 128, batch 64, dropout 0.1", "unit": "tokens/s", "values": values,
            "ours": "this project",
            "targets": [{"what": what, "value": value, "wanted": wanted} for what, value, wanted in targets],
            "facts": {"micro-batch size, chosen automatically": micro_batch_size, "peak, GB": memory}}  # fmt: skip


VARIANTS = {
    "this project": train_here,
    DEFAULTS: lambda quick: train_with_trainer(quick, tuned=False),
    TUNED: lambda quick: train_with_trainer(quick, tuned=True),
}

if __name__ == "__main__":
    if "--variant" in sys.argv:
        print(json.dumps(VARIANTS[sys.argv[sys.argv.index("--variant") + 1]]("--quick" in sys.argv)))
    else:
        main(measure)
