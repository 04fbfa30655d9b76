"""README and notes agree with the code: flags, defaults, links, paths; and all texts use the project's words."""

import argparse
import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
from mutants import GUARDS

from benchmarks.pages import fill

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "notes").glob("*.md")), *sorted((ROOT / "results").glob("*/README.md"))]
SCRIPTS = ["prepare_data", "finetune_generative", "generate_text"]
# Of pytest, pip, ruff, tensorboard, hf, torchrun and Slurm.
FOREIGN_FLAGS = {
    "--full", "--books", "--corpus", "--version", "--quiet", "--upgrade", "--check", "--logdir", "--private",
    "--exclude", "--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id", "--node-rank",
    "--master-addr", "--master-port", "--nodes", "--ntasks-per-node", "--gpus-per-node", "--signal", "--requeue",
}  # fmt: skip
# Words and forms that have a plain replacement: "tokens a block" is "tokens per block".
UNITS = "tokens?|nats|bits?|bytes?|words?|steps?|blocks?|updates?|lines?|samples?|batches|micro-batches|seconds"
PER = "token|byte|block|batch|step|update|epoch|sentence|paragraph|second|line|process|model|prompt|forward"
REPLACED = [
    rf"\b({UNITS}) an? ({PER})\b",
    rf"\d an ({PER})\b",
    r"\bdice\b",
    r"\byardsticks?\b",
    r"\bstretch(es)?\b",
    r"\bheld[- ]out\b",
    r"\b(keep|kept|set|sets) aside\b",
    r"\b(learn|learned|learns) by heart\b",
    r"\brecit(e|es|ed|ing)\b",
    r"\bit deceives because\b",
    r"\bleast denominator\b",
    r"\bbegun\b",
    r"\bgoes on\b",
    r"\bruns? of \d",
    r"\b(optimizer|weight) updates?\b",
    r"\bpassages?\b",
]


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
def parsers(monkeypatch):
    return {name: parser_of(name, monkeypatch) for name in SCRIPTS}


@pytest.fixture
def actions(parsers):
    """(script, flag, action) of every flag but --help."""
    return [
        (name, action.option_strings[0], action)
        for name, parser in parsers.items()
        for action in parser._actions
        if not isinstance(action, argparse._HelpAction)
    ]


def own_words(page):
    """Return a page without quotations (lines that start with '>', texts of models), code blocks included."""
    text = fill(page.read_text(encoding="utf-8"), {"demo.excerpts": "", "demo.printed": ""})
    return "\n".join(line for line in text.splitlines() if not line.startswith(">"))


def shown_default(action):
    """Return the text of a default in a table, None where it depends on the run."""
    if isinstance(action.default, bool):
        return "on" if action.default else "off"
    if action.default in (None, argparse.SUPPRESS):
        return None
    return f"`{' '.join(map(str, action.default)) if isinstance(action.default, list) else action.default}`"


def rows_of(text):
    """Return the cells of every table row that starts with a flag."""
    found = re.findall(r"^\| `(--[a-z0-9-]+)` \|(.+)\|$", text, re.MULTILINE)
    return [(flag, *(cell.strip() for cell in cells.split(" | "))) for flag, cells in found]


def test_flags_in_the_pages_exist(actions):
    known = {option for _, _, action in actions for option in action.option_strings} | {"--help"}
    for page in PAGES:
        used = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", own_words(page).replace("_size", "-size")))
        assert used <= known | FOREIGN_FLAGS, (page.name, used - known - FOREIGN_FLAGS)


def test_commands_in_the_pages_parse():
    command = re.compile(r"^ {4}(?:\.venv/bin/)?python (\w+)\.py(?: (.*))?$", re.MULTILINE)
    found = [(page.name, *each) for page in PAGES for each in command.findall(own_words(page).replace("\\\n", " "))]
    assert len(found) > 20
    for _, script, flags in found:
        importlib.import_module(script).parse_args(shlex.split(flags.split(" & ")[0]))  # UserError where it is wrong


def test_every_flag_stands_in_the_notes_with_its_default(actions):
    page = (ROOT / "notes/flags.md").read_text(encoding="utf-8")
    for script in SCRIPTS:
        rows = rows_of(page.split(f"\n## {script}.py\n", 1)[1].split("\n## ", 1)[0])
        flags = {flag: action for name, flag, action in actions if name == script}
        assert [flag for flag, *_ in rows] == list(flags), script  # all of them, once, in the order of --help
        for flag, default, *_ in rows:
            shown = shown_default(flags[flag])
            assert shown is None or default == shown, f"{script} {flag}: notes/flags.md says {default}, not {shown}"


def test_flags_in_the_readme_have_their_defaults(actions):
    known = {(f"`{script}.py`", flag): action for script, flag, action in actions}
    rows = rows_of((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(rows) >= 10
    for flag, script, default, *_ in rows:
        shown = shown_default(known[script, flag])
        assert shown is None or default == shown, f"{script} {flag}: README says {default}, not {shown}"


def test_every_help_tells_unit_and_default(actions):
    for script, flag, action in actions:
        assert len(action.help or "") > 8, (script, flag)


def test_links_between_the_pages_exist():
    for page in [*PAGES, ROOT / "benchmarks/README.md"]:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if "://" in target:
                continue
            path, _, anchor = target.partition("#")
            linked = page.parent / path if path else page
            assert linked.exists(), (page.name, target)
            if anchor:
                titles = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target


def test_paths_in_the_pages_exist():
    for page in PAGES:
        for path in re.findall(r"\b(?:utils|tests|benchmarks|notes)/[\w./-]*\w", own_words(page)):
            assert (ROOT / path).exists(), (page.name, path)
        for module in re.findall(r"python -m (benchmarks\.\w+)", own_words(page)):
            assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), (page.name, module)


def docstrings():
    """Yield (place, text) of every docstring in the scripts and under utils/."""
    for path in [*ROOT.glob("*.py"), *sorted((ROOT / "utils").rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                yield f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}", text


def test_replaced_words_are_gone(parsers):
    texts = [(str(page.relative_to(ROOT)), own_words(page)) for page in PAGES]
    texts += [(f"{name}.py --help", parser.format_help()) for name, parser in parsers.items()]
    templates = sorted((ROOT / "utils/evaluation/pages").iterdir())
    texts += [(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")) for path in templates]
    found = []
    for place, text in [*texts, *docstrings()]:
        flat = re.sub(r"\s+", " ", text)
        found += [f"{place}: {match[0]!r}" for form in REPLACED for match in re.finditer(form, flat, re.IGNORECASE)]
    assert not found, "\n".join(found)


def test_every_guard_that_mutants_removes_is_there_once():
    for module, snippet, _, test in GUARDS:
        assert (ROOT / module).read_text(encoding="utf-8").count(snippet) == 1, (module, snippet)
        path, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / "tests" / path).read_text(encoding="utf-8"), test


def test_modules_keep_the_house_rules():
    """Scripts under 400 lines, modules under 300, the loop under 110, no pickle, no bare except."""
    for path in [*ROOT.glob("*.py"), *(ROOT / "utils").rglob("*.py")]:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= (400 if path.parent == ROOT else 300), path.name
        text = "\n".join(lines)
        assert not re.search(r"torch\.load\(|import pickle|type=bool|except:", text), path.name
    for module in (ROOT / "utils").rglob("*.py"):
        assert not re.search(r"import (prepare_data|finetune_generative|generate_text)", module.read_text())
