"""Validation text is unseen: a model's report is never made on text that it was trained on."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import MEASURED_FLAGS, make_book

from utils.errors import UserError
from utils.evaluation.unseen import TRAINING_NGRAMS, count_seen_ngrams, save_training_ngrams
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
    run, blocks = shutil.copytree(large / "model", Path("run")), Path("blocks")
    (run / "report.json").unlink(missing_ok=True)
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


def test_other_blocks_of_the_same_split_are_accepted(large, tiny_model, script, tmp_path):
    flags = ["--block-size", 32]
    prepare(script, large, tiny_model, tmp_path / "blocks", *flags)
    data = ["--data-dir", tmp_path / "blocks"]
    run = shutil.copytree(large / "model", tmp_path / "run")
    ran = script("generate_text", "--finetuned-model", run, *data, *QUICK)
    assert ran.code == 0, ran.err
    assert read_json(run / "report.json")["other_book"] is False


def test_another_book_is_a_control_and_said_to_be_one(large, tiny_model, script, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(make_book(1700)[::-1])
    prepare(script, large, tiny_model, tmp_path / "blocks", book=other)
    run = shutil.copytree(large / "model", tmp_path / "run")
    ran = script("generate_text", "--finetuned-model", run, "--data-dir", tmp_path / "blocks", *MEASURED_FLAGS)
    assert ran.code == 0, ran.err
    assert "A control: the validation text is of another book" in ran.out.replace("\n", " ")
    other.write_text(make_book(1700).replace("Day 1.", "Day one."))  # another file, the same book
    prepare(script, large, tiny_model, tmp_path / "blocks", "--overwrite", "--seed", 7, book=other)
    ran = script("generate_text", "--finetuned-model", run, "--data-dir", tmp_path / "blocks", *QUICK)
    assert ran.code == 2
    assert "another split" in ran.err


def test_the_training_text_of_a_folder_from_elsewhere_is_not_known(large, tiny_model, script, tmp_path):
    run = shutil.copytree(large / "model", tmp_path / "run")
    (run / "run_config.json").unlink()
    ran = script("generate_text", "--finetuned-model", run, "--data-dir", large / "blocks", "--base-model", tiny_model,
                 *QUICK)  # fmt: skip
    assert ran.code == 0
    assert "whether the validation text is unseen" in " ".join(read_json(run / "report.json")["missing"])


@pytest.mark.parametrize("damage", [b"", b"nonsense"])
def test_a_damaged_record_is_said(tmp_path, damage):
    save_training_ngrams(tmp_path, np.arange(100, dtype=np.uint16))
    (tmp_path / TRAINING_NGRAMS).write_bytes(damage)
    with pytest.raises(UserError, match="cannot be read"):
        count_seen_ngrams(tmp_path, [np.arange(64)])
