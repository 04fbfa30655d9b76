"""Time things side by side: every repeat runs each of them once, so that a busy machine slows all alike."""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any


def interleave(variants: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Run every variant once to warm up, then all of them in turn, `repeats` times.

    Returns:
        Seconds of each repeat by variant.
    """
    for call in variants.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, call in variants.items():
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def run_alone(*command) -> tuple[str, float]:
    """Run a command to its end; return what it printed and the peak of its resident memory in gigabytes.

    A small process starts it: a child's figure begins with the memory of the process that it is forked from.

    Raises:
        RuntimeError: it failed; with its last lines.
    """
    starter = "import resource, subprocess, sys; code = subprocess.run(sys.argv[1:]).returncode; " \
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"  # fmt: skip
    words = [sys.executable, "-c", starter, sys.executable, *map(str, command)]
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(ended.stderr[-2000:])
    *printed, peak = ended.stdout.splitlines()
    return "\n".join(printed), int(peak) * (1 if sys.platform == "darwin" else 1024) / 1e9


def main(measure: Callable[[bool], dict]) -> None:
    """Print what a benchmark measures as JSON; --quick only shows that it runs."""
    parser = argparse.ArgumentParser(description=measure.__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny models and texts, seconds")
    print(json.dumps(measure(parser.parse_args().quick), indent=2))
