"""Validation text is unseen: a model's report is never made on text that it was trained on."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import MEASURED_FLAGS, copy_run, make_book

from utils.data.blocks import open_blocks
from utils.errors import UserError
from utils.evaluation.unseen import (
    TRAINING_NGRAMS,
    check_unseen,
    count_seen_ngrams,
    is_known_training_text,
    save_training_ngrams,
)
from utils.storage import read_json

QUICK = ["--num-validation-prompts", 2, "--max-new-tokens", 8, "--no-measure"]


def test_ngrams_are_recognized_at_any_position(tmp_path):
    rng = np.random.default_rng(0)
    train = rng.integers(0, 500, 5000).astype(np.uint16)
    save_training_ngrams(tmp_path, train)
    fresh = rng.integers(0, 500, 400).astype(np.uint16)
    assert count_seen_ngrams(tmp_path, [fresh]) == (0, 369)
    planted = np.concatenate([fresh[:100], train[777:809], fresh[100:]])  # 32 tokens: one n-gram
    assert count_seen_ngrams(tmp_path, [planted]) == (1, 401)
    planted = np.concatenate([fresh[:100], train[777:808], fresh[100:]])  # 31: none
    assert count_seen_ngrams(tmp_path, [planted])[0] == 0
    assert count_seen_ngrams(tmp_path, [train[:32], train[:31], train[40:80]]) == (10, 10)


def test_a_sample_of_a_large_text_recognizes_a_page(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.evaluation.unseen.keep_one_in", lambda n_tokens: 7)
    train = np.random.default_rng(1).integers(0, 500, 20_000).astype(np.uint16)
    save_training_ngrams(tmp_path, train)
    seen, n_ngrams = count_seen_ngrams(tmp_path, [train[3000:4000]])
    assert seen == n_ngrams
    assert 90 < seen < 190  # a seventh of 969


def prepare(script, large, tiny_model, out, *flags, book=None):
    ran = script("prepare_data", "--input-path", book or large / "book.txt", "--model-name", tiny_model, "--block-size",
                 64, "--output-dir", out, *flags)  # fmt: skip
    assert ran.code == 0, ran.err


def test_another_split_of_the_book_is_refused(large, tiny_model, script, tmp_path, monkeypatch):
    """Prepared again in the same place, as after the demo: the recorded folder holds pages that were trained on."""
    monkeypatch.chdir(tmp_path)  # short names: a line is cut at 240 characters
    run, blocks = copy_run(large / "model", Path("run")), Path("blocks")
    prepare(script, large, tiny_model, blocks, "--seed", 7)
    config = read_json(run / "run_config.json")
    (run / "run_config.json").write_text(json.dumps(config | {"data_dir": str(blocks)}))
    for flags in ([], ["--data-dir", blocks]):
        ran = script("generate_text", "--finetuned-model", run, *flags, *QUICK)
        assert ran.code == 2
        assert f"data: {blocks} is another split than the model's" in ran.err
        assert "--seed 42 --val-split 0.1" in ran.err
        assert not (run / "report.json").exists()
    (run / TRAINING_NGRAMS).unlink()
    ran = script("generate_text", "--finetuned-model", run, *QUICK)
    assert (ran.code, TRAINING_NGRAMS in ran.err) == (2, True)


def test_the_same_file_cleaned_is_another_split(large, tiny_model, script, tmp_path, monkeypatch):
    """What --clean takes out moves all segments after it: validation text was trained on."""
    monkeypatch.chdir(tmp_path)
    run = copy_run(large / "model", Path("run"))
    prepare(script, large, tiny_model, Path("blocks"), "--clean", "quotes")
    ran = script("generate_text", "--finetuned-model", run, "--data-dir", "blocks", *QUICK)
    assert ran.code == 0, "nothing was mended, so that the segments are the same"
    book = Path("book.txt")
    marks = [f"*** {place} OF THE PROJECT GUTENBERG EBOOK X ***" for place in ("START", "END")]
    book.write_text("\n\n".join([marks[0], make_book(600), marks[1], "A licence with many words. " * 300]))
    prepare(script, large, tiny_model, Path("whole"), book=book)
    flags = ["--data-dir", "whole", "--output-dir", "trained", "--max-steps", 2, "--sample-tokens", 0]
    assert script("finetune_generative", *flags, "--copy-samples", 0).code == 0
    prepare(script, large, tiny_model, Path("clean"), "--clean", "gutenberg", book=book)
    ran = script("generate_text", "--finetuned-model", "trained", "--data-dir", "clean", *QUICK)
    assert ran.code == 2
    assert "is another split than the model's" in ran.err
    assert "--val-split 0.1 and without --clean, or train again" in ran.err


def test_a_run_from_before_the_flag_clean_is_compared_too(large, tiny_model, script, tmp_path):
    prepare(script, large, tiny_model, tmp_path / "blocks", "--seed", 7)
    config = read_json(large / "model/run_config.json")
    del config["data"]["settings"]["clean"]
    with pytest.raises(UserError, match="another split"):
        check_unseen(large / "model", config, open_blocks(tmp_path / "blocks"))
    assert not is_known_training_text(large / "model", config, open_blocks(tmp_path / "blocks"))
    assert is_known_training_text(large / "model", config, open_blocks(large / "blocks"))


def test_another_book_without_validation_text_is_not_the_models_own(large, tiny_model, script, tmp_path):
    """It was listed in the model card as trained on, and --max-copy kept the model from copying that one."""
    other = tmp_path / "other.txt"
    other.write_text(make_book(300)[::-1])
    prepare(script, large, tiny_model, tmp_path / "blocks", "--val-split", 0, book=other)
    run, data = copy_run(large / "model", tmp_path / "run"), ["--data-dir", tmp_path / "blocks"]
    ran = script("generate_text", "--finetuned-model", run, *data, "--max-new-tokens", 8, "--no-measure")
    assert ran.code == 0, ran.err
    report = read_json(run / "report.json")
    assert (report["other_book"], report["books"]) == (True, [])
    for flags in (["--no-measure"], ["--to-file", tmp_path / "new.txt", "--prompt", "Ada"]):
        ran = script("generate_text", "--finetuned-model", run, *data, "--max-copy", 8, *flags)
        assert (ran.code, "--max-copy needs the text that the model was trained on" in ran.err) == (2, True)


def test_other_blocks_of_the_same_split_are_accepted(large, tiny_model, script, tmp_path):
    flags = ["--block-size", 32]
    prepare(script, large, tiny_model, tmp_path / "blocks", *flags)
    data = ["--data-dir", tmp_path / "blocks"]
    run = copy_run(large / "model", tmp_path / "run")
    ran = script("generate_text", "--finetuned-model", run, *data, *QUICK)
    assert ran.code == 0, ran.err
    assert read_json(run / "report.json")["other_book"] is False


def test_another_book_is_a_control_and_said_to_be_one(large, tiny_model, script, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(make_book(1700)[::-1])
    prepare(script, large, tiny_model, tmp_path / "blocks", book=other)
    run = copy_run(large / "model", tmp_path / "run")
    ran = script("generate_text", "--finetuned-model", run, "--data-dir", tmp_path / "blocks", *MEASURED_FLAGS)
    assert ran.code == 0, ran.err
    assert "A control: the validation text is of another book" in ran.out.replace("\n", " ")
    assert read_json(run / "report.json")["books"] == []
    other.write_text(make_book(1700).replace("Day 1.", "Day one."))  # another file, the same book
    prepare(script, large, tiny_model, tmp_path / "blocks", "--overwrite", "--seed", 7, book=other)
    ran = script("generate_text", "--finetuned-model", run, "--data-dir", tmp_path / "blocks", *QUICK)
    assert ran.code == 2
    assert "another split" in ran.err


def test_the_training_text_of_a_folder_from_elsewhere_is_not_known(large, tiny_model, script, tmp_path):
    run = copy_run(large / "model", tmp_path / "run")
    (run / "run_config.json").unlink()
    ran = script("generate_text", "--finetuned-model", run, "--data-dir", large / "blocks", "--base-model", tiny_model,
                 *QUICK)  # fmt: skip
    assert ran.code == 0
    assert "whether the validation text is unseen" in " ".join(read_json(run / "report.json")["missing"])


def test_a_book_that_repeats_itself_may_be_cut_into_other_blocks(tiny_model, script, tmp_path):
    """Validation shares a refrain with training, and the split is the same: nothing new was trained on."""
    refrain = "\n\nHal rang the bell at the ford, and the ferry came over the cold water for him. " * 3
    paragraphs = [text + (refrain if i % 4 == 0 else "") for i, text in enumerate(make_book(300).split("\n\n"))]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs))
    prepare(script, tmp_path, tiny_model, tmp_path / "blocks")
    assert read_json(tmp_path / "blocks/manifest.json")["leakage"]["leaked_ngrams"] > 0
    flags = ["--data-dir", tmp_path / "blocks", "--output-dir", tmp_path / "run", "--max-steps", 2]
    assert script("finetune_generative", *flags, "--sample-tokens", 0, "--copy-samples", 0).code == 0
    prepare(script, tmp_path, tiny_model, tmp_path / "other", "--block-size", 16)
    ran = script("generate_text", "--finetuned-model", tmp_path / "run", "--data-dir", tmp_path / "other", *QUICK)
    assert ran.code == 0, ran.err


def test_an_edited_copy_is_the_same_book(large, tiny_model, script, tmp_path):
    (tmp_path / "edited.txt").write_text((large / "book.txt").read_text() + "The end.\n")
    prepare(script, large, tiny_model, tmp_path / "blocks", book=tmp_path / "edited.txt")
    data, config = open_blocks(tmp_path / "blocks"), read_json(large / "model/run_config.json")
    seen = count_seen_ngrams(large / "model", data.segments("validation"))[0]
    if seen:
        with pytest.raises(UserError, match="another split"):
            check_unseen(large / "model", config, data)
    else:
        assert check_unseen(large / "model", config, data) is False


@pytest.mark.parametrize("config", [{}, {"settings": None}, {"base_model": "x"}, {"settings": {}, "data": []}])
def test_the_config_of_another_program_tells_nothing(large, config):
    assert check_unseen(large / "model", config, open_blocks(large / "blocks")) is None


@pytest.mark.parametrize(
    ("change", "says"),
    [({"val_split": 0, "val_path": None}, "--seed 42 --val-split 0,"),
     ({"val_split": None, "val_path": ["a.txt", "b.txt"]}, "--seed 42 --val-path a.txt b.txt,")],
)  # fmt: skip
def test_the_advice_is_how_it_was_prepared(large, tiny_model, script, tmp_path, monkeypatch, change, says):
    monkeypatch.chdir(tmp_path)
    prepare(script, large, tiny_model, Path("blocks"), "--seed", 7)
    config = read_json(large / "model/run_config.json")
    config["data"]["settings"] |= change
    with pytest.raises(UserError, match=says):
        check_unseen(large / "model", config, open_blocks(Path("blocks")))


@pytest.mark.parametrize("damage", [b"", b"nonsense"])
def test_a_damaged_record_is_said(tmp_path, damage):
    save_training_ngrams(tmp_path, np.arange(100, dtype=np.uint16))
    (tmp_path / TRAINING_NGRAMS).write_bytes(damage)
    with pytest.raises(UserError, match="cannot be read"):
        count_seen_ngrams(tmp_path, [np.arange(64)])
