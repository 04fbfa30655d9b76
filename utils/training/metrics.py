"""What a run writes about itself: metrics.jsonl, the loss picture, TensorBoard."""

import json
import platform
from pathlib import Path

from utils.storage import replacing, sync, write_json, write_text

METRICS = "metrics.jsonl"
RESULT_NAMES = {"eval/loss": "eval_loss", "eval/perplexity": "perplexity", "eval/bits_per_byte": "bits_per_byte",
                "eval/copy_rate": "copy_rate"}  # fmt: skip


class MetricsLog:
    """Append one JSON object a line to metrics.jsonl, and to TensorBoard if asked.

    Args:
        folder: the run's output folder.
        step: lines after this step are dropped: they belong to work that was lost and is done again.
        evaluated_step: the same for evaluations, of which the last may be done again at step itself.
        tensorboard: write event files to folder/tensorboard too.
    """

    def __init__(self, folder: Path, step: int, evaluated_step: int, tensorboard: bool = False) -> None:
        self.path = folder / METRICS
        rows = read_metrics(folder)
        kept = [row for row in rows if row["step"] <= (step if "train/loss" in row else evaluated_step)]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(folder / "tensorboard", purge_step=step or None)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write one line at once, so that a killed run keeps what it has measured."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        if self.writer:
            for key, value in values.items():
                self.writer.add_scalar(key, value, step)

    def sync(self) -> None:
        """Force the lines to the disk: a checkpoint must not be newer than what it was measured by."""
        sync(self.path)

    def close(self) -> None:
        if self.writer:
            self.writer.close()


def read_metrics(folder: Path) -> list[dict]:
    """Read metrics.jsonl up to the first line that a kill or a power cut has spoilt."""
    rows = []
    if (folder / METRICS).is_file():
        for line in (folder / METRICS).read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
                rows.append({"step": int(row["step"]), **row})
            except (ValueError, TypeError, KeyError):
                break
    return rows


def draw_loss_curve(folder: Path, best_step: int) -> None:
    """Draw training and validation loss over the steps, the base model's level and the model that was kept marked."""
    import matplotlib

    matplotlib.use("Agg")  # no screen needed
    from matplotlib import pyplot

    rows = read_metrics(folder)
    train = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    validation = [(row["step"], row["eval/loss"]) for row in rows if "eval/loss" in row]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    if train:
        axes.plot(*zip(*train, strict=True), color="#9db4c8", linewidth=1, label="training")
    if validation:
        axes.plot(*zip(*validation, strict=True), color="#b5482b", marker="o", label="validation")
        for best in [point for point in validation if point[0] == best_step > 0]:
            axes.annotate(
                f"best {best[1]:.3f}", best, textcoords="offset points", xytext=(0, -16), ha="center", color="#b5482b"
            )
        if validation[0][0] == 0:
            axes.axhline(validation[0][1], color="#555555", linestyle="--", linewidth=1, label="base model")
    axes.set(xlabel="step (optimizer updates)", ylabel="loss (nats a token)", title="Loss on the book")
    axes.grid(alpha=0.25)
    axes.legend()
    with replacing(folder / "loss_curve.png") as partial:
        figure.savefig(partial, dpi=120, format="png")
    pyplot.close(figure)


def write_run_config(args, settings: dict, base: str, data, machine: dict) -> None:
    """Write run_config.json: every setting, the data's counts and hashes, versions, machine."""
    import datasets
    import tokenizers
    import torch
    import transformers

    libraries = (torch, transformers, datasets, tokenizers)
    config = {
        "made_by": "finetune_generative.py",
        "base_model": base,
        "data_dir": str(args.data_dir),
        "settings": settings,
        "flags": {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()},
        "data": {name: data.manifest[name] for name in ("settings", "splits", "tokenizer", "block_size")},
        "versions": {"python": platform.python_version()} | {lib.__name__: lib.__version__ for lib in libraries},
        "machine": {"system": platform.platform(), **machine},
    }
    write_json(args.output_dir / "run_config.json", config)


def write_results(folder: Path, state, max_steps: int) -> dict:
    """Draw the loss and write all_results.json: the base's figures, the best model's, what the run took."""
    draw_loss_curve(folder, state.best_step)
    results = {f"base_{RESULT_NAMES[key]}": value for key, value in state.base_metrics.items()}
    results |= {RESULT_NAMES[key]: value for key, value in state.best_metrics.items()}
    speed = state.tokens / max(state.seconds, 1e-9)
    results |= {"best_step": state.best_step, "step": state.step, "max_steps": max_steps}
    results |= {"train_runtime": round(state.seconds, 1), "train_tokens": state.tokens}
    results |= {"train_tokens_per_second": round(speed, 1)}
    write_json(folder / "all_results.json", results)
    return results
