"""Time things side by side: every repeat runs each of them once, so that a busy machine slows all alike."""

import argparse
import json
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


def main(measure: Callable[[bool], dict]) -> None:
    """Print what a benchmark measures as JSON; --quick only shows that it runs."""
    parser = argparse.ArgumentParser(description=measure.__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny models and texts, seconds")
    print(json.dumps(measure(parser.parse_args().quick), indent=2))
