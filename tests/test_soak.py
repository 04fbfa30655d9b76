"""The soak resumes where it was stopped, leaves nothing running, runs all that has large counts, and adds up right."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from string import Formatter
from types import SimpleNamespace

import conftest
import pytest
import test_crash
from counts import record_count

from benchmarks import guarantees
from benchmarks.guarantees import GROUPS, PARTS, PYTEST, Group, Part, render_soak

ROOT = Path(__file__).parent.parent
# Three parts: one counts, one fails, one hangs while its own child runs in a session of its own.
SCRIPTS = {
    "first": "import sys\nsys.path.insert(0, 'tests')\nfrom counts import record_count\nrecord_count('x', n=3)",
    "second": "raise SystemExit(1)",
    "third": """
import subprocess, pathlib
here = pathlib.Path(__file__).parent
if not (here / "go").exists():
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)
    (here / "part").write_text(str(child.pid))
    (here / "part").rename(here / "pid")
    child.wait()
""",
}
SOAK = """
import sys
from pathlib import Path
from benchmarks import guarantees, soak
folder = Path(sys.argv.pop(1))
guarantees.STORED = soak.STORED = folder / "soak.json"
soak.PARTS = [guarantees.Part(name, guarantees.GROUPS[0], str(folder / f"{name}.py"))
              for name in ("first", "second", "third")]
soak.fill_pages = lambda contents: (folder / "filled").write_text(str(len(contents)))
sys.exit(soak.main())
"""


def start_soak(folder, *words):
    return subprocess.Popen([sys.executable, "-c", SOAK, str(folder), *words], cwd=ROOT, stdout=subprocess.PIPE,
                            env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}, text=True)  # fmt: skip


def test_a_stopped_soak_leaves_nothing_running_and_resumes(tmp_path):
    for name, text in SCRIPTS.items():
        (tmp_path / f"{name}.py").write_text(text)
    soak, deadline = start_soak(tmp_path), time.monotonic() + 60
    while not (tmp_path / "pid").exists():
        assert soak.poll() is None, soak.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    stored = json.loads((tmp_path / "soak.json").read_text())
    assert {name: part["state"] for name, part in stored.items()} == {"first": "passed", "second": "failed"}
    assert stored["first"]["counts"] == [{"name": "x", "n": 3}]
    assert (tmp_path / "filled").exists()
    soak.send_signal(signal.SIGTERM)
    printed, _ = soak.communicate(timeout=60)
    assert soak.returncode == 143, printed
    grandchild = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    assert not grandchild.exists() or " Z " in grandchild.read_text()

    (tmp_path / "go").touch()
    soak = start_soak(tmp_path)
    printed, _ = soak.communicate(timeout=60)
    assert soak.returncode == 1, printed
    assert re.findall(r"^== (\w+)$", printed, re.MULTILINE) == ["third", "second"]
    assert printed.endswith("2 parts run, 1 failed: second\n")

    stored = json.loads((tmp_path / "soak.json").read_text())
    assert stored["third"]["state"] == "passed"
    stored["first"]["code"] = "of another commit"
    (tmp_path / "soak.json").write_text(json.dumps(stored))
    listed, _ = start_soak(tmp_path, "--list").communicate(timeout=60)
    assert [line.split()[:2] for line in listed.splitlines()] == [
        ["first", "of"], ["second", "failed"], ["third", "passed"],
    ]  # fmt: skip


def test_counts_reach_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("SOAK_COUNTS", str(tmp_path / "counts"))
    record_count("runs", kind="prepare", killed=2)
    report = SimpleNamespace(nodeid="a.py::test_b", longreprtext="x" * 900 + "assert 1 == 2")
    conftest.pytest_terminal_summary(SimpleNamespace(stats={"passed": [1, 2], "skipped": [1], "error": [report]}))
    runs, tests = map(json.loads, (tmp_path / "counts").read_text().splitlines())
    assert runs == {"name": "runs", "kind": "prepare", "killed": 2}
    assert (tests["passed"], tests["skipped"], len(tests["failures"])) == (2, 1, 1)
    assert re.fullmatch(r"a\.py::test_b: x+assert 1 == 2", tests["failures"][0])


def test_what_readme_says(monkeypatch):
    group = Group("kills", "kill", "{killed:,} in {counts} kinds, at most {most_lost} lost", "x {}", ["a", "b"], 1)
    other = Group("cuts", "kill", "{states} states", "y", [""], 1)
    monkeypatch.setattr(guarantees, "GROUPS", [group, other])
    monkeypatch.setattr(
        guarantees, "PARTS", [Part("kills a", group, ""), Part("kills b", group, ""), Part("cuts", other, "")]
    )
    stored = {"kills a": {"state": "passed", "counts": [{"name": "k", "kind": "a", "killed": 999, "most_lost": 2}]}}
    assert render_soak(stored) == {"soak.kill": "not run in full"}
    stored["kills b"] = {"state": "passed", "counts": [{"name": "k", "kind": "b", "killed": 1, "most_lost": 1}]}
    assert render_soak(stored) == {"soak.kill": "1,000 in 2 kinds, at most 2 lost; cuts: not run in full"}
    stored["cuts"] = {"state": "skipped", "counts": [{"name": "c", "states": 7}]}
    assert render_soak(stored)["soak.kill"].endswith("; cuts: not run in full")
    stored["cuts"]["state"] = "passed"
    assert render_soak(stored)["soak.kill"].endswith("; 7 states")
    stored["kills b"]["state"] = "failed"
    assert render_soak(stored) == {"soak.kill": "kills: 1 of 2 parts failed; 7 states"}


def selects(command, path, name):
    """Say whether a part runs a test, by its command."""
    file, _, chosen = command.removeprefix(PYTEST).split()[0].partition("::")
    rule = re.search(r" -k '?([^']+)'?", command)
    if file != path or (chosen and chosen.split("[")[0] != name):
        return False
    return not rule or eval(re.sub(r"\b(?!and\b|or\b|not\b)\w+", lambda word: f"{word[0]!r} in name", rule[1]))


def test_the_soak_runs_every_test_that_has_a_large_count():
    found, named = 0, set()
    for file in (ROOT / "tests").rglob("test_*.py"):
        path = str(file.relative_to(ROOT))
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                named.add(f"{path}::{node.name}")
                if "amount" in [argument.arg for argument in node.args.args]:
                    assert any(selects(part.command, path, node.name) for part in PARTS), (path, node.name)
                    found += 1
    assert found > 20
    for part in PARTS:
        assert "::" not in part.command or re.split(r"[\[ ]", part.command.removeprefix(PYTEST))[0] in named, part


def test_the_soak_names_all_kinds_of_run():
    pieces = {group.name: group.pieces for group in GROUPS}
    assert pieces["file operations"] == [getattr(name, "values", [name])[0] for name in test_crash.CASES]
    assert set(pieces["power cuts"]) == set(test_crash.CUTS)


CONTROL = """
import sys
from pathlib import Path
import mutants
source = Path("utils/errors.py").read_text()
found = mutants.run_all([("none", "utils/errors.py", source, sys.argv[1:]),
                         ("broken", "utils/errors.py", source + "raise SystemExit", sys.argv[1:])])
assert found == {"none": None, "broken": "test_it.py::test_it"}, found
"""


@pytest.mark.parametrize("can_pass", [True, False])
def test_a_mutant_counts_only_where_the_test_passes_with_nothing_changed(tmp_path, can_pass):
    """A test that failed with and without a change was once counted as having noticed 26 guards."""
    path = tmp_path / "test_it.py"
    path.write_text(f"def test_it():\n    import utils.errors\n    assert {can_pass}\n")
    ran = subprocess.run([sys.executable, "-c", CONTROL, str(path)], cwd=ROOT, capture_output=True, text=True,
                         env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})  # fmt: skip
    assert (ran.returncode == 0) == can_pass, ran.stderr
    assert ("nothing changed, and yet: " in ran.stderr) != can_pass


def test_every_figure_that_readme_shows_is_counted():
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__)]
    calls = [call for text in texts for call in re.findall(r"record_count\((.*?)\)\n", text, re.DOTALL)]
    counted = {"counts", "passed", *(name for call in calls for name in re.findall(r"(\w+)=", call))}
    shown = {name for group in GROUPS for _, name, *_ in Formatter().parse(group.phrase) if name}
    assert {"killed", "most_loss"} <= shown <= counted, shown - counted
