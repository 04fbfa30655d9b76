"""Training: this project's loop beside transformers' Trainer, and beside the matrix products that both must do.

GPT-2 of 124 million parameters with random weights and its own dropout, block 128, batch 64.
"""

import contextlib
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace

import torch

from benchmarks.timing import main

BLOCK, BATCH, TUNED_BATCH = 128, 64, 16
TINY = {"n_layer": 2, "n_embd": 64, "n_head": 2}


def build_model(quick: bool, **options):
    """Make the model of the comparison."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**(TINY if quick else {}), **options)).train()


class Ours:
    """An update as finetune_generative.py does it, with the micro-batch that it chooses."""

    def __init__(self, quick: bool, compiled: bool = False, **options) -> None:
        from utils.forecast import pick_micro_batch
        from utils.layers import speed_up
        from utils.optim import build_optimizer
        from utils.plan import Plan

        self.model = build_model(quick, **options)
        speed_up(self.model, torch.device("cpu"), compiled)
        self.optimizer = build_optimizer(self.model, 5e-5, 0.01, (0.9, 0.999), 1e-8)
        blocks = torch.randint(0, self.model.config.vocab_size, (BATCH, BLOCK))
        self.data = SimpleNamespace(train=FakeBlocks(blocks), block_size=BLOCK)
        args = SimpleNamespace(batch_size=BATCH, grad_accum_steps=1, seed=0, max_steps=10, eval_every=None, epochs=1,
                               save_every=None, lr_schedule="cosine", learning_rate=5e-5, warmup_ratio=0.0,
                               dtype="auto", micro_batch_size=None)  # fmt: skip
        self.plan = Plan(args, self.data, torch.device("cpu"))
        state = SimpleNamespace(machine={})
        self.micro_batch_size = pick_micro_batch(args, self.plan, self.model, self.data, state)

    def __call__(self, n_micro_batches: int) -> int:
        """Do an update over so many micro-batches; return its tokens."""
        from finetune_generative import backward

        batch = self.data.train.blocks[: n_micro_batches * self.micro_batch_size]
        with self.plan.autocast():
            for input_ids in batch.split(self.micro_batch_size):
                backward(self.model, input_ids, len(batch))
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return batch.numel()


class FakeBlocks:
    """Random token ids that are asked for as prepared blocks are."""

    def __init__(self, blocks: torch.Tensor) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, rows) -> dict:
        return {"input_ids": self.blocks[rows]}


class Peer:
    """transformers' Trainer over random blocks; a call gives tokens and seconds of all its updates but the first.

    Args:
        tuned: bf16, compiled, micro-batches of TUNED_BATCH; else its defaults on a CPU and the whole batch at once.
    """

    def __init__(self, quick: bool, tuned: bool, batch: int = BATCH) -> None:
        self.model, self.tuned, self.batch = build_model(quick), tuned, batch
        self.folder = tempfile.mkdtemp()

    def __call__(self, n_updates: int) -> tuple[int, float]:
        from transformers import Trainer, TrainerCallback, TrainingArguments

        moments = []

        class Clock(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                moments.append(time.perf_counter())

        at_once = min(self.batch, TUNED_BATCH) if self.tuned else self.batch
        options = {"bf16": True, "torch_compile": True} if self.tuned else {}
        arguments = TrainingArguments(
            output_dir=self.folder, use_cpu=True, per_device_train_batch_size=at_once, max_steps=n_updates,
            gradient_accumulation_steps=self.batch // at_once, save_strategy="no", report_to=[], disable_tqdm=True,
            logging_strategy="no", **options)  # fmt: skip
        rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 50257, (self.batch * n_updates, BLOCK))]
        with contextlib.redirect_stdout(sys.stderr):
            Trainer(model=self.model, args=arguments, train_dataset=rows, callbacks=[Clock()]).train()
        return (n_updates - 1) * self.batch * BLOCK, moments[-1] - moments[0]


def roofline(quick: bool, rows: int) -> float:
    """Return tokens a second if a training were its bf16 matrix products alone, forward and backward.

    Args:
        rows: tokens of a micro-batch.
    """
    config = build_model(quick).config
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


def measure_memory(kind: str, quick: bool) -> float:
    """Return the peak resident gigabytes of a process that does one update of the whole batch."""
    command = [sys.executable, "-m", "benchmarks.training", "--memory-of", kind, *(["--quick"] if quick else [])]
    ended = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
    return float(ended.stdout.split()[-1])


def do_one_update(kind: str, quick: bool) -> None:
    """Print the peak of a training that does one update."""
    if kind == "ours":
        ours = Ours(quick)
        ours(-(-BATCH // ours.micro_batch_size))
    else:
        Peer(quick, kind == "tuned")(1)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)


def measure(quick: bool) -> dict:
    """Compare tokens a second of an update, and peak memory."""
    # Before anything is in this process's own memory: the Trainer's 20 GB leave little.
    memory = {kind: measure_memory(kind, quick) for kind in ("ours", "defaults")}
    repeats = 2 if quick else 3
    ours, plain, tuned = Ours(quick), Peer(quick, False, TUNED_BATCH), Peer(quick, True, 2 * TUNED_BATCH)
    compiled = Ours(quick, compiled=True)
    values = {"this project": [], "this project, --compile": [], "Trainer, defaults": [],
              "Trainer, tuned (bf16, compiled, accumulation)": [], "roofline (matrix products alone)": []}  # fmt: skip
    for model in (ours, compiled):
        model(1)
    for _ in range(repeats):
        for name, model in (("this project", ours), ("this project, --compile", compiled)):
            started = time.perf_counter()
            tokens = model(2)
            values[name].append(tokens / (time.perf_counter() - started))
        for name, peer in (("Trainer, defaults", plain), ("Trainer, tuned (bf16, compiled, accumulation)", tuned)):
            tokens, seconds = peer(2)
            values[name].append(tokens / seconds)
        values["roofline (matrix products alone)"].append(roofline(quick, ours.micro_batch_size * BLOCK))
    middle = {name: statistics.median(several) for name, several in values.items()}
    us = middle["this project"]
    return {
        "title": "Training, GPT-2 124M, block 128, dropout 0.1",
        "unit": "tokens/s",
        "values": values,
        "ours": "this project",
        "targets": [
            {"what": "of the Trainer's defaults", "value": us / middle["Trainer, defaults"], "wanted": ">= 2.5"},
            {"what": "of the Trainer tuned by hand",
             "value": us / middle["Trainer, tuned (bf16, compiled, accumulation)"], "wanted": ">= 1.2"},
            {"what": "of the roofline", "value": us / middle["roofline (matrix products alone)"], "wanted": ">= 0.9"},
            {"what": "peak memory at batch 64, of the Trainer's", "value": memory["ours"] / memory["defaults"],
             "wanted": "<= 0.25"},
        ],
        "facts": {"micro_batch_size": ours.micro_batch_size, "peak_gb": memory,
                  "trainer_defaults_batch": plain.batch, "trainer_tuned_batch": f"{TUNED_BATCH} x 2"},
    }  # fmt: skip


if __name__ == "__main__":
    if "--memory-of" in sys.argv:
        do_one_update(sys.argv[sys.argv.index("--memory-of") + 1], "--quick" in sys.argv)
    else:
        main(measure)
