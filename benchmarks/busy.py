"""Busy machine: training alone and beside a program that keeps a core busy, with short waits and with libgomp's."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.timing import main, run_alone

LIBGOMP = "300000"  # turns that a thread of libgomp waits for the others before it gives up its core
VARIANTS = {
    "alone": (False, None),
    "alone, libgomp's waits": (False, LIBGOMP),
    "beside a busy program": (True, None),
    "beside a busy program, libgomp's waits": (True, LIBGOMP),
}


def train(blocks: Path, out: Path, is_busy: bool, turns: str | None, n_steps: int) -> float:
    """Train the embedded base for some steps; return the median of its tokens per second."""
    asked = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in asked}
    # A session of its own, like a program of another terminal: Linux shares the cores among sessions first.
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True) if is_busy else None
    try:
        subprocess.run(
            [sys.executable, "finetune_generative.py", "--data-dir", blocks, "--output-dir", out, "--overwrite",
             "--max-steps", str(n_steps), "--copy-samples", "0", "--sample-tokens", "0"],
            env=environment | ({"GOMP_SPINCOUNT": turns} if turns else {}), check=True, capture_output=True
        )  # fmt: skip
    finally:
        if other:
            other.kill()
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return statistics.median(row["train/tokens_per_sec"] for row in rows if "train/tokens_per_sec" in row)


def measure(quick: bool) -> dict:
    """Train in turn with each kind of waiting, alone and beside a busy program."""
    values: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_alone("prepare_data.py", "--model-name", "results/base_model", "--output-dir", folder / "blocks")
        for _ in range(1 if quick else 3):
            for variant, (is_busy, turns) in VARIANTS.items():
                speed = train(folder / "blocks", folder / "run", is_busy, turns, 2 if quick else 6)
                values[variant].append(speed)
    middle = {name: statistics.median(speeds) for name, speeds in values.items()}
    targets = [{"what": f"speed {variant} / with libgomp's waits",
                "value": middle[variant] / middle[f"{variant}, libgomp's waits"], "wanted": wanted}
               for variant, wanted in (("alone", ">= 0.97"), ("beside a busy program", ">= 2"))]  # fmt: skip
    return {"title": "Busy machine, embedded base, batches of 8 blocks", "unit": "tokens/s", "values": values,
            "ours": "beside a busy program", "targets": targets, "facts": {}}  # fmt: skip


if __name__ == "__main__":
    main(measure)
