"""What the pages show between markers is what the stored figures give; other numbers stand in known places only."""

import re

import pytest

from benchmarks import experiments, figures, notes
from benchmarks.pages import CARD, MARKED, PAGES, ROOT, fill

STORED = figures.read_figures()
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
        "A larger model and a real book, in four minutes": "134.5 2 8",  # a model's name and form, cores
        "Your own book": "20,000 100,000 64",  # advice; megabytes from which a file is read in slices
        "With GPT-2 itself": "124 1 2 3",  # a model's size; versions of families
        "Guarantees": "2 3 130 143 129 30 1 4",  # cores, exit codes, a time limit in seconds, processes
        "How to read the numbers": "0 20 2 8 0.5 1 1.12",  # ends of scales, an example, the predecessor's
        "Machines": "2.11 2.13 14 15",  # versions of PyTorch; tests that ran on a lent GPU
        "Limits": "4 0",  # processes; process 0
        "Results": "2 8 128 3e-4 124",  # settings; a model's size
        "Retrospective": "50 0",  # a setting; process 0
    },
    "01_dataset_prep.md": {
        "Reading": "2006 34 39 16 300",  # pandoc and its limits
        "Faults of the text": "70 1,000",  # an example; of the rules
        "Splitting into segments": "1 6 16 3 1,000 32 1",  # of the rule that chooses segments; of a strip
        "Tokens": "3.5 4.5 2.5 8,192",  # bytes per token that are usual, and too few; characters compared
        "Blocks": "16 70000 4464 1",  # an example of a wrong type
        "A large corpus": "2 8 32 64 500 65,536 8.4 268 67 4.2",  # from where on a text is treated as a large one
        "Question": "1,016 128 7 120 127 8",  # tests/test_questions.py computes the answers of all notes
    },
    "02_finetuning_setup.md": {
        "Model and tokenizer": "30 0",  # a time limit in seconds; dropout
        "Device and dtype": "8",  # bits of bf16
        "Batches and steps": "128 8 1 4 2 2,048",  # defaults, an example, a limit
        "What a step costs": "2 4 16 12 8",  # operations and bytes per weight
        "Question": "16 17",
        "AdamW and the learning-rate schedule": "1 0 6",  # a gain; percent of the steps
        "Which learning rate?": "8 3 3e-4 5e-5",  # settings
        "LoRA": "2021 8 128 10 16 30 3e-3 64",  # a year; settings; advice
    },
    "03_training_loop.md": {
        "3. The training loop": "0",  # step 0
        "Labels are shifted once": "1 30 1.12 1e-5",  # positions; note 6; the predecessor's; a limit
        "Question": "0 4 6",
        "Stopping and resuming": "3 6",  # steps, an example
        "Several processes": "0 1 2 3 4 200 1e-6 1e-5",  # process 0; counts and limits of a test; an exit code
        "Training speed": "124 0.1 128 5 8 16 32 200 300,000 3,000",  # sizes and settings of the benchmark, of libgomp
        "On a GPU": "124 128 1,024 50,257 50,304 64",  # sizes and settings of the benchmark
    },
    "04_evaluation.md": {
        "Samples": "64 75 1,500 0.9 0.8 50 0.5 1",  # defaults, a limit, the end of a scale
        "Long texts": "512 8 4 10 500 2,000",  # of the model, the measures and the verdict
        "Style by likelihood": "95 8 0 40 20",  # of the intervals, of the general text, of the verdict
        "Style by text: words, spelling, sense": "150 500 1 4 0.5 0 97.5 0.75",  # of the measures and the verdict
        "The ladder": "200",  # steps
        # What an earlier version said, which no run of this one can repeat; limits of tests and measures.
        "Why the first verdict was fooled": "96 8.5 72 104 517 -453 67 92 95 0.5 1 10 15 150 46 57 20",
        "Judge any text": "1,500",  # words that are needed
        "Copying": "8 16 32 1 100 2026 5 150 20 10,000",  # of the measures; a control in the tests; a year
        "Repetition": "4 0.9",  # of the measures; the default temperature
        "Three books": "8",  # of the measure
        "Question": "1.00 0.95 0.40 0.78 0.75",
    },
    "05_scale.md": {  # process 0, exit codes, limits; what tests count; data sheets and shapes of models
        "5. More processes, more machines": "7 70",
        "One step, three processes": "8 3 2 0",  # an example
        "Two machines": "0 1 3",
        "Slurm": "30",
        "Memory": "0 0.45 1 2 4 4.0 6 15 16 43 50,257 55.6 64",
        "Traffic": "1 12 12.0",
        "7 and 70 billion parameters, on paper": "0 2 4 7 8 32 40 50 64 70 80 450 989 4,096 8,192 32,000",
        "Question": "16 8 14 7 0 262,144 73.5 78.8 0.16 1.6 3.9 2.5 3.2",
    },
    "06_classic_mistakes.md": {  # settings of the experiments
        "6. Classic mistakes": "4 12 24 60 64",
        "Labels and data": "30 32",
        "Losses": "1 11",
        "Training and resuming": "1 8 100 512 0.1 1e-2 1e-5",
        "Generation and comparison": "0 1 300 2,000",
        "Question": "11 1 12 2",
    },
    "backlog.md": {"Backlog": "0"},  # process 0
    "flags.md": {"All flags": "0 2 3 4 130 143 129 141"},  # exit codes
    "skills_competencies.md": {"Skills practised": "390"},  # books
}


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
    return notes.render()


@pytest.mark.parametrize("path", [*PAGES, CARD], ids=lambda path: path.name if path in PAGES else "card")
def test_pages_show_the_stored_figures(path, contents):
    page = path.read_text(encoding="utf-8")
    for marker, content in MARKED.findall(page):
        assert content == contents[marker], marker  # a marker without a figure is a KeyError
    assert page.count("<!-- =") == page.count("<!-- / -->") == len(MARKED.findall(page))
    assert not re.search(r"`<!-- =|<!-- / -->`", page)  # code shows them
    # Markdown reads a line that starts with a comment as HTML: only a table's or a text's marker may stand there.
    assert not re.findall(r"^[\s>*+-]*<!-- =\S+ -->(?!\n).*", page, re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_numbers_outside_markers_are_allowed(name):
    allowed, found = ALLOWED.get(name, {}), find_numbers(read(name))
    assert {*allowed} <= {*found}
    for title, numbers in found.items():
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
    assert figures.show("{:.1%}", 0.1143) == "11.4 %"
    assert figures.show(figures.INTERVAL, {"value": 0.344, "low": 0.17, "high": 0.65}) == "0.34 [0.17, 0.65]"
    assert figures.show("{:.3f}", None) == "not measured"
    assert figures.look_up({"a": [{"b": 3}]}, "a.0.b") == 3
    assert figures.look_up({"a": None}, "a.b") is None


def test_the_figures_are_those_of_the_demo():
    makefile = read_commands((ROOT / "Makefile").read_text(encoding="utf-8").replace("$(BASE)", "results/base_model"))
    assert makefile == notes.COMMANDS
    assert set(notes.COMMANDS) <= {line.removeprefix(".venv/bin/python ") for line in read("README.md").split("\n    ")}
    demo = STORED["demo"]["figures"]
    assert {*demo} == {*figures.NAMED} | {name for name, value in demo.items() if isinstance(value, list)}


def test_the_figures_are_of_known_experiments():
    assert {*STORED} <= {"demo", *notes.EXPERIMENTS}
    for name, group in STORED.items():
        assert re.fullmatch(r"[0-9a-f]{7,10}|unknown", group["commit"]), f"{name}: the code that ran is in no commit"


def test_a_table_that_a_test_prints_is_found():
    printed = (
        "..\nbook, read by x\n\n| a | b |\n|---|---|\n| 1 | 5% |\n.\nother\n| 2 |\nlast one\n\n| c |\n\n1 passed\n"
    )
    tables = experiments.find_tables(printed)
    assert tables == {"book": ["| a | b |", "|---|---|", "| 1 | 5% |"], "last": ["| c |"]}
    assert experiments.show_tables(tables)["book"] == "\n| a | b |\n|---|---|\n| 1 | 5 % |\n"


def test_a_table_aligns_figures_to_the_right():
    assert figures.make_table(" | >loss", [["a", "1"], ["", "2"]]) == "\n| | loss |\n|---|---:|\n| a | 1 |\n| | 2 |\n"


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
