"""The report through its command: its contract, and every figure once more from samples.jsonl and the data folder."""

import dataclasses
import hashlib
import json
import math
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import MEASURED_FLAGS, make_book
from datasets import load_from_disk
from scorer import independent_loss

from utils.data.blocks import open_blocks
from utils.data.tokenizer import load_tokenizer, train_tokenizer
from utils.evaluation import stylometry
from utils.evaluation.columns import build_columns
from utils.evaluation.compare import compare_texts, find_copy_limit, list_training_books, make_quiz
from utils.evaluation.loss import measure_gain
from utils.evaluation.memorization import CopyMonitor, default_copy_rate
from utils.evaluation.stylometry import MIN_WORDS, split_words
from utils.model.loading import autocast, load_pair
from utils.training.checkpoint import TrainState

MISSING = ["--num-validation-prompts", 2, "--max-new-tokens", 8]
MODELS = ("base", "finetuned")


def fp32():
    return autocast(torch.device("cpu"), "fp32")


def read(folder: Path):
    rows = [json.loads(line) for line in (folder / "samples.jsonl").open(encoding="utf-8")]
    return folder, json.loads((folder / "report.json").read_text(encoding="utf-8")), rows


@pytest.fixture
def reported(measured):
    return read(measured)


def token_rows(data: Path, split: str) -> list[list[int]]:
    return load_from_disk(str(data))[split]["input_ids"]


def brute_share(texts, train, length):
    """Share of tokens in an n-gram of training, by comparing tuples."""
    ngrams = {tuple(train[i : i + length]) for i in range(len(train) - length + 1)}
    copied = 0
    for text in texts:
        marked = set()
        for start in range(len(text) - length + 1):
            if tuple(text[start : start + length]) in ngrams:
                marked |= set(range(start, start + length))
        copied += len(marked)
    return copied / sum(map(len, texts))


def test_a_line_of_samples_has_what_outsiders_were_promised(reported):
    _, _, rows = reported
    for row in rows:
        assert list(row) == ["prompt", "model", "sample_index", "seed", "prompt_ids", "generated_ids", "text"]
    pairs = {
        name: [(r["prompt"], r["sample_index"], r["seed"], r["prompt_ids"]) for r in rows if r["model"] == name]
        for name in MODELS
    }
    assert pairs["base"] == pairs["finetuned"]
    assert len({(seed, tuple(ids)) for _, _, seed, ids in pairs["base"]}) == len(pairs["base"])


def test_the_report_has_what_outsiders_were_promised(reported):
    folder, report, rows = reported
    assert report["style_gain"].keys() == {"value", "low", "high"}
    assert isinstance(report["forgetting_percent"], float)
    for measure in ("delta", "cosine_delta", "unknown_words"):
        assert report[measure].keys() == {"reference", "finetuned", "base"}
        for name, value in report[measure].items():
            low, high = report["intervals"][measure][name]
            assert low <= value <= high
    for name in ("reference", "finetuned", "base"):
        assert report["copy_rate"][name].keys() == {"8", "16", "32"}
        assert report["reader_auc"][name].keys() == {"value", "low", "high"}
        assert report["gap_closed"][name].keys() == {"value", "low", "high"}
        assert report["parts"][name].keys() <= {"words", "spelling", "sense"}
    assert report["gap_closed"]["base"]["value"] == 0
    assert report["gap_closed"]["reference"]["value"] == 1
    assert report["judged"] == {}
    assert report["longest_copy"]["finetuned"]["tokens"] > 0
    for name in MODELS:
        assert report["extraction"][name].keys() == {"train", "validation"}
    assert all(isinstance(sentence, str) for sentence in report["verdict"])
    assert len(report["verdict"]) == 8
    assert report["missing"] == []
    for name in ("base_sha256", "finetuned_sha256", "data_sha256", "control_sha256", "seed", "temperature", "top_p"):
        assert report["settings"][name] is not None
    lines = (folder / "samples.jsonl").read_bytes()
    assert report["settings"]["samples_sha256"] == hashlib.sha256(lines).hexdigest()
    assert report["n_samples"] == len(rows)


def test_samples_are_drawn_until_there_are_words_enough(reported):
    _, report, rows = reported
    rounds = max(row["sample_index"] for row in rows) + 1
    words = {name: [sum(len(split_words(r["text"])) for r in rows if r["model"] == name and r["sample_index"] < n)
                    for n in (rounds - 1, rounds)] for name in MODELS}  # fmt: skip
    assert min(before for before, _ in words.values()) < MIN_WORDS
    assert min(after for _, after in words.values()) >= MIN_WORDS
    assert all(abs(report["counts"]["words"][name] - after) <= 2 for name, (_, after) in words.items())


def test_copying_from_samples_and_data_folder_alone(large, reported):
    _, report, rows = reported
    train = [token for row in token_rows(large / "blocks", "train") for token in row]
    texts = {name: [row["generated_ids"] for row in rows if row["model"] == name] for name in MODELS}
    validation = [token for row in token_rows(large / "blocks", "validation") for token in row]
    manifest = json.loads((large / "blocks/manifest.json").read_text())
    spans = [span["tokens"] for span in manifest["spans"] if span["split"] == "validation"]
    starts = [i for start, end in spans for i in range(start, min(end, len(validation)) - 29, 30)]
    texts["reference"] = [validation[i : i + 30] for i in starts]  # cut as the samples are
    for name, ids in texts.items():
        for length in (8, 16, 32):
            assert report["copy_rate"][name][str(length)] == pytest.approx(brute_share(ids, train, length), abs=1e-12)
        longest = report["longest_copy"][name]["tokens"]
        assert longest == 0 or brute_share(ids, train, longest) > 0
        assert brute_share(ids, train, longest + 1) == 0
    assert report["copy_rate"]["finetuned"]["8"] > report["copy_rate"]["base"]["8"]


def test_the_longest_span_is_at_its_position_in_the_book(large, reported):
    _, report, _ = reported
    book = (large / "book.txt").read_text(encoding="utf-8")
    for span in report["longest_copy"].values():
        if span["tokens"]:
            assert book[span["char"] :].startswith(span["text"])
            assert span["share"] == pytest.approx(span["char"] / len(book))
    for source in report["sources"]:
        crosses = not source["after"]  # two segments meet there in training, where validation text was taken out
        assert crosses or book[source["char"] :].startswith(source["text"] + source["after"])
        assert book[: source["char"]].endswith(source["before"])
        assert source["tokens"] >= 8
    pieces = [piece for row in report["texts"] for text in row["columns"]["finetuned"] for piece in text]
    marked = [piece for piece in pieces if piece["source"] is not None]
    assert marked
    for piece in marked:
        assert report["sources"][piece["source"]]["text"].endswith(piece["text"])


def test_scores_are_an_independent_scorers(large, tiny_model, reported):
    _, report, _ = reported
    rows = torch.tensor(token_rows(large / "blocks", "validation"))
    manifest = json.loads((large / "blocks/manifest.json").read_text())["splits"]["validation"]
    gains = []
    for name, folder in (("base", tiny_model), ("finetuned", large / "model")):
        loss = independent_loss(load_pair(folder)[0], rows)
        assert report["scores"]["book"][name]["eval/loss"] == pytest.approx(loss, abs=1e-5)
        gains.append(loss / math.log(2) / (manifest["bytes"] / manifest["tokens"]))
    assert report["book_gain"]["value"] == pytest.approx(gains[0] - gains[1], abs=1e-5)
    assert report["style_gain"]["value"] == pytest.approx(
        report["book_gain"]["value"] - report["control_gain"]["value"], abs=1e-12
    )
    control = report["scores"]["control"]
    ratio = control["finetuned"]["eval/bits_per_byte"] / control["base"]["eval/bits_per_byte"]
    assert report["forgetting_percent"] == pytest.approx(100 * (ratio - 1), abs=1e-9)


def test_word_table_and_lengths_from_samples_alone(reported):
    _, report, rows = reported
    for name in MODELS:
        words = split_words("\n".join(row["text"] for row in rows if row["model"] == name))
        counts = Counter(words)
        for entry in report["words"]:
            assert entry[name] == pytest.approx(1000 * counts[entry["word"]] / len(words), abs=0.006)


def test_the_same_command_gives_the_same_report(large, reported, script):
    folder, _, _ = reported
    assert script("generate_text", "--finetuned-model", large / "model", *MEASURED_FLAGS).code == 0
    for name in ("samples.jsonl", "report.json", "report.html", "report.md", "quiz.html", "README.md"):
        assert (large / "model" / name).read_bytes() == (folder / name).read_bytes(), name


def test_base_against_itself_gains_nothing(large, tiny_model, script, tmp_path):
    """The whole report on two copies of one model: gain 0 within its interval, and no praise."""
    shutil.copytree(tiny_model, tmp_path / "copy")
    flags = ["--base-model", tiny_model, "--data-dir", large / "blocks", *MEASURED_FLAGS]
    assert script("generate_text", "--finetuned-model", tmp_path / "copy", *flags).code == 0
    _, report, _ = read(tmp_path / "copy")
    assert report["style_gain"]["low"] <= 0 <= report["style_gain"]["high"]
    assert report["style_gain"]["value"] == report["forgetting_percent"] == 0
    assert report["delta"]["base"] == pytest.approx(report["delta"]["finetuned"], rel=0.02)  # other selections of texts
    assert report["flags"]["writes_like_the_book"] is not True
    assert report["flags"]["learned_the_book"] is False
    assert not (tmp_path / "copy" / "README.md").exists()  # not ours: no card is written there


def test_another_projects_model_card_stays(large, tiny_model, script, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "theirs")
    (tmp_path / "theirs" / "README.md").write_text("their own words")
    flags = ["--base-model", large / "model", "--data-dir", large / "blocks", *MISSING, "--no-measure"]
    assert script("generate_text", "--finetuned-model", tmp_path / "theirs", *flags).code == 0
    assert (tmp_path / "theirs" / "README.md").read_text() == "their own words"


def test_no_copied_span_is_longer_than_max_copy(large, script):
    folder = large / "model"
    ran = script("generate_text", "--finetuned-model", folder, *MEASURED_FLAGS, "--max-copy", 5)
    assert ran.code == 0, ran.err
    _, report, rows = read(folder)
    train = [token for row in token_rows(large / "blocks", "train") for token in row]
    assert brute_share([row["generated_ids"] for row in rows], train, 6) == 0
    assert report["longest_copy"]["finetuned"]["tokens"] <= 5
    assert report["max_copy"]["tokens"] == 5
    generated = sum(len(row["generated_ids"]) for row in rows)
    assert 0 < report["max_copy"]["acted"] <= report["max_copy"]["generated"] == generated
    assert f"--max-copy 5 restricted the choice of {report['max_copy']['acted']:,} of" in report["verdict"][-1]


def test_a_base_of_another_family_is_refused(large, tiny_model, script, tmp_path):
    """As many tokens, but other ones: the base would be scored on foreign ids."""
    base = shutil.copytree(tiny_model, tmp_path / "base")
    other = train_tokenizer(["Quite other words make quite another vocabulary, zebra by zebra. " * 50], 400)
    while len(other) < 400:
        other.add_tokens(f"extra{len(other)}")
    other.save_pretrained(base)
    assert len(load_tokenizer(base)) == len(load_tokenizer(large / "model"))
    ran = script("generate_text", "--finetuned-model", large / "model", "--base-model", base, *MISSING)
    assert (ran.code, "different tokenizers" in ran.err) == (2, True)


def test_a_small_book_gets_the_report_that_is_possible(prepared, tiny_model, script, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "tuned")
    flags = ["--finetuned-model", tmp_path / "tuned", "--base-model", prepared / "none", "--data-dir", prepared]
    flags[3] = shutil.copytree(tiny_model, tmp_path / "base")
    ran = script("generate_text", *flags, *MISSING)
    assert ran.code == 0, ran.err
    _, report, _ = read(tmp_path / "tuned")
    assert "delta" not in report
    assert report["copy_rate"]["reference"]["8"] > 0
    assert "style_gain" in report
    assert any("1,500 words" in reason and "reference: " in reason for reason in report["missing"])
    assert "not measured" in ran.out
    assert "1,500 words" in (tmp_path / "tuned" / "report.html").read_text()


def test_without_validation_text_the_rest_is_measured(book, tiny_model, script, tmp_path):
    ran = script("prepare_data", "--input-path", book, "--model-name", tiny_model, "--block-size", 32, "--val-split", 0,
                 "--output-dir", tmp_path / "blocks")  # fmt: skip
    assert ran.code == 0
    shutil.copytree(tiny_model, tmp_path / "tuned")
    base = shutil.copytree(tiny_model, tmp_path / "base")
    flags = ["--finetuned-model", tmp_path / "tuned", "--base-model", base, "--data-dir", tmp_path / "blocks"]
    assert script("generate_text", *flags, *MISSING).code == 0
    _, report, _ = read(tmp_path / "tuned")
    assert report["copy_rate"].keys() == {"base", "finetuned"}
    assert report["forgetting_percent"] == 0
    assert not {"style_gain", "extraction", "delta"} & report.keys()
    assert any("--val-split 0" in reason for reason in report["missing"])


@pytest.mark.parametrize("flag", [[], ["--no-measure"]])
def test_without_data_or_measures_there_are_samples(tiny_model, script, tmp_path, flag):
    shutil.copytree(tiny_model, tmp_path / "tuned")
    base = shutil.copytree(tiny_model, tmp_path / "base")
    ran = script("generate_text", "--finetuned-model", tmp_path / "tuned", "--base-model", base, *MISSING, *flag)
    assert ran.code == 0, ran.err
    _, report, rows = read(tmp_path / "tuned")
    assert len(rows) == 2 * 2
    assert report["missing"]
    assert ("forgetting" in report) == (not flag)
    assert not {"delta", "copy_rate", "extraction"} & report.keys()
    for page in ("report.html", "report.md"):
        assert (tmp_path / "tuned" / page).stat().st_size > 500


def test_samples_alone_leave_a_measured_report(measured, script, tmp_path):
    """They took the place of the report, and of a card that said not to share the model."""
    pages = ["report.json", "report.html", "report.md", "quiz.html", "README.md"]
    run = shutil.copytree(measured, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    ran = script("generate_text", "--finetuned-model", run, *MISSING, "--no-measure")
    assert ran.code == 0, ran.err
    assert len(read(run)[2]) == 2 * 4
    for name in pages:
        assert (run / name).read_bytes() == (measured / name).read_bytes(), name
    assert ran.out.endswith("report and model card stay those of the measured samples\n")
    (run / "report.json").unlink()  # a report without measures takes the place of one without
    for seed in (1, 2):
        assert script("generate_text", "--finetuned-model", run, *MISSING, "--no-measure", "--seed", seed).code == 0
        assert read(run)[1]["settings"]["seed"] == seed


def test_a_control_text_of_ones_own(large, script, tmp_path):
    flags = ["--finetuned-model", large / "model", *MISSING, "--no-measure"]
    assert script("generate_text", *flags[:-1], "--control-path", tmp_path / "none.txt").code == 2
    (tmp_path / "own.txt").write_text("The cat sat on the mat and looked at me.\n\n" * 40)
    assert script("generate_text", *flags[:-1], "--control-path", tmp_path / "own.txt").code == 0
    _, report, _ = read(large / "model")
    digest = hashlib.sha256((tmp_path / "own.txt").read_bytes()).hexdigest()
    assert report["settings"]["control_sha256"] == digest


def test_max_copy_without_training_text_is_refused(tiny_model, script, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "tuned")
    base = shutil.copytree(tiny_model, tmp_path / "base")
    ran = script("generate_text", "--finetuned-model", tmp_path / "tuned", "--base-model", base, "--max-copy", 8)
    assert ran.code == 2
    assert "--max-copy" in ran.err


def test_a_book_of_validation_alone_is_not_said_to_be_trained_on(book, tiny_model, script, tmp_path):
    (tmp_path / "unseen.txt").write_text("The cat sat on the mat and looked at me.\n\n" * 40)
    ran = script("prepare_data", "--input-path", book, "--val-path", tmp_path / "unseen.txt", "--model-name",
                 tiny_model, "--block-size", 32, "--output-dir", tmp_path / "blocks")  # fmt: skip
    assert ran.code == 0, ran.err
    data = open_blocks(tmp_path / "blocks")
    assert {entry["name"] for entry in data.manifest["books"]} == {"book.txt", "unseen.txt"}
    assert [entry["name"] for entry in list_training_books(data, False)] == ["book.txt"]
    assert list_training_books(data, True) == list_training_books(None, False) == []


def test_gain_by_hand():
    nats = {"book": {"base": [4.0, 6.0] * 50, "finetuned": [3.0, 3.0] * 50, "bytes": 8.0},
            "control": {"base": [5.0, 5.0], "finetuned": [5.5, 5.5], "bytes": 4.0}}  # fmt: skip
    gains = measure_gain(nats, seed=0)
    per_bit = math.log(2)
    assert gains["book_gain"]["value"] == pytest.approx((10 - 6) / 16 / per_bit)
    assert gains["control_gain"]["value"] == pytest.approx((10 - 11) / 8 / per_bit)
    assert gains["style_gain"]["value"] == pytest.approx(4 / 16 / per_bit + 1 / 8 / per_bit)
    assert gains["forgetting"]["value"] == pytest.approx(10.0)
    assert gains["forgetting"]["low"] == pytest.approx(10.0)  # every block of the control lost the same
    # Blocks are drawn whole, with both losses: a gain of 1 or 3 nats per block, so 2 with a standard error of 0.1.
    margin = 1.984 * math.sqrt(1 / 99) / 8 / per_bit  # Student's t with 99 degrees of freedom
    assert gains["book_gain"]["high"] - gains["book_gain"]["value"] == pytest.approx(margin, rel=0.1)
    assert gains["book_gain"]["value"] - gains["book_gain"]["low"] == pytest.approx(margin, rel=0.1)
    assert measure_gain({}, 0) == {}
    assert measure_gain({"control": nats["control"]}, 0).keys() == {"control_gain", "forgetting"}


def test_the_quiz_has_its_key_inside(reported, large):
    _, report, rows = reported
    book = (large / "book.txt").read_text(encoding="utf-8")
    made = [row["text"] for row in rows if row["model"] == "finetuned"]
    assert len(report["quiz"]) == len(report["quiz_pairs"]) == 10
    assert {True, False} == {item["is_real"] for item in report["quiz"]}
    assert {0, 1} == {pair["author"] for pair in report["quiz_pairs"]}
    shown = [(item["text"], item["is_real"]) for item in report["quiz"]]
    shown += [(text, i == pair["author"]) for pair in report["quiz_pairs"] for i, text in enumerate(pair["texts"])]
    assert len({text for text, _ in shown}) == 10 + 2 * 10
    for text, is_real in shown:
        assert (text in book) == is_real
        assert any(text in other for other in made) != is_real
        assert text == text.strip()
    low, high = report["quiz_intervals"][10]
    assert (low, high) == (pytest.approx(0.025 ** (1 / 10)), 1.0)  # Clopper and Pearson, ten of ten
    assert report["quiz_intervals"][5][0] == pytest.approx(0.1871, abs=1e-4)


def test_a_quiz_of_few_texts_has_pairs_alone_or_is_none(large, reported):
    """Texts that are shorter than the longest, or say nothing, would be given away by their form: they are left out."""
    _, _, rows = reported
    data, tokenizer = open_blocks(large / "blocks"), load_pair(large / "model")[1]
    made = [row for row in rows if row["model"] == "finetuned" and len(row["generated_ids"]) == 30]
    made = list({row["text"]: row for row in made}.values())
    short = [row | {"generated_ids": [7] * 29, "text": f"a short one {i}"} for i, row in enumerate(made)]
    blank = [row | {"text": "\n\n"} for row in made]
    assert make_quiz(made[:9] + made[:9] + short + blank, data, tokenizer, 1) == {}
    assert make_quiz([], data, tokenizer, 1) == {}
    for count, singles in ((10, 0), (19, 0), (20, 10)):
        quiz = make_quiz(made[:count] + short + blank, data, tokenizer, 1)
        assert (len(quiz["quiz"]), len(quiz["quiz_pairs"])) == (singles, 10)
        assert "short one" not in str(quiz)
        assert all(text for pair in quiz["quiz_pairs"] for text in pair["texts"])
    assert make_quiz(made[:20], data, tokenizer, 1) == make_quiz(made[:20], data, tokenizer, 1)
    assert make_quiz(made[:20], data, tokenizer, 2) != make_quiz(made[:20], data, tokenizer, 1)


def metrics(loss, copy_rate):
    return {"eval/loss": loss, "eval/copy_rate": copy_rate}


def test_the_best_model_may_not_copy():
    """A lower loss does not count when more is copied than allowed, until nothing else is there."""
    state, kept = TrainState(), []
    evaluations = [(5.0, 0.0), (4.0, 0.3), (4.5, 0.1), (4.4, 0.2), (4.6, 0.0), (4.3, 0.2), (3.0, 0.21)]
    for step, (loss, rate) in enumerate(evaluations):
        state.step = step
        if state.record_evaluation(metrics(loss, rate), max_copy_rate=0.2):
            kept.append(step)
    assert kept == [1, 2, 3, 5]  # step 1 only because nothing else was there
    assert state.best_step == 5
    assert state.evals_without_gain == 1  # early stopping counts what copied too much as no gain


def test_a_run_writes_its_copy_rate(large):
    evaluated = [json.loads(line) for line in (large / "model/metrics.jsonl").read_text().splitlines()]
    rates = [row["eval/copy_rate"] for row in evaluated if "eval/loss" in row]
    results = json.loads((large / "model/all_results.json").read_text())
    assert len(rates) > 5
    assert results["copy_rate"] in rates
    assert results["base_copy_rate"] == rates[0]


def test_the_limit_in_the_plot_is_the_trainings(large, reported):
    """It was measured again, in windows as long as the report's samples."""
    data, (model, tokenizer) = open_blocks(large / "blocks"), load_pair(large / "model")
    settings = json.loads((large / "model/run_config.json").read_text())["settings"]
    limit = CopyMonitor(data, model, tokenizer, 4, None, 42).limit
    assert (
        reported[1]["training"]["max_copy_rate"]
        == limit
        != default_copy_rate(reported[1]["copy_rate"]["reference"]["8"])
    )
    assert find_copy_limit(settings | {"max_copy_rate": 0.3}, data, model, tokenizer) == 0.3
    assert find_copy_limit(settings | {"data_sha256": "other"}, data, model, tokenizer) is None


def test_a_run_that_copies_too_much_says_so(large, script, tmp_path):
    ran = script("finetune_generative", "--data-dir", large / "blocks", "--output-dir", tmp_path / "run", "--overwrite",
                 "--model-name", large / "model", "--max-steps", 4, "--sample-tokens", 0, "--copy-samples", 8,
                 "--max-copy-rate", "1e-9", "--eval-every", 4)  # fmt: skip
    assert ran.code == 0
    results = json.loads((tmp_path / "run/all_results.json").read_text())
    assert results["copy_rate"] > 0
    assert "every model copied more than" in ran.err


def test_a_few_blocks_have_a_loss_but_no_interval(book, tiny_model, script, tmp_path):
    """A loss is a loss on three blocks too; a gain with an interval needs eight."""
    flags = ["--input-path", book, "--model-name", tiny_model, "--val-split", "0.05", "--block-size", 64]
    ran = script("prepare_data", *flags, "--output-dir", tmp_path / "blocks")
    blocks = len(token_rows(tmp_path / "blocks", "validation"))
    assert 0 < blocks < 8, ran.err
    tuned, base = (shutil.copytree(tiny_model, tmp_path / name) for name in MODELS)
    flags = ["--finetuned-model", tuned, "--base-model", base, "--data-dir", tmp_path / "blocks"]
    assert script("generate_text", *flags, *MISSING).code == 0
    _, report, _ = read(tuned)
    assert report["scores"]["book"]["base"]["eval/loss"] > 0
    assert not {"book_gain", "style_gain"} & report.keys()
    assert any(f"there are {blocks} blocks of it, 8 are needed" in reason for reason in report["missing"])


def test_samples_longer_than_any_validation_segment_are_measured(large, reported):
    """No window of the author's is as long: whole segments show how much he copies, his style is not compared."""
    _, _, rows = reported
    data, tokenizer = open_blocks(large / "blocks"), load_pair(large / "model")[1]
    length = 1 + max(map(len, data.segments("validation")))
    columns = build_columns(rows, data, tokenizer, length)
    assert [len(ids) for ids in columns["reference"].ids] == [len(ids) for ids in data.segments("validation")]
    part, missing = compare_texts(columns, {}, data, tokenizer, "", length, None, seed=1)
    assert part["copy_rate"]["reference"]["8"] > 0
    assert "delta" not in part
    assert any("reference: " in reason for reason in missing)


def test_a_book_whose_words_never_vary_has_no_word_profile(large, reported, monkeypatch):
    """All its frequent words are equally frequent everywhere: Delta would divide by zero."""
    _, _, rows = reported
    data, tokenizer = open_blocks(large / "blocks"), load_pair(large / "model")[1]
    empty = dataclasses.replace(stylometry.build_word_profile("so it goes " * 500, None), words=[])
    monkeypatch.setattr(stylometry, "build_word_profile", lambda *_: empty)
    columns = build_columns(rows, data, tokenizer, 30)
    part, missing = compare_texts(columns, {}, data, tokenizer, "", 30, lambda texts: [], seed=1)
    assert "delta" not in part
    assert missing == ["words, spelling and sense: no frequent word of the book varies in its rate"]


def test_a_training_text_of_few_words_has_no_word_profile():
    profile = stylometry.build_word_profile(make_book(20), "It was a cold day.")
    assert profile.words == []
    assert len(profile.rates) == len(profile.spread) == 0


def judge(script, large, *files):
    ran = script("generate_text", "--finetuned-model", large / "model", *MEASURED_FLAGS, "--judge", *files)
    assert ran.code == 0, ran.err
    return read(large / "model")[1], ran


def test_texts_from_elsewhere_are_measured_beside(large, reported, script, tmp_path, monkeypatch):
    """Pages of the book, the base model's own samples and a short note: by the same yard, each a column."""
    monkeypatch.setattr(stylometry, "MIN_WORDS", 1200)  # some of the samples, read again, are cut at their end
    data, tokenizer = open_blocks(large / "blocks"), load_pair(large / "model")[1]
    pages = tokenizer.batch_decode(data.windows("train", 30, 120))
    (tmp_path / "pages.txt").write_text("\n---\n".join(pages), encoding="utf-8")
    (tmp_path / "base.jsonl").write_text(
        "".join(json.dumps({"text": row["text"], "prompt": row["prompt"]}) + "\n" for row in
                reported[2] if row["model"] == "base"), encoding="utf-8")  # fmt: skip
    (tmp_path / "note.txt").write_text("Ada went to the mill and slept. " * 8, encoding="utf-8")
    report, ran = judge(script, large, *(tmp_path / name for name in ("pages.txt", "base.jsonl", "note.txt")))
    judged = report["judged"]
    assert report["missing"] == []
    assert judged.keys() == {"pages", "base", "note"}
    keys = {"n_texts", "n_words", "copy_rate", "unknown_words", "delta", "reader_auc", "gap_closed",
            "writes_like_the_book", "copies"}  # fmt: skip
    assert all(keys <= figures.keys() for figures in judged.values())
    assert judged["pages"]["copy_rate"] > 0.9
    assert judged["pages"]["writes_like_the_book"] is not True
    for measure in ("delta", "reader_auc"):
        value = report[measure]["base"] if measure == "delta" else report[measure]["base"]["value"]
        assert judged["base"][measure]["value"] == pytest.approx(value, rel=0.05)
    assert judged["base"]["gap_closed"]["value"] < 0.2
    assert judged["base"]["writes_like_the_book"] is False
    assert judged["note"]["delta"] is None
    assert "1,200 words" in judged["note"]["missing"]
    assert re.search(r"there are 5\d words of \d$", judged["note"]["missing"])
    page = (large / "model/report.html").read_text(encoding="utf-8")
    for name in judged:
        assert f"<th>{name}</th>" in page
        assert any(sentence.startswith(f"{name}: ") for sentence in report["verdict"])
        assert name in ran.out


def test_judging_needs_the_book_and_names_apart(large, tiny_model, script, tmp_path):
    (tmp_path / "a").mkdir()
    files = [tmp_path / "x.txt", tmp_path / "a" / "x.txt"]
    for path in files:
        path.write_text("Some text.")
    flags = ["--finetuned-model", large / "model", *MISSING]
    ran = script("generate_text", *flags, "--judge", *files)
    assert (ran.code, "two files are called x" in ran.err) == (2, True)
    ran = script("generate_text", *flags, "--no-measure", "--judge", files[0])
    assert (ran.code, "--judge needs" in ran.err) == (2, True)
    ran = script("generate_text", *flags, "--judge", tmp_path / "none.txt")
    assert (ran.code, "none.txt" in ran.err) == (2, True)


def test_another_reader_may_have_another_tokenizer(large, script, tmp_path):
    base = Path(__file__).parents[2] / "results/base_model"
    ran = script("generate_text", "--finetuned-model", large / "model", *MEASURED_FLAGS, "--reader-model", base)
    assert ran.code == 0, ran.err
    _, report, _ = read(large / "model")
    assert report["reader"] == str(base)
    assert report["reader_is_base"] is False
    assert any(f"a reader ({base})" in sentence for sentence in report["verdict"])
