"""README and notes say what the code does: every flag exists, every flag is documented with its default."""

import argparse
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "notes").glob("*.md")), ROOT / "results/base_model/README.md"]
SCRIPTS = ["prepare_data", "finetune_generative", "generate_text"]


def parser_of(name, monkeypatch):
    """Catch the parser that a script builds."""
    caught = []
    module = importlib.import_module(name)

    class Caught(module.Parser):
        def parse_args(self, argv=None):
            caught.append(self)
            return super().parse_args(argv)

    monkeypatch.setattr(module, "Parser", Caught)
    module.parse_args([])
    return caught[0]


@pytest.fixture
def actions(monkeypatch):
    """(script, flag, action) of every flag but --help."""
    return [
        (name, action.option_strings[0], action)
        for name in SCRIPTS
        for action in parser_of(name, monkeypatch)._actions
        if not isinstance(action, argparse._HelpAction)
    ]


def test_flags_in_the_pages_exist(actions):
    known = {option for _, _, action in actions for option in action.option_strings} | {"--help"}
    foreign = {
        "--full",
        "--version",
        "--quiet",
        "--upgrade",
        "--check",
        "--logdir",
    }  # of pytest, pip, ruff and tensorboard
    for page in PAGES:
        lines = page.read_text(encoding="utf-8").replace("_size", "-size").splitlines()
        own_words = "\n".join(line for line in lines if not line.startswith(">"))  # what models wrote is quoted
        used = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", own_words))
        assert used <= known | foreign, (page.name, used - known - foreign)


def test_every_flag_stands_in_the_readme_with_its_default(actions):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for script, flag, action in actions:
        section = readme.split(f"### {script}.py", 1)[1].split("\n### ", 1)[0].split("\n## ", 1)[0]
        row = next((line for line in section.splitlines() if line.startswith(f"| `{flag}`")), None)
        assert row, f"{script} {flag} is not in the README"
        default = action.default
        if isinstance(default, bool) or default in (None, argparse.SUPPRESS):
            continue
        shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
        assert f"| `{shown}` |" in row, f"{script} {flag}: README does not say {shown}"


def test_every_help_tells_unit_and_default(actions):
    for script, flag, action in actions:
        assert len(action.help or "") > 8, (script, flag)


def test_links_between_the_pages_exist():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), (page.name, target)


def test_modules_keep_the_house_rules():
    """Scripts under 400 lines, modules under 300, the loop under 110, no pickle, no bare except."""
    for path in [*ROOT.glob("*.py"), *(ROOT / "utils").rglob("*.py")]:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= (400 if path.parent == ROOT else 300), path.name
        text = "\n".join(lines)
        assert not re.search(r"torch\.load\(|import pickle|type=bool|except:", text), path.name
    for module in (ROOT / "utils").rglob("*.py"):
        assert not re.search(r"import (prepare_data|finetune_generative|generate_text)", module.read_text())
