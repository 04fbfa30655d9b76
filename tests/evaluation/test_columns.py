"""Columns: each text once, files of texts read and cut as samples are."""

import json

import numpy as np
import pytest

import generate_text
from utils.data.tokenizer import load_tokenizer
from utils.errors import UserError
from utils.evaluation.columns import build_column, column_of_file, column_of_samples, read_judged


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model)


def test_each_text_is_kept_once():
    ids = [np.array([i]) for i in range(6)]
    column = build_column(["a", "b", "a", " \n", "", "c"], ids, [0, 0, 1, 1, 2, 2])
    assert (column.texts, column.groups, column.n_dropped) == (["a", "b", "c"], [0, 0, 2], 3)
    assert [int(row[0]) for row in column.ids] == [0, 1, 5]


def test_samples_are_grouped_by_prompt():
    rows = [{"model": model, "prompt": prompt, "text": f"{prompt} {model} {i}", "generated_ids": [i]}
            for model in ("base", "finetuned") for prompt in "xy" for i in range(2)]  # fmt: skip
    column = column_of_samples(rows, "finetuned")
    assert column.texts == ["x finetuned 0", "x finetuned 1", "y finetuned 0", "y finetuned 1"]
    assert column.groups == [0, 0, 1, 1]


def test_greedy_samples_of_several_rounds_count_once():
    rows = [{"model": "base", "prompt": "x", "text": "the same", "generated_ids": [1, 2]}] * 20
    column = column_of_samples(rows, "base")
    assert (len(column.texts), column.n_dropped) == (1, 19)


def test_text_files_are_cut_at_lines_of_hyphens(tmp_path):
    path = tmp_path / "friend.txt"
    path.write_text("one\n-- no\n--- no\n---\n\ntwo\n--- \n\n---\nthree\n", encoding="utf-8")
    assert read_judged(path) == [("one\n-- no\n--- no", 0), ("two", 1), ("", 2), ("three", 3)]


def test_rows_of_jsonl_are_grouped_by_their_prompt(tmp_path):
    path = tmp_path / "friend.jsonl"
    rows = [{"text": "a\u2028b", "prompt": "p"}, {"text": "c"}, {"text": "d", "prompt": "p"},
            {"text": "e", "prompt": 2}, {"text": "f", "prompt": [1]}, {"text": "g", "prompt": ""}]  # fmt: skip
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    assert read_judged(path) == [("a\u2028b", "p"), ("c", 2), ("d", "p"), ("e", 4), ("f", 5), ("g", "")]


def test_rows_of_two_models_are_refused(tmp_path):
    """The samples.jsonl of another run: base and fine-tuned model became one column."""
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps({"text": "a", "model": model}) + "\n" for model in ("base", "finetuned")))
    with pytest.raises(UserError, match=r"texts of 2 models \('base', 'finetuned'\); keep those of one"):
        read_judged(path)
    path.write_text('{"text": "a", "model": "\\u001b[2J"}\n{"text": "b"}\n')
    assert len(read_judged(path)) == 2


@pytest.mark.parametrize("line", ["{", '{"txt": "a"}', '"a"', '{"text": 3}', "null", r'{"text": "\ud83d"}'])
def test_a_row_without_a_text_is_refused(tmp_path, line):
    path = tmp_path / "friend.jsonl"
    path.write_text('{"text": "a"}\n' + line + "\n")
    with pytest.raises(UserError, match='line 2 is not a JSON object with a "text"'):
        read_judged(path)


def test_long_texts_become_windows_and_their_rest_is_left(tokenizer, tmp_path):
    text = "Day 3. Ada went to the mill and slept. It was 37 steps away. "
    path, n_tokens = tmp_path / "friend.txt", len(tokenizer(text * 4)["input_ids"])
    path.write_text(f"{text * 4}\n---\nshort\n---\n{text.strip()}")
    length = n_tokens // 3 - 1  # three whole windows, and three tokens that are left
    column = column_of_file(path, tokenizer, length)
    assert [len(row) for row in column.ids][:3] == [length] * 3
    assert column.texts[0] == tokenizer.decode(column.ids[0])
    assert column.groups[:3] == [0, 0, 0]
    assert column.texts[3] == "short"
    assert column.groups[3:] == [1, 2]
    assert column.n_dropped == 1


def test_windows_of_a_file_without_separators_stand_for_themselves(tokenizer, tmp_path):
    path = tmp_path / "friend.txt"
    path.write_text("".join(f"Day {i}. Ada lost her hat {i * 7} times. " for i in range(40)))
    column = column_of_file(path, tokenizer, 20)
    assert len(set(column.groups)) == len(column.texts) > 20


def test_a_repeated_flag_adds_files():
    flags = ["--judge", "a.txt", "b.txt", "--judge", "c.txt"]
    assert list(map(str, generate_text.parse_args(flags).judge)) == ["a.txt", "b.txt", "c.txt"]
    assert generate_text.parse_args([]).judge is None
