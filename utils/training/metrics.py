"""Metrics of a run: metrics.jsonl, TensorBoard, run_config.json, all_results.json, loss_curve.png."""

import json
import platform
from contextlib import suppress
from pathlib import Path

import datasets
import tokenizers
import torch
import transformers

from utils.data.blocks import Blocks
from utils.evaluation.plots import draw_loss
from utils.model.loading import count_parameters
from utils.storage import replacing, sync, write_json, write_text
from utils.training import parallel

METRICS, RESULTS = "metrics.jsonl", "all_results.json"
RESULT_NAMES = {"eval/loss": "eval_loss", "eval/perplexity": "perplexity", "eval/bits_per_byte": "bits_per_byte",
                "eval/copy_rate": "copy_rate"}  # fmt: skip


class MetricsLog:
    """Append one JSON object per line to metrics.jsonl, and to TensorBoard if asked; in process 0 only.

    Args:
        step: training lines after this step are dropped: that work was lost and is done again.
        evaluated_step: the same for evaluations, of which the last may be done again at `step` itself.
    """

    def __init__(self, folder: Path, step: int, evaluated_step: int, tensorboard: bool = False) -> None:
        self.path, self.writer = folder / METRICS, None
        if not parallel.is_main():
            return
        rows = read_metrics(folder)
        kept = [row for row in rows if row["step"] <= (step if "train/loss" in row else evaluated_step)]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # an optional package

            self.writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1)  # what is later is lost

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append one line at once, so that a killed run keeps it."""
        if not parallel.is_main():
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        if self.writer:
            for key, value in values.items():
                self.writer.add_scalar(key, value, step)

    def sync(self) -> None:
        """Force the lines to the disk: a checkpoint must not be newer than its metrics."""
        if parallel.is_main():
            sync(self.path)

    def close(self) -> None:
        if self.writer:
            self.writer.close()


def read_metrics(folder: Path) -> list[dict]:
    """Read metrics.jsonl up to the first line damaged by a kill or a power cut."""
    rows = []
    if (folder / METRICS).is_file():
        with suppress(ValueError, TypeError, KeyError):
            for line in (folder / METRICS).read_text(encoding="utf-8", errors="replace").splitlines():
                row = json.loads(line)
                rows.append({"step": int(row["step"]), **row})
    return rows


def write_run_config(folder: Path, settings: dict, flags: dict, base: str, model, data: Blocks, machine: dict) -> None:
    """Write run_config.json: settings, flags, the counts of model and data, hashes, versions, machine."""
    libraries = (torch, transformers, datasets, tokenizers)
    config = {
        "made_by": "finetune_generative.py",
        "base_model": base,
        "parameters": {"all": count_parameters(model), "trained": count_parameters(model, trained=True)},
        "data_dir": str(data.folder),
        "settings": settings,
        "flags": flags,
        "data": {name: data.manifest[name] for name in ("settings", "splits", "tokenizer", "block_size")},
        "versions": {"python": platform.python_version()} | {lib.__name__: lib.__version__ for lib in libraries},
        "machine": {"system": platform.platform(), **machine},
    }
    write_json(folder / "run_config.json", config)


def write_results(folder: Path, state, max_steps: int) -> dict:
    """Draw loss_curve.png and write all_results.json: metrics of the base and of the best model, runtime."""
    draw_loss_curve(folder, state.best_step)
    results = {f"base_{RESULT_NAMES[key]}": value for key, value in state.base_metrics.items()}
    results |= {RESULT_NAMES[key]: value for key, value in state.best_metrics.items()}
    results |= {"best_step": state.best_step, "step": state.step, "max_steps": max_steps, "finished": state.finished,
                "train_runtime": round(state.seconds, 1), "train_tokens": state.tokens,
                "train_tokens_per_second": round(state.tokens / max(state.seconds, 1e-9), 1)}  # fmt: skip
    write_json(folder / RESULTS, results)
    return results


def draw_loss_curve(folder: Path, best_step: int) -> None:
    """Draw the training and validation loss of metrics.jsonl into loss_curve.png."""
    rows = read_metrics(folder)
    train, validation = ([(row["step"], row[key]) for row in rows if key in row] for key in ("train/loss", "eval/loss"))
    with replacing(folder / "loss_curve.png") as partial:
        draw_loss(train, validation, best_step).savefig(partial, dpi=180, format="png")
