"""The three scripts, run as a user runs them, with the embedded base model and the sample book."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.pages import ROOT

BASE, SAMPLE, GENERAL = (ROOT / "results" / name for name in ("base_model", "data/book.txt", "data/control.txt"))
LEARNING_RATE = "3e-4"


def run_script(name: str, *flags: Any) -> None:
    """Run one of the three scripts, and print its command."""
    command = [f"{name}.py", *map(str, flags)]
    print("$ python", " ".join(command).replace(f"{ROOT}/", ""), flush=True)
    subprocess.run([sys.executable, ROOT / command[0], *command[1:]], check=True, stdout=subprocess.DEVNULL)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
