"""Run the tests in large counts, part by part, and fill README's section "Guarantees"; write notes/soak.json.

python -m benchmarks.soak            run the parts that have not passed with this code; the same command resumes
python -m benchmarks.soak NAME ...   only parts whose names start so, in this order, run or not; most use one core, so
                                     that a second soak with other names may run beside it
python -m benchmarks.soak --list     list all parts with their state and time
"""

import argparse
import datetime
import fcntl
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from benchmarks.guarantees import PARTS, STORED, Part, read_stored, render_soak
from benchmarks.pages import ROOT, fill_pages
from benchmarks.run import describe_commit
from utils.storage import write_text

NICENESS = 15


def tested_files(part: Part) -> list[Path]:
    """List the product's code and the tests that a part runs."""
    tests = {"tests/conftest.py", "tests/forked.py", *re.findall(r"tests/[\w/]+\.py", part.command)}
    return sorted([*ROOT.glob("*.py"), *(ROOT / "utils").rglob("*.py"), *(ROOT / name for name in tests)])


def hash_code(part: Part) -> str:
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in tested_files(part))).hexdigest()[:16]


def state_of(part: Part, stored: dict[str, dict]) -> str:
    """Return 'never run', 'of older code', or how the part ended with this code."""
    known = stored.get(part.name)
    return "never run" if not known else known["state"] if known["code"] == hash_code(part) else "of older code"


def list_descendants(root: int) -> set[int]:
    """Return the processes that a process has started, and those have, in whatever session that is."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    tree = [root]
    for pid in tree:  # which grows
        tree += children.get(pid, [])
    return {*tree} - {root}


def end_descendants() -> None:
    """End all that this process has started."""

    def send(number: int, pids: set[int]) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    stopped: set[int] = set()
    while new := list_descendants(os.getpid()) - stopped:  # those that are stopped start no others
        send(signal.SIGSTOP, new)
        stopped |= new
    send(signal.SIGKILL, stopped)


def run_part(part: Part) -> dict:
    """Run a part; return what is stored of it."""
    commit = describe_commit(":(glob)*.py", "utils", "tests")
    found = {"command": f"python {part.command}", "commit": commit, "code": hash_code(part),
             "date": datetime.date.today().isoformat()}  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="soak-", ignore_cleanup_errors=True) as folder:
        counts, began = Path(folder) / "counts.jsonl", time.monotonic()
        environment = os.environ | {"SOAK_COUNTS": str(counts), "TMPDIR": folder}
        command = [sys.executable, *shlex.split(part.command)]
        code = subprocess.run(command, cwd=ROOT, env=environment, start_new_session=True, check=False).returncode
        text = counts.read_text() if counts.is_file() else ""
        rows = [json.loads(line) for line in text.replace(f"{ROOT}/", "").replace(folder, "TMP").splitlines()]
    found |= {"seconds": round(time.monotonic() - began), "exit": code}
    for row in [row for row in rows if row["name"] == "tests"]:
        rows.remove(row)
        found |= {key: value for key, value in row.items() if key != "name"}
    state = "failed" if code else "skipped" if found.get("skipped") else "passed"
    return {"state": state, **found, "counts": rows}


def store(part: Part, found: dict) -> None:
    """Store a part at once and fill README, so that a kill loses the part that runs alone."""
    folder = os.open(STORED.parent, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)  # a second soak would overwrite what the first has just stored
    try:
        stored = read_stored() | {part.name: found}
        names = [part.name for part in PARTS]
        text = ",\n".join(f"{json.dumps(name)}: {json.dumps(stored[name])}" for name in names if name in stored)
        write_text(STORED, f"{{\n{text}\n}}\n")
        fill_pages(render_soak(stored))
    finally:
        os.close(folder)


def stop(number: int, _frame: object) -> None:
    end_descendants()  # here: the signal may come while a child is being started, before anything knows of it
    sys.exit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="starts of names of parts")
    parser.add_argument("--list", action="store_true", help="run nothing; list the parts with their state and time")
    args, stored = parser.parse_args(), read_stored()
    for name in args.names:
        if not any(part.name.startswith(name) for part in PARTS):
            parser.error(f"no part's name starts with {name!r}; --list lists them")
    parts = [part for name in args.names or [""] for part in PARTS if part.name.startswith(name)]
    states = {part.name: state_of(part, stored) for part in parts}
    if args.list:
        for part in parts:
            seconds = stored.get(part.name, {}).get("seconds", part.group.minutes * 60)
            print(f"{part.name:45} {states[part.name]:14} {seconds / 60:5.1f} min")
        return 0
    order = ["never run", "of older code", "failed", "skipped"]
    waiting = [part for part in parts if states[part.name] != "passed"]
    chosen = parts if args.names else sorted(waiting, key=lambda part: order.index(states[part.name]))
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    os.nice(max(0, NICENESS - os.nice(0)))
    failed = []
    for part in chosen:
        print(f"== {part.name}", flush=True)
        found = run_part(part)
        store(part, found)
        print(f"== {part.name}: {found['state']} in {found['seconds']} s", flush=True)
        failed += [part.name] * (found["state"] == "failed")
    print(f"{len(chosen)} parts run, {len(failed)} failed{': ' * bool(failed)}{', '.join(failed)}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
