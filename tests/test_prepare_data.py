"""prepare_data.py as a command: what it prints, what it writes, and when it leaves a folder alone."""

import itertools
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
from conftest import make_book, replace

import prepare_data
import utils.data.text
from utils.data.blocks import open_blocks
from utils.data.tokenizer import fingerprint_tokenizer, load_tokenizer, train_tokenizer
from utils.evaluation import ngrams
from utils.storage import MANIFEST, OLD, describe_files, read_json, read_sealed, write_sealed


@pytest.fixture
def prepare(script, book, tiny_model, tmp_path):
    """Run the script on the small book: prepare('--flag', value, to='blocks') -> code, out, err."""

    def run_prepare(*flags, to="blocks", model=tiny_model):
        model_flags = [] if model is None else ["--model-name", model]
        defaults = [] if "--input-path" in flags else ["--input-path", book]
        size = [] if "--block-size" in flags else ["--block-size", 32]
        return script("prepare_data", *defaults, *model_flags, *size, "--output-dir", tmp_path / to, *flags)

    return run_prepare


@pytest.fixture
def library(tmp_path):
    """Return a folder of three books, and what each says."""
    folder = tmp_path / "library"
    folder.mkdir()
    texts = {"a.txt": make_book(80), "b.txt": make_book(70).upper(), "c.md": make_book(60).swapcase()}
    for name, text in texts.items():
        (folder / name).write_text(text)
    return folder, texts


def snapshot(folder):
    """Return every file below a folder with its bytes, time and inode."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): (p.read_bytes(), p.stat().st_mtime_ns, p.stat().st_ino) for p in files}


def decode_split(folder, split):
    """Return the text of a split's blocks."""
    ids = getattr(open_blocks(folder), split)[:]["input_ids"].flatten().tolist()
    return load_tokenizer(folder / "tokenizer").decode(ids)


# What is printed and written


def test_the_summary_says_what_the_manifest_says(prepare, book, tmp_path):
    content = book.read_text()
    code, out, err = prepare()
    assert code == 0
    manifest = read_json(tmp_path / "blocks" / MANIFEST)
    train, validation = manifest["splits"]["train"], manifest["splits"]["validation"]
    n_tokens = train["tokens"] + validation["tokens"]
    lines = dict(line.split("  ", 1) for line in (row.strip() for row in out.splitlines()) if "  " in line)
    lines = {name: value.strip() for name, value in lines.items()}
    assert lines["text"] == f"{len(content):,} characters, {len(content.split()):,} words"
    assert lines["tokens"] == f"{n_tokens:,}, {len(content.encode()) / n_tokens:.2f} bytes per token"
    for name, counts in (("training", train), ("validation", validation)):
        assert lines[name] == (
            f"{counts['segments']} segments, {counts['tokens']:,} tokens -> {counts['blocks']:,} blocks of 32 "
            f"(tail of {counts['tail_tokens']} tokens left out)"
        )
        assert counts["blocks"] == counts["tokens"] // 32
        assert counts["tail_tokens"] == counts["tokens"] % 32
    assert lines["leakage"].startswith(f"0 of {validation['tokens'] - 31:,} 32-token n-grams")
    assert lines["steps per epoch"].startswith(f"{math.ceil(train['blocks'] / 8):,} ")
    assert validation["segments"] >= 3
    assert validation["chars"] == pytest.approx(0.1 * len(content), rel=0.3)
    assert out.endswith("next: python finetune_generative.py\n")
    assert "the book is very small" in err


def test_the_manifest_describes_the_folder(prepare, book, tmp_path, tiny_model):
    assert prepare().code == 0
    folder = tmp_path / "blocks"
    manifest = read_json(folder / MANIFEST)
    assert manifest["files"] == describe_files(folder)
    assert {"train/data-00000-of-00001.arrow", "tokenizer/tokenizer.json"} < set(manifest["files"])
    assert not [name for name in manifest["files"] if name.endswith(".bin")]
    assert manifest["model_name"] == str(tiny_model)
    tokenizer = load_tokenizer(folder / "tokenizer")
    assert manifest["tokenizer"] == {
        "sha256": fingerprint_tokenizer(load_tokenizer(tiny_model)),
        "size": 400,
        "end_of_text_id": tokenizer.eos_token_id,
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["blocks"]  # no partial folder is left


def test_warnings_fit_the_book(prepare, tmp_path):
    """A long book in a tokenizer that fits has no warning; a repeated one leaks."""
    long_book, twice = tmp_path / "long.txt", tmp_path / "twice.txt"
    long_book.write_text(make_book(1_600))
    code, _, err = prepare("--input-path", long_book)
    assert code == 0
    assert [line for line in err.splitlines() if line and not line.startswith("tokenizing: ")] == []  # a slow machine's
    # The same paragraphs twice: the validation text of one half stands in the other.
    twice.write_text(make_book(100) + "\n" + make_book(100))
    code, out, err = prepare("--input-path", twice, to="twice")
    assert code == 0
    assert "validation repeats training" in err
    leakage = read_json(tmp_path / "twice" / MANIFEST)["leakage"]
    assert leakage["leaked_ngrams"] > 0.5 * leakage["validation_ngrams"]
    assert 0.3 < leakage["repeated_share"] < 0.6
    assert f"{leakage['leaked_ngrams']:,} of {leakage['validation_ngrams']:,} 32-token n-grams" in out
    assert f"{leakage['repeated_share']:.2%}" in out
    foreign = tmp_path / "foreign.txt"
    foreign.write_text("\n\n".join(f"QXZ{i}: ZXQJ\u00e9 VWKQ?" for i in range(500)))
    assert "does not fit this text" in prepare("--input-path", foreign, to="foreign").err


def test_no_validation_on_request(prepare, tmp_path, book):
    assert prepare("--val-split", 0).code == 0
    blocks = open_blocks(tmp_path / "blocks")
    assert (len(blocks.validation), blocks.manifest["splits"]["validation"]["tokens"]) == (0, 0)
    assert blocks.manifest["splits"]["train"]["segments"] == 1
    assert book.read_text().startswith(decode_split(tmp_path / "blocks", "train"))


def test_folders_and_files_in_the_order_given(prepare, library, book, tmp_path):
    folder, _ = library
    assert prepare("--input-path", book, folder).code == 0
    names = [b["name"] for b in read_json(tmp_path / "blocks" / MANIFEST)["books"]]
    assert names == ["book.txt", "a.txt", "b.txt", "c.md"]


def test_a_repeated_flag_adds_files(prepare, library, book, tmp_path):
    folder, _ = library
    flags = ["--input-path", book, "--val-path", folder / "b.txt", "--input-path", folder / "a.txt", folder / "b.txt"]
    assert prepare(*flags, "--val-path", folder / "c.md").code == 0
    manifest = read_json(tmp_path / "blocks" / MANIFEST)
    assert [b["name"] for b in manifest["books"]] == ["book.txt", "a.txt", "b.txt", "c.md"]
    assert [s["split"] for s in manifest["spans"]] == ["train", "train", "validation", "validation"]


def test_a_file_name_that_is_not_utf8_is_shown_with_a_replacement(prepare, book, tmp_path):
    odd = Path(shutil.copy(book, tmp_path / os.fsdecode(b"caf\xe9.txt")))
    assert prepare("--input-path", book, "--val-path", odd).code == 0
    manifest = read_json(tmp_path / "blocks" / MANIFEST)
    assert [b["name"] for b in manifest["books"]] == ["book.txt", "caf\ufffd.txt"]
    assert "up to date" in prepare("--input-path", book, "--val-path", odd).out


def test_the_sample_book_is_the_default_and_is_not_added_to():
    default = prepare_data.DEFAULT_BOOK
    for _ in range(2):
        assert prepare_data.parse_args([]).input_path == [default]
        assert prepare_data.parse_args(["--input-path", "x", "--input-path", "y"]).input_path == [Path("x"), Path("y")]
    assert f"| `--input-path` | `{default}` |" in Path("notes/flags.md").read_text()
    assert f"| `--input-path` | `prepare_data.py` | `{default}` |" in Path("README.md").read_text()


# Whole files for validation


@pytest.mark.parametrize("lies_inside", [True, False])
def test_val_path_takes_whole_files(prepare, library, tmp_path, lies_inside):
    folder, texts = library
    validation = folder / "b.txt"
    if not lies_inside:
        validation = validation.rename(tmp_path / "b.txt")
    assert prepare("--input-path", folder, "--val-path", validation).code == 0
    manifest = read_json(tmp_path / "blocks" / MANIFEST)
    assert [b["name"] for b in manifest["books"]] == ["a.txt", "c.md", "b.txt"]
    assert [(s["book"], s["split"]) for s in manifest["spans"]] == [(0, "train"), (1, "train"), (2, "validation")]
    assert [s["chars"] for s in manifest["spans"]] == [[0, len(texts[n])] for n in ("a.txt", "c.md", "b.txt")]
    assert texts["b.txt"].startswith(decode_split(tmp_path / "blocks", "validation"))
    train = decode_split(tmp_path / "blocks", "train")
    assert train.startswith(texts["a.txt"] + "<|endoftext|>" + texts["c.md"][:500])
    assert "DAY" not in train  # b.txt alone is in capitals


def test_val_path_may_not_hold_everything(prepare, library):
    folder, _ = library
    code, _, err = prepare("--input-path", folder, "--val-path", folder)
    assert code == 2
    assert "--val-path holds every file of --input-path" in err


# A tokenizer of its own


def test_a_tokenizer_is_learned_from_the_training_text_alone(prepare, library, tmp_path):
    folder, texts = library
    (folder / "b.txt").write_text("Zyx zyx zyxzyx. " * 400)  # would be the first merge
    flags = ["--train-tokenizer", 300, "--input-path", folder, "--val-path", folder / "b.txt"]
    code, out, _ = prepare(*flags, model=None)
    assert code == 0
    assert "learning a tokenizer of 300 tokens" in out
    learned = load_tokenizer(tmp_path / "blocks" / "tokenizer")
    assert len(learned) == 300
    expected = train_tokenizer([texts["a.txt"], texts["c.md"]], 300)
    assert learned.get_vocab() == expected.get_vocab()
    assert "zy" not in learned.get_vocab()
    manifest = read_json(tmp_path / "blocks" / MANIFEST)
    assert manifest["model_name"] is None
    assert manifest["tokenizer"]["sha256"] == fingerprint_tokenizer(expected)
    before = snapshot(tmp_path / "blocks")
    assert "up to date" in prepare(*flags, model=None).out
    assert snapshot(tmp_path / "blocks") == before


def test_a_text_too_small_for_the_tokenizer_asked_for_says_how_many_tokens_it_gives(prepare, tmp_path):
    out = prepare("--train-tokenizer", 50_000, model=None).out
    size = read_json(tmp_path / "blocks" / MANIFEST)["tokenizer"]["size"]
    assert 257 < size < 50_000
    assert f"of 50,000 tokens from the training text\nlearned {size:,} tokens: the text is too small for more\n" in out
    assert "too small" not in prepare("--train-tokenizer", 300, to="other", model=None).out


# The same command again


@pytest.mark.parametrize("extra", [[], ["--train-tokenizer", 300]], ids=["model", "learned"])
def test_two_preparations_are_equal_byte_for_byte(prepare, tmp_path, extra):
    for name in ("one", "two"):
        assert prepare(*extra, to=name).code == 0
    one, two = (snapshot(tmp_path / name) for name in ("one", "two"))
    assert {name: entry[0] for name, entry in one.items()} == {name: entry[0] for name, entry in two.items()}
    assert any(name.endswith(".arrow") for name in one)


def test_the_same_command_again_is_up_to_date_and_touches_nothing(prepare, tmp_path, monkeypatch):
    first = prepare()
    before = snapshot(tmp_path / "blocks")
    monkeypatch.setattr("utils.data.tokenizer.TokenWriter.encode", None)  # nothing is tokenized again
    code, out, _ = prepare()
    assert code == 0
    assert "up to date: the same command on the same book, nothing to do" in out
    assert out.split("up to date")[0] == first.out.split("next:")[0]
    assert snapshot(tmp_path / "blocks") == before


@pytest.mark.parametrize(
    ("first", "second", "difference"),
    [
        ([], ["--block-size", 16], "--block-size 32, now 16"),
        ([], ["--seed", 7], "--seed 42, now 7"),
        ([], ["--val-split", 0.2], "--val-split 0.1, now 0.2"),
        ([], ["--encoding", "latin-1"], "--encoding utf-8, now latin-1"),
        ([], ["--train-tokenizer", 300], ", now without"),
        (["--train-tokenizer", 300], ["--train-tokenizer", 310], "--train-tokenizer 300, now 310"),
        (["--train-tokenizer", 300], [], "without --model-name, now "),
        ([], ["--val-path", "other.txt"], "without --val-path, now other.txt;"),
        (["--val-path", "other.txt"], [], "--val-path other.txt, now without"),
        ([], ["--input-path", "other.txt"], "with other text;"),
    ],
)
def test_other_settings_are_refused_by_name_until_overwrite(prepare, tmp_path, monkeypatch, first, second, difference):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.txt").write_text(make_book(150).upper())
    assert prepare(*first).code == 0
    before = snapshot(tmp_path / "blocks")
    code, _, err = prepare(*second)
    assert code == 2
    assert "was prepared with" in err
    assert difference in err.replace(str(tmp_path), "")
    assert err.endswith("use another or --overwrite\n")
    assert snapshot(tmp_path / "blocks") == before
    assert prepare(*second, "--overwrite").code == 0
    assert snapshot(tmp_path / "blocks") != before
    assert "up to date" in prepare(*second).out


def test_another_spelling_of_the_same_setting_is_no_other_setting(prepare, tmp_path, tiny_model):
    spellings = [(tiny_model, "utf-8"), (f"{tiny_model}/", "UTF-8")]
    for (first, encoding), (second, other) in itertools.permutations(spellings):
        assert prepare("--encoding", encoding, "--overwrite", model=first).code == 0
        assert "up to date" in prepare("--encoding", other, model=second).out


@pytest.mark.parametrize("damaged", [[1], {"encoding": 5, "model_name": ["x"]}, None])
def test_damaged_settings_are_other_settings(prepare, tmp_path, damaged):
    assert prepare().code == 0
    write_sealed(tmp_path / "blocks", read_sealed(tmp_path / "blocks") | {"settings": damaged})
    code, _, err = prepare()
    assert (code, err.count("\n")) == (2, 1)
    assert "was prepared with" in err


def test_a_changed_tokenizer_under_the_same_name_is_noticed(prepare, book, tmp_path, tiny_model):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    assert prepare(model=model).code == 0
    train_tokenizer([make_book(50).upper()], 390).save_pretrained(model)
    code, _, err = prepare(model=model)
    assert code == 2
    assert "was prepared with another tokenizer; use another or --overwrite" in err
    assert prepare("--overwrite", model=model).code == 0
    assert read_json(tmp_path / "blocks" / MANIFEST)["tokenizer"]["size"] == 390


def test_a_damaged_file_is_made_again(prepare, tmp_path):
    assert prepare().code == 0
    before = snapshot(tmp_path / "blocks")
    path = tmp_path / "blocks" / "train" / "data-00000-of-00001.arrow"
    path.write_bytes(path.read_bytes()[:-1])
    code, out, _ = prepare()
    assert code == 0
    assert "up to date" not in out
    after = snapshot(tmp_path / "blocks")
    assert {name: entry[0] for name, entry in after.items()} == {name: entry[0] for name, entry in before.items()}


def test_a_repair_leaves_what_it_has_not_made(prepare, tmp_path):
    assert prepare().code == 0
    (tmp_path / "blocks" / "mine.txt").write_text("a note")
    (tmp_path / "blocks" / "train" / "data-00000-of-00001.arrow").unlink()
    assert prepare().code == 0
    assert (tmp_path / "blocks" / "mine.txt").read_text() == "a note"


@pytest.mark.parametrize("content", ["", '{"made_by": "prepare_data.py"}', '{"format": 1,', "[" * 99_999])
def test_overwrite_replaces_a_folder_whose_manifest_is_damaged(prepare, tmp_path, content):
    assert prepare().code == 0
    (tmp_path / "blocks" / MANIFEST).write_text(content)
    code, _, err = prepare()
    assert code == 2
    assert "manifest.json is damaged" in err
    assert prepare("--overwrite").code == 0
    assert "up to date" in prepare().out


@pytest.mark.parametrize("content", ['{"manifest_version": 3}', "{}", "[1]", '{"made_by": "finetune_generative.py"}'])
def test_a_folder_with_a_manifest_of_others_is_not_ours(prepare, tmp_path, content):
    folder = tmp_path / "blocks"
    (folder / OLD).mkdir(parents=True)
    for name in (MANIFEST, "background.js", f"{OLD}/background.js"):
        (folder / name).write_text(content)
    before = snapshot(folder)
    code, _, err = prepare()
    assert (code, err) == (2, f"error: output-dir: {folder} is not empty and not made by prepare_data.py; "
                              "use another or --overwrite\n")  # fmt: skip
    assert snapshot(folder) == before


def test_a_refused_run_removes_nothing(prepare, tmp_path):
    assert prepare().code == 0
    (tmp_path / "blocks" / OLD).mkdir()
    (tmp_path / "blocks" / OLD / "rest").write_text("of a killed run")
    before = snapshot(tmp_path / "blocks")
    assert prepare("--seed", 7).code == 2
    assert snapshot(tmp_path / "blocks") == before
    assert "up to date" in prepare().out
    assert not (tmp_path / "blocks" / OLD).exists()


def test_a_folder_of_an_older_format_is_refused_until_overwrite(prepare, tmp_path):
    assert prepare().code == 0
    folder = tmp_path / "blocks"
    write_sealed(folder, read_sealed(folder) | {"format": 1})
    before = snapshot(folder)
    code, _, err = prepare()
    assert (code, err.count("\n")) == (2, 1)
    assert err.endswith("has format 1, expected 2; run prepare_data.py again with --overwrite\n")
    assert snapshot(folder) == before
    assert prepare("--overwrite").code == 0
    assert read_json(folder / MANIFEST)["format"] == 2


def test_overwrite_leaves_nothing_of_the_old_folder(prepare, tmp_path):
    (tmp_path / "blocks").mkdir()
    (tmp_path / "blocks" / "notes.md").write_text("mine")
    code, _, err = prepare()
    assert code == 2
    assert "is not empty and not made by prepare_data.py" in err
    assert prepare("--overwrite").code == 0
    assert not (tmp_path / "blocks" / "notes.md").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["blocks"]


def test_a_folder_that_holds_the_book_is_never_replaced(prepare, library, tmp_path):
    folder, _ = library
    before = snapshot(folder)
    for flags in ([], ["--overwrite"]):
        code, _, err = prepare("--input-path", folder / "a.txt", *flags, to="library")
        assert code == 2
        assert err.startswith("error: output-dir: ")
    assert "refusing to use" in err
    assert "it holds the book a.txt" in err
    assert snapshot(folder) == before


@pytest.mark.parametrize("had_one_before", [False, True])
def test_a_failure_halfway_leaves_the_folder_as_it_was(prepare, tmp_path, monkeypatch, had_one_before):
    if had_one_before:
        assert prepare().code == 0
    before = snapshot(tmp_path)

    replace(ngrams, "measure_leakage", lambda *_: signal.raise_signal(signal.SIGINT), monkeypatch.setattr)
    assert prepare("--seed", 7, "--overwrite").code == 130
    assert snapshot(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == (["blocks"] if had_one_before else [])


def test_a_book_that_changes_while_it_is_read_is_refused(prepare, tmp_path, monkeypatch):
    path = tmp_path / "book.txt"
    path.write_text(make_book(100))

    def change(*_):
        path.write_text(make_book(101))
        return []

    replace(utils.data.text, "choose_validation_spans", change, monkeypatch.setattr)
    code, _, err = prepare("--input-path", path)
    assert code == 2
    assert "changed while it was read; try again" in err
