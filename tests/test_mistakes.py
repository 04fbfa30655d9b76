"""The classic mistakes: each makes the project report a false figure, the right line a true one, and a test sees it."""

import json
import re
import subprocess
import sys

import pytest

from benchmarks import mistakes
from benchmarks.mistakes import MISTAKES, NOTE, RESULTS, ROOT, Lab, render

# Their difference needs text that can be learned, or time; test_finetune_generative.py resumes.
LARGE = {mistakes.loss_of_new_pages, mistakes.loss_of_the_whole_book, mistakes.gap_between_tokenizers,
         mistakes.verdict_on_shuffled_words, mistakes.loss_after_resuming}  # fmt: skip
TINY = [mistake for mistake in MISTAKES if mistake.experiment not in LARGE]
STORED = json.loads(RESULTS.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def figures(tmp_path_factory, tiny_model, book):
    """The figures of the experiments on a tiny model, by title."""
    folder, text = tmp_path_factory.mktemp("mistakes"), book.read_text(encoding="utf-8")
    lab = Lab(folder, tiny_model, text, "", block_size=32, steps=2)
    return {mistake.title: figures for mistake, figures in mistakes.measure(lab, TINY)}


def check(mistake, figures):
    right, wrong = (abs(reported - true) for reported, true in (figures["right"], figures["wrong"]))
    assert right <= mistake.tolerance < wrong, (mistake.title, figures)


@pytest.mark.parametrize("mistake", TINY, ids=lambda mistake: mistake.title)
def test_the_wrong_line_reports_a_false_figure_and_the_right_one_a_true(mistake, figures):
    check(mistake, figures[mistake.title])


def test_the_note_has_the_figures_of_the_last_run():
    assert list(STORED) == [mistake.title for mistake in MISTAKES]
    for mistake in MISTAKES:
        check(mistake, STORED[mistake.title])
        assert STORED[mistake.title]["guard"] == mistake.guard
    assert render()["mistakes"] in NOTE.read_text(encoding="utf-8")


def test_the_lines_and_the_guards_exist():
    for mistake in MISTAKES:
        assert (ROOT / mistake.path).read_text(encoding="utf-8").count(mistake.right) == 1, mistake.title
        path, name = mistake.guard.split("::")
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), mistake.guard


def test_the_answer_to_the_question():
    """What the step logs without weights, from the mean over all blocks and the loss of the last one."""
    note = NOTE.read_text(encoding="utf-8")
    first, last = map(int, re.search(r"batches of (\d+) and (\d+) blocks?\b", note).groups())
    of_last, mean = STORED["the last micro-batch logged"]["wrong"]
    of_first = (mean * (first + last) - of_last * last) / first
    assert (of_first + of_last) / 2 == pytest.approx(STORED["accumulation not weighted"]["wrong"][0], abs=1e-4)


@pytest.mark.slow
def test_each_guard_fails_where_its_mistake_is_planted():
    ran = subprocess.run([sys.executable, "tests/mutants.py", "mistakes"], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
