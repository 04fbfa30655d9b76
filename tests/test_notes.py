"""What README and notes show between markers is what the stored figures give; other numbers stand in known places only.

python -m tests.test_notes    count the numbers of the sections that are still written by hand
"""

import json
import re

import pytest

from benchmarks import guarantees, mistakes, notes
from benchmarks.pages import MARKED, PAGES, ROOT, fill
from benchmarks.run import write_targets

STORED = json.loads(notes.FIGURES.read_text(encoding="utf-8"))
NAMES = [page.name for page in PAGES]
NUMBER = re.compile(r"(?<![\w.-])-?\d(?:[\d,.]*\d)?(?:e-?\d+)?")
# What is no figure of a page: markers with their content, code, targets of links, numbers of notes, flags, lists.
NO_FIGURES = [
    (MARKED, ""),
    (re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL), ""),
    (re.compile(r"^(?: {4}|\| `--).*$", re.MULTILINE), ""),
    (re.compile(r"`[^`]*`"), ""),
    (re.compile(r"\[(?:[Nn]ote\s+)?\d+\]\([^)]*\)"), ""),
    (re.compile(r"\]\([^)]*\)"), "]"),
    (re.compile(r"^\s*\d+\. ", re.MULTILINE), ""),
]
# The numbers that a section may have outside markers: settings, definitions and names, which no run changes.
ALLOWED = {
    "README.md": {
        "Quick start": "3.11",  # Python
        "Your own book": "20,000 100,000 64",  # advice; megabytes from which a file is read in slices
        "Guarantees": "2 3 130 143 129 30 1 4",  # cores, exit codes, a time limit in seconds, processes
        "How to read the numbers": "0 20 2 8 0.5 1 1.12",  # ends of scales, an example, the predecessor's
        "Limits": "4 0",  # processes; process 0
    },
    "01_dataset_prep.md": {
        "Reading": "2006 34 39 16 300",  # pandoc and its limits
        "Splitting into segments": "6 17 3 1,000 32 1",  # of the rule that chooses segments
        "Tokens": "3.5 4.5 2.5",  # bytes per token that are usual, and too few
        "Blocks": "16 70000 4464 1",  # an example of a wrong type
    },
    "02_finetuning_setup.md": {
        "Model and tokenizer": "30 0",  # a time limit in seconds; dropout
        "Device and dtype": "8",  # bits of bf16
        "Batches and steps": "128 8 1 4 2 2,048",  # defaults, an example, a limit
        "AdamW and the learning-rate schedule": "1 0 6",  # a gain; percent of the steps
    },
    "03_training_loop.md": {
        "3. The training loop": "0",  # step 0
        "Stopping and resuming": "3 6",  # steps, an example
    },
    "04_evaluation.md": {
        "Style by likelihood": "95 8 0 40 20",  # of the intervals, of the general text, of the verdict
        "Style by text: words, spelling, sense": "150 500 1 4 0.5 0 97.5 0.75",  # of the measures and the verdict
        "Judge any text": "1,500",  # words that are needed
        "Copying": "8 16 32 1 100 2026 5 150 20 10,000",  # of the measures; a control in the tests; a year
        "Repetition": "4 0.9",  # of the measures; the default temperature
    },
    "backlog.md": {"Backlog": "0"},  # process 0
    "flags.md": {"All flags": "0 2 3 4 130 143 129"},  # exit codes
}
# Sections whose figures come from other runs than the demo, and are still written by hand.
BY_HAND = {
    "README.md": ["A larger model and a real book, in four minutes", "With GPT-2 itself", "Machines", "Results",
                  "Retrospective"],
    "01_dataset_prep.md": ["Faults of the text", "A large corpus"],
    "02_finetuning_setup.md": ["Which learning rate?", "LoRA"],
    "03_training_loop.md": ["Labels are shifted once", "Checkpoints are atomic", "Several processes", "Training speed",
                            "On a GPU"],
    "04_evaluation.md": ["Samples", "Long texts", "The ladder", "Why the first verdict was fooled", "Three books"],
    "05_scale.md": ["5. More processes, more machines", "Two machines", "Slurm", "Memory", "Traffic",
                    "7 and 70 billion parameters, on paper"],
    "06_classic_mistakes.md": ["6. Classic mistakes", "Labels and data", "Losses", "Training and resuming",
                               "Generation and comparison"],
    "skills_competencies.md": ["Skills practised"],
}  # fmt: skip


def read(name):
    return next(page for page in PAGES if page.name == name).read_text(encoding="utf-8")


def find_numbers(page):
    """Return the numbers outside markers by section of a page."""
    for form, new in NO_FIGURES:
        page = form.sub(new, page)
    parts = re.split(r"^#+ (.+)$", page, flags=re.MULTILINE)
    return {title: NUMBER.findall(text) for title, text in zip(parts[1::2], parts[2::2], strict=True)}


@pytest.fixture(scope="module")
def contents():
    results = json.loads((ROOT / "benchmarks/results.json").read_text(encoding="utf-8"))
    rows = json.loads(mistakes.RESULTS.read_text(encoding="utf-8"))
    soak = guarantees.render_soak(guarantees.read_stored())
    return notes.render(STORED) | soak | {"benchmarks": write_targets(results), "mistakes": mistakes.write_table(rows)}


@pytest.mark.parametrize("name", NAMES)
def test_pages_show_the_stored_figures(name, contents):
    page = read(name)
    for marker, content in MARKED.findall(page):
        assert content == contents[marker], marker  # a marker without a figure is a KeyError
    assert page.count("<!-- =") == page.count("<!-- / -->") == len(MARKED.findall(page))
    assert not re.search(r"`<!-- =|<!-- / -->`", page)  # code shows them
    # Markdown reads a line that starts with a comment as HTML: only a table's or a text's marker may stand there.
    assert not re.findall(r"^[\s>*+-]*<!-- =\S+ -->(?!\n).*", page, re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_numbers_outside_markers_are_allowed(name):
    by_hand, allowed = BY_HAND.get(name, []), ALLOWED.get(name, {})
    found = find_numbers(read(name))
    assert {*by_hand, *allowed} <= {*found}
    for title, numbers in found.items():
        if title in by_hand:
            assert numbers, f"{title} has none left: take it out of BY_HAND"
        else:
            assert set(numbers) == set(allowed.get(title, "").split()), (title, numbers)


def test_a_number_outside_a_marker_is_found():
    page = (
        "## A\na <!-- =x -->4.5<!-- / --> to 3.405, `7`, -0.1 %\n\n    run 8\n## B\nGPT-2 of [note 3](a#b9), 1,000 bf16"
    )
    assert find_numbers(page) == {"A": ["3.405", "-0.1"], "B": ["1,000"]}


def test_filling_changes_what_stands_between_markers_alone():
    page = "a <!-- =x -->1<!-- / --> 1 <!-- =y.z -->2<!-- / -->\n<!-- =t -->\n| 1 |\n<!-- / -->\n"
    assert fill(page, {"x": "8", "t": "\n| 9 |\n"}) == page.replace(">1<", ">8<").replace("| 1 |", "| 9 |")
    assert fill(page, {}) == page


def test_a_figure_is_shown_in_one_form():
    assert notes.show("{:.1%}", 0.1143) == "11.4 %"
    assert notes.show(notes.INTERVAL, {"value": 0.344, "low": 0.17, "high": 0.65}) == "0.34 [0.17, 0.65]"
    assert notes.show("{:.3f}", None) == "not measured"
    assert notes.look_up({"a": [{"b": 3}]}, "a.0.b") == 3
    assert notes.look_up({"a": None}, "a.b") is None


def test_the_figures_are_those_of_the_demo():
    makefile = read_commands((ROOT / "Makefile").read_text(encoding="utf-8").replace("$(BASE)", "results/base_model"))
    assert makefile == notes.COMMANDS
    assert set(notes.COMMANDS) <= {line.removeprefix(".venv/bin/python ") for line in read("README.md").split("\n    ")}
    texts = {name for name, value in STORED["figures"].items() if isinstance(value, list)}
    assert {*STORED["figures"]} == {f"demo.{name}" for name in notes.NAMED} | texts


def read_commands(makefile):
    return re.findall(r"^\t\$\(BIN\)/python (.+)$", makefile.split("\ndemo:")[1].split("\n\n")[0], re.MULTILINE)


def test_the_printed_lines_that_are_shown():
    printed = (
        "x\nprepared here\n  text   9 words\n\n  other\nstep 0: a\nstep 10: b\nstep 20: c\n\nIt learned.\nIt copies.\n"
    )
    assert notes.select_printed(printed, ["It learned."], 20) == [
        "```", "...", "prepared here", "  text   9 words", "...", "step 0: a", "...", "step 20: c", "It learned.",
        "```",
    ]  # fmt: skip


def main():
    for page in PAGES:
        counts = {title: len(numbers) for title, numbers in find_numbers(page.read_text(encoding="utf-8")).items()}
        for title in BY_HAND.get(page.name, []):
            print(f"{counts[title]:5} {page.name}: {title}")


if __name__ == "__main__":
    main()
