"""Start-up: help, a mistyped flag, and the first training step of the embedded base on the sample book."""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.timing import interleave, main, run_alone

SCRIPTS = ["prepare_data.py", "finetune_generative.py", "generate_text.py"]


def start(*words) -> None:
    """Run a script to its end, whatever it answers."""
    subprocess.run([sys.executable, *words], capture_output=True, check=False)


def wait_for_step(blocks: Path, out: Path) -> float:
    """Return the seconds from the start of a training to the first line of its first step."""
    started = time.perf_counter()
    command = [sys.executable, "finetune_generative.py", "--data-dir", blocks, "--output-dir", out, "--overwrite"]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = out / "metrics.jsonl"
    while child.poll() is None:
        lines = metrics.read_text().splitlines() if metrics.is_file() else []
        if any("train/loss" in json.loads(line) for line in lines if line.endswith("}")):
            break
        time.sleep(0.01)
    seconds = time.perf_counter() - started
    child.terminate()
    child.wait()
    metrics.unlink(missing_ok=True)
    return seconds


def measure(quick: bool) -> dict:
    """Time the starts in turn."""
    variants = {f"{script} --help": lambda script=script: start(script, "--help") for script in SCRIPTS}
    variants["a bad flag"] = lambda: start("finetune_generative.py", "--epoch", "3")
    values = interleave(variants, 2 if quick else 7)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_alone("prepare_data.py", "--model-name", "results/base_model", "--output-dir", folder / "blocks")
        repeats = range(1 if quick else 4)
        values["first training step"] = [wait_for_step(folder / "blocks", folder / "run") for _ in repeats]
    middle = {name: statistics.median(seconds) for name, seconds in values.items()}
    targets = [
        {"what": "--help, slowest script, s", "value": max(middle[f"{script} --help"] for script in SCRIPTS),
         "wanted": "<= 0.3"},
        {"what": "a bad flag, s", "value": middle["a bad flag"], "wanted": "<= 1"},
        {"what": "first training step, s", "value": middle["first training step"], "wanted": "<= 5"},
    ]  # fmt: skip
    return {"title": "Start-up, embedded base, sample book", "unit": "s", "values": values,
            "ours": "first training step", "targets": targets, "facts": {}}  # fmt: skip


if __name__ == "__main__":
    main(measure)
