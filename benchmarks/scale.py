"""Memory of several processes, measured; and of models that were not run, estimated. For note 5."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.figures import make_table
from benchmarks.pages import ROOT
from benchmarks.timing import run_alone

MEDIUM = {"model_type": "gpt2", "n_embd": 1024, "n_layer": 24, "n_head": 16, "n_positions": 1024}  # GPT-2 medium's
PROCESSES = (1, 2, 4)
# Counted on CPUs, in bytes; tests/test_parallel.py and tests/training/test_forecast.py compare the forecast.
WEIGHT, WEIGHT_BF16, TRAFFIC, SAVED = 16, 2, 12, 12  # per parameter: in training, in autograd, per pass, on the disk
GROUP_COPIES = 6  # of the largest group, in float32
ACTIVATION, CHECKPOINTED = 55.6, 4.0  # per token, layer and unit of width
LOGIT = 4  # per token and vocabulary entry, with its gradient
BACKWARD = 1.25  # what a backward pass takes, of the activations
FLOP = 8  # per parameter and token, with --gradient-checkpointing
# From data sheets, per GPU and second: dense bf16 of an H100 SXM, NVLink 4, InfiniBand NDR; assumed: 40 % of the first.
FLOPS, NVLINK, INFINIBAND, DISK = 0.4 * 989e12, 450e9, 50e9, 0.6e9  # the disk was measured
EPOCH, VOCABULARY = 10e6, 32_000  # tokens of 100 books; Llama 2's vocabulary, untied


class Plan(NamedTuple):
    """A model of Llama 2's shape, and the GPUs that train it."""

    title: str
    parameters: float
    width: int
    layers: int
    n_gpus: int
    tokens: int  # per pass and GPU
    network: float


PLANS = [Plan("7 B, 8 GPUs on 1 machine", 7e9, 4096, 32, 8, 16_384, NVLINK),
         Plan("70 B, 64 GPUs on 8 machines", 70e9, 8192, 80, 64, 8_192, INFINIBAND)]  # fmt: skip


def estimate(plan: Plan) -> dict[str, float]:
    """Return memory and traffic in bytes, times in seconds, of one process but for tokens_per_step and checkpoint."""
    n, logits, layer = plan.parameters, LOGIT * VOCABULARY, ACTIVATION * plan.width
    received = TRAFFIC * n * (plan.n_gpus - 1) / plan.n_gpus
    found = {
        "weights": WEIGHT * n / plan.n_gpus,
        "group": 4 * GROUP_COPIES * 2 * VOCABULARY * plan.width,
        "activations": BACKWARD * plan.tokens * (CHECKPOINTED * plan.width * plan.layers + layer + logits),
        "weights_bf16": WEIGHT_BF16 * n,
        "all_activations": BACKWARD * plan.tokens * (layer * plan.layers + logits),
        "received": received,
        "traffic": received / plan.network,
        "computation": FLOP * n * plan.tokens / FLOPS,
        "tokens_per_step": plan.n_gpus * plan.tokens,
        "checkpoint": SAVED * n,
    }
    return found | {"epoch": EPOCH / found["tokens_per_step"] * (found["traffic"] + found["computation"])}


def show_plan(plan: Plan) -> dict[str, str]:
    """Return the rows of note 5's estimate for one plan."""
    of = estimate(plan)
    gigabytes = {name: value / 1e9 for name, value in of.items()}
    memory = sum(gigabytes[name] for name in ("weights", "group", "activations"))
    return {
        "weights, gradients, averages: 16 bytes / N": f"{gigabytes['weights']:.1f} GB",
        "largest group (embedding and output layer) × 6": f"{gigabytes['group']:.1f} GB",
        "tokens per pass and process": f"{plan.tokens:,}",
        "activations and logits × 1.25": f"{gigabytes['activations']:.0f} GB",
        "**memory per process**": f"**{memory:.0f} GB**",
        "without `--gradient-checkpointing`: weights in bf16, activations":
            f"{gigabytes['weights_bf16']:.0f} GB, {gigabytes['all_activations']:.0f} GB",
        "received per pass and process: 12 bytes × (N - 1)/N": f"{gigabytes['received']:.1f} GB",
        "traffic / computation per pass": f"{of['traffic']:.3g} s / {of['computation']:.3g} s",
        "tokens per step, one pass": f"{of['tokens_per_step']:,}",
        "**time per epoch of 10 million tokens (100 books)**": f"**{of['epoch'] / 60:.0f} min**",
        "main memory of process 0": f"{4 * plan.parameters / 1e9:.0f} GB",
        "a checkpoint, at the 0.6 GB/s measured on a solid-state disk":
            f"{gigabytes['checkpoint']:.0f} GB, {of['checkpoint'] / DISK / 60:.1f} min",
    }  # fmt: skip


def run_scale(folder: Path, _inputs: Any) -> dict[str, Any]:
    """Train GPT-2 medium's layers for two steps of 4 blocks in 1, 2 and 4 processes; return their memory in GB."""
    (folder / "medium.json").write_text(json.dumps(MEDIUM), encoding="utf-8")
    run_alone(ROOT / "prepare_data.py", "--input-path", ROOT / "results/data/book.txt", "--model-name",
              ROOT / "results/base_model", "--block-size", 64, "--output-dir", folder / "blocks")  # fmt: skip
    found: dict[str, Any] = {"parameters": None, "peaks": {}, "forecasts": {}}
    for n in PROCESSES:
        print(f"{n} processes", flush=True)
        printed, peak = run_alone(
            "-m", "torch.distributed.run", "--nproc-per-node", n, ROOT / "finetune_generative.py", "--data-dir",
            folder / "blocks", "--output-dir", folder / str(n), "--from-scratch", folder / "medium.json",
            "--max-steps", 2, "--batch-size", 4, "--micro-batch-size", 1, "--dtype", "fp32", "--copy-samples", 0,
            "--sample-tokens", 0, "--device", "cpu",
        )  # fmt: skip
        found["parameters"] = int(re.search(r"([\d,]+) parameters", printed)[1].replace(",", ""))
        found["forecasts"][str(n)] = float(re.search(r"([\d.]+) GB of memory", printed)[1])
        found["peaks"][str(n)] = peak
    return found


def show_scale(figures: dict[str, Any]) -> dict[str, str]:
    """Return the tables of note 5."""
    shares = [f"{WEIGHT * figures['parameters'] / n / 1e9:.2f} GB" for n in PROCESSES]
    rows = [["16 bytes per parameter / N", *shares]] + [
        [title, *(f"{figures[key][str(n)]:.2f} GB" for n in PROCESSES)]
        for title, key in (("peak", "peaks"), ("forecast", "forecasts"))
    ]
    columns = [show_plan(plan) for plan in PLANS]
    paper = [[title, *(column[title] for column in columns)] for title in columns[0]]
    return {"estimate": make_table(" | ".join(["", *(f">{plan.title}" for plan in PLANS)]), paper),
            "parameters": f"{figures['parameters'] / 1e6:.0f} million",
            "memory": make_table(" | ".join(["processes", *(f">{n}" for n in PROCESSES)]), rows)}  # fmt: skip
