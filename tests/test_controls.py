"""Controls on the embedded base model and the sample book: does the verdict see what was planted?"""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
BASE, BOOK, OTHER = ROOT / "results/base_model", ROOT / "results/data/book.txt", ROOT / "results/data/control.txt"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, script_once):
    """Prepare a text and train on it: trained(name, text, flags) -> the run's folder; made once each."""
    folder = tmp_path_factory.mktemp("controls")

    def make(name, text, *flags):
        if not (folder / name).exists():
            book, blocks = folder / f"{name}.txt", folder / f"{name}_blocks"
            book.write_text(text, encoding="utf-8")
            script_once("prepare_data", "--input-path", book, "--model-name", BASE, "--output-dir", blocks)
            script_once("finetune_generative", "--data-dir", blocks, "--output-dir", folder / name, "--sample-tokens",
                        0, *flags)  # fmt: skip
        return folder / name

    return make


@pytest.fixture
def judged(script):
    """Run generate_text.py on a folder and return its report."""

    def run(folder, *flags):
        ran = script("generate_text", "--finetuned-model", folder, *flags)
        assert ran.code == 0, ran.err
        return json.loads((folder / "report.json").read_text(encoding="utf-8"))

    return run


HEALTHY = ["--learning-rate", "3e-4"]


def test_a_healthy_run_learns_its_book_and_is_not_flagged(trained, judged):
    report = judged(trained("log", BOOK.read_text(encoding="utf-8"), *HEALTHY))
    auc = {column: found["value"] for column, found in report["reader_auc"].items()}
    for found in (report["delta"], auc):
        assert found["reference"] < found["finetuned"] < found["base"]
    assert report["style_gain"]["low"] > 0
    assert report["flags"].pop("learned_the_book")
    assert not any(report["flags"].values())


def test_a_model_of_another_text_does_not_pass(trained, judged):
    other = trained("other", OTHER.read_text(encoding="utf-8"), *HEALTHY)
    blocks = trained("log", BOOK.read_text(encoding="utf-8"), *HEALTHY).parent / "log_blocks"
    report = judged(other, "--data-dir", blocks)
    assert report["flags"]["learned_the_book"] is False


def test_twenty_memorized_segments_are_flagged(trained, judged):
    segments = BOOK.read_text(encoding="utf-8").split("\n\n")[:60]  # an entry of the log has three or more
    folder = trained("small", "\n\n".join(segments) + "\n", "--learning-rate", "2e-3", "--lr-schedule", "constant",
                     "--dropout", 0, "--epochs", 150, "--eval-every", 450)  # fmt: skip
    report = judged(folder)
    assert report["extraction"]["finetuned"]["train"]["exact_match"] >= 0.9
    assert report["extraction"]["base"]["train"]["exact_match"] == 0
    assert report["flags"]["memorized"]
    assert report["flags"]["copies"]
    assert "It recites" in " ".join(report["verdict"])
    assert "Do not share" in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("learning_rate", "forgets"), [("1e-2", True), ("1e-5", False)])
def test_a_learning_rate_too_high_makes_it_forget(trained, judged, learning_rate, forgets):
    book = BOOK.read_text(encoding="utf-8")
    report = judged(trained(f"rate{learning_rate}", book, "--learning-rate", learning_rate, "--epochs", 2))
    assert report["flags"]["forgot"] is forgets
    assert ("It forgot much" in " ".join(report["verdict"])) is forgets
