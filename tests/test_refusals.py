"""Every bad input has its line and its exit code, and touches nothing; odd but good input works.

The ids are the rows of the project's table of refusals: P prepare_data, F finetune_generative, G generate_text.
"""

import contextlib
import errno
import http.server
import json
import os
import pkgutil
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, load_from_disk
from safetensors.torch import load_file, save_file

from utils.cli import check_processes
from utils.storage import MANIFEST, describe_files, hash_file

ROOT = Path(__file__).parents[1]
TEXT = "One paragraph of a small book.\n\nAnd another, as long as it needs to be.\n\n"
PAIR = ["--finetuned-model", "tuned", "--base-model", "model"]


def listing(folder):
    """Names below a folder, with size and time of whatever is not a directory."""
    found = {}
    for path in sorted(folder.rglob("*")):
        state = path.lstat()
        found[path] = None if path.is_dir() and not path.is_symlink() else (state.st_size, state.st_mtime_ns)
    return found


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Work in an empty folder, so that the paths in messages are short."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refuse(script, here, book, tiny_model, prepared):
    """Run a script that must refuse: one error line with every part of `says`, nothing touched."""

    def run_and_check(name, *argv, says, code=2):
        folders = (here, book.parent, tiny_model, prepared)
        before = [listing(folder) for folder in folders]
        result = script(name, *argv)
        errors = [line for line in result.err.splitlines() if not line.startswith("warning: ")]
        assert len(errors) == 1, result.err
        assert errors[0].startswith("error: ")
        assert len(errors[0]) <= 240
        for part in [says] if isinstance(says, str) else says:
            assert part in errors[0]
        assert result.code == code
        assert [listing(folder) for folder in folders] == before
        return result

    return run_and_check


@pytest.fixture
def model(here, tiny_model):
    """A copy of the tiny model in ./model, to be damaged."""
    return shutil.copytree(tiny_model, here / "model")


@pytest.fixture
def data(here, prepared):
    """A copy of the prepared folder in ./data, to be damaged."""
    return shutil.copytree(prepared, here / "data")


@pytest.fixture
def pair(model):
    """Two copies of the tiny model: ./model, the base, and ./tuned."""
    return model, shutil.copytree(model, model.parent / "tuned")


@pytest.fixture(scope="session")
def four_steps(tmp_path_factory, prepared):
    """A finished run of four updates with checkpoints at 2 and 4."""
    folder = tmp_path_factory.mktemp("run") / "out"
    command = [*train_flags(prepared), "--save-every", 2, "--output-dir", folder]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["finetune_generative.py", *map(str, command)])
        import finetune_generative

        assert finetune_generative.main(finetune_generative.parse_args()) == 0
    return folder


def train_flags(data):
    return ["--data-dir", data, "--max-steps", 4, "--batch-size", 2, "--sample-tokens", 0, "--copy-samples", 0,
            "--dtype", "fp32", "--eval-every", 4]  # fmt: skip


def prepare_flags(model, output="out", block=32):
    return ["--model-name", model, "--block-size", block, "--output-dir", output]


def edit_json(path, **changes):
    """Change keys of a JSON file; None takes a key away. A manifest loses the checksum of itself."""
    own = {"sha256": None} if path.name == MANIFEST else {}
    value = {**json.loads(path.read_text(encoding="utf-8")), **own, **changes}
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not None}), encoding="utf-8")


@contextlib.contextmanager
def ordinary_user():
    """Give up root's right to read and write everything."""
    if os.geteuid():
        yield
        return
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def let_others_in(*paths):
    """The folders of the tests are their owner's; an ordinary user needs a way through them."""
    top = Path(tempfile.gettempdir())
    for folder in {folder for path in paths for folder in path.parents if folder.is_relative_to(top)}:
        if not folder.stat().st_mode & 0o001:
            folder.chmod(0o755)


BOOKS = [
    ("P7", b"", "book.txt is empty"),
    ("P8", b" \n\t\r\n ", "book.txt has no text, only white space"),
    ("P9-byte", b"x", ("book.txt gives 1 token;", "one block needs 32", "smaller --block-size")),
    ("P9-words", b"a few words", ("book.txt gives", "tokens; one block needs 32")),
    ("P10-le", b"\xff\xfe" + TEXT.encode("utf-16-le"), ("looks like UTF-16;", "iconv -f UTF-16 -t UTF-8")),
    ("P10-be", b"\xfe\xff" + TEXT.encode("utf-16-be"), ("looks like UTF-16;", "iconv -f UTF-16 -t UTF-8")),
    ("P11-le", TEXT.encode("utf-16-le"), ("looks like UTF-16 without a mark", "iconv -f UTF-16LE -t UTF-8")),
    ("P11-be", TEXT.encode("utf-16-be"), ("looks like UTF-16 without a mark", "iconv -f UTF-16BE -t UTF-8")),
    ("P12-mark", TEXT.encode("utf-32"), ("looks like UTF-32;", "iconv -f UTF-32 -t UTF-8")),
    ("P12-le", TEXT.encode("utf-32-le"), ("looks like UTF-32 without a mark", "iconv -f UTF-32LE -t UTF-8")),
    ("P12-be", TEXT.encode("utf-32-be"), ("looks like UTF-32 without a mark", "iconv -f UTF-32BE -t UTF-8")),
    ("P13", "café\n".encode("latin-1"), ("is not UTF-8: byte 0xe9 at offset 3 (line 1)", "--encoding latin-1")),
    ("P13-line", b"one\ntwo\n\x93three\x94\n", ("byte 0x93 at offset 8 (line 3)", "--encoding latin-1")),
    ("P14", "caf\u00e9".encode()[:-1], "is not UTF-8: unfinished character at its end (offset 3)"),
    ("P15", b"\xed\xa0\x80 and text", "is not UTF-8: byte 0xed at offset 0"),
    ("P16", bytes(4096), "has only zero bytes; the file is damaged"),
    ("P17", b"ab\0 and plain text after it", "has a zero byte at offset 2; it is not plain text"),
    ("P18", b"\x1f\x8b\x08\0\0\0\0\0", "is a gzip file; unpack it first"),
    ("P19", b"PK\x03\x04\x14\0\0\0", "is a zip file (docx or epub?); save it as plain text"),
    ("P20", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "is a PDF; save it as plain text"),
    ("P21-bytes", bytes(range(256)), "is not text: byte 0x80 at offset 128"),
    ("P21-png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\1\xc2", "is not text: byte 0x89 at offset 0"),
    ("P21-jpeg", b"\xff\xd8\xff\xe0\0\x10JFIF\0\1\1", "is not text: byte 0xff at offset 0"),
]


@pytest.mark.parametrize(("content", "says"), [pytest.param(*row, id=name) for name, *row in BOOKS])
def test_book_content(refuse, here, tiny_model, content, says):
    """A book that is not a UTF-8 text is refused with what it is."""
    (here / "book.txt").write_bytes(content)
    refuse("prepare_data", "--input-path", "book.txt", *prepare_flags(tiny_model), says=says)


def test_half_a_character(refuse, here, tiny_model):
    """An encoding that can spell one half of a surrogate pair is no way around UTF-8."""
    (here / "book.txt").write_bytes(TEXT.encode() * 20 + b"+2AA-")
    flags = ["--input-path", "book.txt", "--encoding", "utf-7", *prepare_flags(tiny_model)]
    refuse("prepare_data", *flags, says="book.txt is not utf-7: half a character, '\\ud800'")


@pytest.mark.parametrize("encoding", ["undefined", "punycode"])
def test_codecs_that_are_none_of_text(refuse, here, tiny_model, encoding):
    (here / "book.txt").write_bytes("é".encode() * 400)
    flags = ["--input-path", "book.txt", "--encoding", encoding, *prepare_flags(tiny_model)]
    refuse("prepare_data", *flags, says=f"book.txt is not {encoding}: ")


def make_fifo(place):
    os.mkfifo(place)


def make_socket(place):
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(place.name)


def make_loop(place):
    place.symlink_to(place.name)


PLACES = [
    ("P1", None, "book.txt", "book.txt: no such file"),
    ("P1-below-a-file", None, "good.txt/book.txt", "good.txt/book.txt: no such file"),
    ("P2", Path.mkdir, "book.txt", ("book.txt: is a directory", "expected a text file")),
    ("P4-fifo", make_fifo, "book.txt", "book.txt: not a regular file"),
    ("P4-socket", make_socket, "book.txt", "book.txt: not a regular file"),
    ("P4-zero", None, "/dev/zero", "/dev/zero: not a regular file"),
    ("P5", make_loop, "book.txt", "book.txt: too many levels of symbolic links"),
    ("P6", None, "n" * 300, f"{'n' * 60}...: file name too long"),
]


@pytest.mark.parametrize(("make", "path", "says"), [pytest.param(*row, id=name) for name, *row in PLACES])
def test_book_place(refuse, here, tiny_model, make, path, says):
    """What is no readable file is refused, alone and beside a good book."""
    if make:
        make(here / path)
    (here / "good.txt").write_text(TEXT * 20)
    refuse("prepare_data", "--input-path", path, *prepare_flags(tiny_model), says=says)
    refuse("prepare_data", "--input-path", "good.txt", path, *prepare_flags(tiny_model), says=says)


@pytest.mark.parametrize("row", [pytest.param("book", id="P3"), pytest.param("output", id="P42")])
def test_permissions(refuse, here, book, tiny_model, prepared, row):
    """A book that may not be read and a folder that may not be written are named."""
    shutil.copy(book, here / "book.txt")
    (here / "book.txt").chmod(0o000 if row == "book" else 0o644)
    (here / "locked").mkdir(mode=0o555)
    output, says = "out", "book.txt: permission denied"
    if row == "output":
        output, says = "locked/out", "output-dir: locked/out is not writable"
    let_others_in(here / "book.txt", book, tiny_model / "config.json", prepared / MANIFEST)
    here.chmod(0o777)
    with ordinary_user():
        refuse("prepare_data", "--input-path", "book.txt", *prepare_flags(tiny_model, output), says=says)


@pytest.mark.parametrize("moment", [pytest.param("read", id="P22-read"), pytest.param("later", id="P22-later")])
def test_book_changes(refuse, here, book, tiny_model, monkeypatch, moment):
    """A book that grows while it is read, or between measuring and tokenizing, is refused."""
    import prepare_data

    path = Path(shutil.copy(book, here.parent / "growing.txt"))
    owner, name = (Path, "read_bytes") if moment == "read" else (prepare_data, "load_model_tokenizer")
    original = getattr(owner, name)

    def grow(argument):
        monkeypatch.undo()
        monkeypatch.chdir(here)
        with open(path, "ab") as file:
            file.write(b"and on it goes\n")
        return original(argument)

    monkeypatch.setattr(owner, name, grow)
    says = "growing.txt changed while it was read; try again"
    refuse("prepare_data", "--input-path", "../growing.txt", *prepare_flags(tiny_model), says=says)


FLAGS = [
    ("P24", "--block-size 0", "--block-size must be 2 to 1024, not 0"),
    ("P25", "--block-size -5", "--block-size must be 2 to 1024, not -5"),
    ("P26-word", "--block-size abc", "--block-size: 'abc' is not a whole number"),
    ("P26-part", "--block-size 12.5", "--block-size: '12.5' is not a whole number"),
    ("P26-power", "--block-size 1e3", "--block-size: '1e3' is not a whole number"),
    ("P26-empty", "--block-size=", "--block-size: '' is not a whole number"),
    ("P27-arabic", "--block-size ٣", "--block-size: '٣' is not a plain number"),
    ("P27-underscore", "--block-size 1_000", "--block-size: '1_000' is not a plain number"),
    ("P27-long", f"--block-size {'9' * 5000}", "--block-size"),
    ("P28", "--block-size 1", "--block-size must be 2 to 1024, not 1"),
    ("P29-any", "--block-size 2048", "--block-size must be 2 to 1024, not 2048"),
    ("P30-all", "--val-split 1", "--val-split must be 0 up to below 1, not 1"),
    ("P30-negative", "--val-split -0.1", "--val-split must be 0 up to below 1, not -0.1"),
    ("P30-nan", "--val-split nan", "--val-split must be 0 up to below 1, not nan"),
    ("P30-text", "--val-split half", "--val-split: 'half' is not a number"),
    ("P32", "--seed -1", "--seed must be 0 to 4294967295, not -1"),
    ("P33", "--seed 18446744073709551616", "--seed must be 0 to 4294967295, not 18446744073709551616"),
    ("P49-unknown", "--blok-size 32", "unknown option --blok-size (did you mean --block-size?)"),
    ("P49-no-value", "--block-size", ("--block-size", "expected one argument")),
    ("P49-input-empty", "--input-path book.txt --input-path=", "--input-path must not be empty"),
    ("P49-model-empty", "--model-name=", "--model-name must not be empty"),
    ("P49-model-bytes", "--model-name caf\udce9", "--model-name must be valid UTF-8"),
    ("P49-val-empty", "--val-path=", "--val-path must not be empty"),
    ("P49-encoding", "--encoding klingon", ("--encoding", "'klingon' is not a text encoding")),
    ("P50", "--block 32", "unknown option --block"),
    ("P50-equals", "--block=32", "unknown option --block"),
    ("F41-zero", "--epochs 0", "--epochs must be 1 or more, not 0"),
    ("F41-negative", "--epochs -1", "--epochs must be 1 or more, not -1"),
    ("F41-text", "--epochs x", "--epochs: 'x' is not a whole number"),
    ("F42", "--max-steps 0", "--max-steps must be 1 or more, not 0"),
    ("F43", "--batch-size 0", "--batch-size must be 1 or more, not 0"),
    ("F44", "--grad-accum-steps 0", "--grad-accum-steps must be 1 or more, not 0"),
    ("F45", "--learning-rate -1", "--learning-rate must be above 0 and finite, not -1"),
    ("F45-zero", "--learning-rate 0", "--learning-rate must be above 0 and finite, not 0"),
    ("F46-nan", "--learning-rate nan", "--learning-rate must be above 0 and finite, not nan"),
    ("F46-inf", "--learning-rate inf", "--learning-rate must be above 0 and finite, not inf"),
    ("F46-huge", "--learning-rate 1e999", "--learning-rate must be above 0 and finite, not 1e999"),
    ("F47-decay", "--weight-decay -1", "--weight-decay must be 0 or more and finite, not -1"),
    ("F47-nan", "--weight-decay nan", "--weight-decay must be 0 or more and finite, not nan"),
    ("F47-beta1", "--adam-beta1 1.0", "--adam-beta1 must be 0 up to below 1, not 1.0"),
    ("F47-beta2", "--adam-beta2 1.0", "--adam-beta2 must be 0 up to below 1, not 1.0"),
    ("F47-epsilon", "--adam-epsilon -1", "--adam-epsilon must be above 0 and finite, not -1"),
    ("F48-zero", "--max-grad-norm 0", "--max-grad-norm must be above 0 and finite, not 0"),
    ("F48-negative", "--max-grad-norm -1", "--max-grad-norm must be above 0 and finite, not -1"),
    ("F48-nan", "--max-grad-norm nan", "--max-grad-norm must be above 0 and finite, not nan"),
    ("F49-above", "--warmup-ratio 1.1", "--warmup-ratio must be 0 to 1, not 1.1"),
    ("F49-below", "--warmup-ratio -0.1", "--warmup-ratio must be 0 to 1, not -0.1"),
    ("F49-nan", "--warmup-ratio nan", "--warmup-ratio must be 0 to 1, not nan"),
    ("F50-negative", "--num-workers -1", "--num-workers must be 0 to 64, not -1"),
    ("F50-many", "--num-workers 1000", "--num-workers must be 0 to 64, not 1000"),
    ("F51-zero", "--save-every 0", "--save-every must be 1 or more, not 0"),
    ("F51-negative", "--save-every -1", "--save-every must be 1 or more, not -1"),
    ("F51-keep", "--keep-checkpoints 0", "--keep-checkpoints must be 1 or more, not 0"),
    ("F53", "--device gpu", ("--device: 'gpu' is unknown", "cpu", "cuda")),
    ("F55-fp16", "--dtype fp16", ("--dtype: invalid choice: 'fp16'", "fp32", "bf16")),
    ("F53-number", "--device cuda:x", "--device: 'cuda:x' is unknown"),
    ("F-copies-negative", "--copy-samples -1", "--copy-samples must be 0 to 1000, not -1"),
    ("F-copies-many", "--copy-samples 1001", "--copy-samples must be 0 to 1000, not 1001"),
    ("F-copying-zero", "--max-copy-rate 0", "--max-copy-rate must be above 0 up to 1, not 0"),
    ("F-copying-above", "--max-copy-rate 1.1", "--max-copy-rate must be above 0 up to 1, not 1.1"),
    ("F-copying-nan", "--max-copy-rate nan", "--max-copy-rate must be above 0 up to 1, not nan"),
    ("G-validation_prompts", "--num-validation-prompts 1001", "--num-validation-prompts must be 0 to 1000, not 1001"),
    ("G-guard-zero", "--max-copy 0", "--max-copy must be 1 to 1023, not 0"),
    ("G-guard-text", "--max-copy all", "--max-copy: 'all' is not a whole number"),
    ("G4-zero", "--max-new-tokens 0", "--max-new-tokens must be 1 to 1000000, not 0"),
    ("G4-negative", "--max-new-tokens -1", "--max-new-tokens must be 1 to 1000000, not -1"),
    ("G4-many", "--max-new-tokens 1000001", "--max-new-tokens must be 1 to 1000000, not 1000001"),
    ("G4-text", "--max-new-tokens x", "--max-new-tokens: 'x' is not a whole number"),
    ("G5-negative", "--temperature -1", "--temperature must be 0 or more and finite, not -1"),
    ("G5-nan", "--temperature nan", "--temperature must be 0 or more and finite, not nan"),
    ("G6", "--temperature inf", "--temperature must be 0 or more and finite, not inf"),
    ("G7", "--temperature 1e-40", "--temperature: 1e-40 is too small; use 0"),
    ("G8-negative", "--top-k -1", "--top-k must be 0 or more, not -1"),
    ("G9-zero", "--top-p 0", "--top-p must be above 0 up to 1, not 0"),
    ("G9-above", "--top-p 1.5", "--top-p must be above 0 up to 1, not 1.5"),
    ("G9-nan", "--top-p nan", "--top-p must be above 0 up to 1, not nan"),
    ("G10", "--num-samples 0", "--num-samples must be 1 to 10000, not 0"),
    ("G11", "--repetition-penalty 0", "--repetition-penalty must be above 0 and finite, not 0"),
    ("G-stop-empty", "--stop=", "--stop must not be empty"),
    ("G-stop-bytes", "--stop caf\udce9", "--stop must be valid UTF-8"),
    ("G-file-prompts", "--to-file new --prompt x --prompt y", "--to-file continues one prompt; give --prompt once"),
    ("G-file-none", "--to-file new", "--to-file continues one prompt; give --prompt once"),
    ("G-words", "--words 300", "--words needs --to-file"),
    ("G-words-zero", "--to-file new --prompt x --words 0", "--words must be 1 to 1000000, not 0"),
    ("G-both", "--to-file new --prompt x --interactive", "--to-file and --interactive exclude each other"),
    ("G-typed", "--interactive --prompt x", "--interactive asks for its prompts; leave out --prompt"),
    ("G-typed-file", "--interactive --prompts-file x", "--interactive asks for its prompts; leave out --prompt"),
    ("G24-seed", "--seed -1", "--seed must be 0 to 4294967295, not -1"),
    ("G24-device", "--device gpu", ("--device: 'gpu' is unknown", "cpu", "cuda")),
    ("G24-unknown", "--promt x", "unknown option --promt (did you mean --prompt?)"),
]
SCRIPTS = {"P": "prepare_data", "F": "finetune_generative", "G": "generate_text"}


@pytest.mark.parametrize(
    ("name", "flags", "says"), [pytest.param(SCRIPTS[row[0]], flags, says, id=row) for row, flags, says in FLAGS]
)
def test_flags(refuse, name, flags, says):
    """A flag out of its range is refused with flag, range and value."""
    refuse(name, *flags.split(), says=says)


@pytest.mark.parametrize("text", [pytest.param(" 5 ", id="P27-blank"), pytest.param("5\n", id="P27-newline")])
def test_padded_number(refuse, text):
    """A number with white space around it was pasted wrongly."""
    refuse("prepare_data", "--block-size", text, says=("--block-size:", "is not a plain number"))


@pytest.mark.parametrize(
    "argv",
    [
        pytest.param(["prepare_data.py", "--block-size", "0"], id="P24"),
        pytest.param(["prepare_data.py", "--blok-size", "8"], id="P49"),
        pytest.param(["finetune_generative.py", "--learning-rate", "nan"], id="F46"),
        pytest.param(["finetune_generative.py", "--device", "gpu"], id="F53"),
        pytest.param(["generate_text.py", "--top-p", "0"], id="G9"),
    ],
)
def test_argument_mistakes_load_nothing_heavy(argv):
    """A mistyped flag is answered before torch and its kin are imported."""
    code = (
        "import runpy, sys\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: print(sorted({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.argv = {argv}; sys.path.insert(0, '')\n{code}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == "[]\n"
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        pytest.param(["--block-size", 128], "--block-size 128 is more than the model's 64 positions", id="P29"),
        pytest.param(
            ["--block-size", 32, "--val-split", 0.01],
            ("the text gives", "0.01 of them leaves none for validation"),
            id="P31-validation",
        ),
        pytest.param(
            ["--block-size", 32, "--val-split", 0.999],
            ("the text gives", "0.999 of them leaves none for training"),
            id="P31-train",
        ),
        pytest.param(
            ["--block-size", 32, "--val-path", "short.txt"],
            ("--val-path short.txt gives 2 tokens; one block needs 32 - use a longer text or a smaller --block-size"),
            id="P31-val-path",
        ),
    ],
)
def test_sizes_that_do_not_fit(refuse, here, tiny_model, argv, says):
    """Blocks that the model cannot take, or shares without a block, are refused; no parent stays behind."""
    (here / "book.txt").write_text(TEXT * 20)
    (here / "short.txt").write_text("it")
    argv = ["--input-path", "book.txt", "--model-name", tiny_model, "--output-dir", "new/parent/out", *argv]
    refuse("prepare_data", *argv, says=says)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without_end_of_text(path):
    edit_json(path.with_name("tokenizer_config.json"), eos_token=None, bos_token=None, unk_token=None)
    path.with_name("special_tokens_map.json").unlink(missing_ok=True)


TOKENIZERS = [
    ("P34", lambda path: shutil.rmtree(path.parent), "tokenizer: ./model: no such directory"),
    ("P35-cut", cut, ("tokenizer: model/tokenizer.json is damaged: line ", " column ")),
    ("P35-empty", lambda path: path.write_bytes(b""), "tokenizer: model/tokenizer.json is damaged: line 1 column 1"),
    ("P35-bytes", lambda path: path.write_bytes(b"{\xff}"), "tokenizer: model/tokenizer.json is damaged: byte 1"),
    ("P35-other", lambda path: path.write_text("{}"), "tokenizer: model is damaged"),
    ("P35-list", lambda path: path.write_text("[1]"), "tokenizer: model/tokenizer.json is damaged"),
    ("P35-deep", lambda path: path.write_text("[" * 99999), "tokenizer: model/tokenizer.json is damaged"),
    ("P35-config", lambda path: path.with_name("tokenizer_config.json").write_text("[]"), "tokenizer: model"),
    ("P36", Path.unlink, "tokenizer: model has no tokenizer.json"),
    ("P37", without_end_of_text, "tokenizer: model has no end-of-text token"),
    ("P39", lambda path: edit_json(path.with_name("config.json"), vocab_size=399),
     "tokenizer has 400 ids, the model 399"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "says"), [pytest.param(*row, id=name) for name, *row in TOKENIZERS])
def test_tokenizer(refuse, model, book, damage, says):
    """A tokenizer that is missing, damaged or too big for its model is refused."""
    damage(model / "tokenizer.json")
    refuse("prepare_data", "--input-path", book, *prepare_flags("./model"), says=says)


def make_word_tokenizer(folder, ids):
    """Save a tokenizer that knows one id a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)


def test_ids_beyond_16_bits(script, here):
    """Row P38: ids above 65535 arrive as they are."""
    make_word_tokenizer("words", {"<end>": 0} | {f"w{i}": i for i in range(1, 70_000)})
    (here / "book.txt").write_text(" ".join(f"w{69_000 + i}" for i in range(64)))
    flags = prepare_flags("words", block=16)
    assert script("prepare_data", "--input-path", "book.txt", "--val-split", 0, *flags).code == 0
    ids = load_from_disk("out")["train"].with_format("numpy")["input_ids"][:].flatten()
    np.testing.assert_array_equal(ids, np.arange(69_000, 69_064))


def test_id_beyond_its_own_vocabulary(refuse, here):
    """Row P38: an id that the smallest type cannot hold is named, never wrapped."""
    make_word_tokenizer("words", {"<end>": 0, "far": 70_000})
    (here / "book.txt").write_text("far " * 64)
    says = "tokenizer: id 70000 is beyond its own vocabulary of 2"
    refuse("prepare_data", "--input-path", "book.txt", *prepare_flags("words"), says=says)


def foreign_folder(here):
    (here / "out").mkdir()
    (here / "out" / "letter.txt").write_text("dear")


def link_to_folder(here):
    (here / "real").mkdir()
    (here / "out").symlink_to("real")


def link_inside(here):
    (here / "config.json").write_text("{}")
    (here / "out").mkdir()
    (here / "out" / MANIFEST).write_text('{"made_by": "prepare_data.py"}')
    (here / "out" / "run_config.json").write_text("{}")
    (here / "out" / "config.json").symlink_to("../config.json")


OUTPUTS = [
    ("P40", lambda here: (here / "out").write_text("x"), ["out"], "output-dir: out is a file, expected a directory"),
    ("P43", foreign_folder, ["out"], ("output-dir: out is not empty and not made by", "use another or --overwrite")),
    ("P44-root", None, ["/"], "output-dir: refusing to use /"),
    ("P44-home", None, ["home", "--overwrite"], "output-dir: refusing to use home"),
    ("P44-here", None, [".", "--overwrite"], "output-dir: refusing to use ."),
    ("P44-above", None, ["..", "--overwrite"], "output-dir: refusing to use .."),
    ("P45", link_to_folder, ["out"], "output-dir: out is a symbolic link to real; give"),
    ("P46", link_inside, ["out"], "output-dir: out/config.json is a symbolic link"),
]


@pytest.mark.parametrize("name", ["prepare_data", "finetune_generative"])
@pytest.mark.parametrize(("make", "output", "says"), [pytest.param(*row, id=name) for name, *row in OUTPUTS])
def test_output_folder(refuse, here, book, tiny_model, prepared, monkeypatch, name, make, output, says):
    """An output folder that would harm something else is refused by both scripts that write one."""
    (here / "home").mkdir()
    monkeypatch.setenv("HOME", str(here / "home"))
    if make:
        make(here)
    flags = ["--input-path", book, "--model-name", tiny_model] if name == "prepare_data" else train_flags(prepared)
    refuse(name, *flags, "--output-dir", *output, says=says)


def test_output_name_too_long(refuse, book, tiny_model):
    """Row P6 for the output folder."""
    says = ("nnn", "file name too long")
    refuse("prepare_data", "--input-path", book, *prepare_flags(tiny_model, "n" * 300), says=says)


@pytest.mark.parametrize("output", ["library", "library/shelf"])
def test_output_would_replace_the_book(refuse, here, tiny_model, output):
    """Row P44: --overwrite never takes the book's own folder, nor one above it."""
    (here / "library" / "shelf").mkdir(parents=True)
    (here / "library" / "shelf" / "book.txt").write_text(TEXT * 20)
    flags = ["--input-path", "library/shelf/book.txt", *prepare_flags(tiny_model, output), "--overwrite"]
    refuse("prepare_data", *flags, says=(f"output-dir: refusing to use {output}", "book.txt"))


def test_book_with_glob_characters(script, here, book, tiny_model):
    """Rows P23 and P41: a name is a name, and the output folder's parents are made."""
    shutil.copy(book, here / "bo[o]k*.txt")
    shutil.copy(book, here / "book1.txt")
    assert script("prepare_data", "--input-path", "bo[o]k*.txt", *prepare_flags(tiny_model, "a/b/out")).code == 0
    manifest = json.loads((here / "a/b/out" / MANIFEST).read_text())
    assert [entry["name"] for entry in manifest["books"]] == ["bo[o]k*.txt"]


def data_file(data):
    return data / "train" / "data-00000-of-00001.arrow"


def shorten(keep):
    """Damage: keep so many bytes of the training blocks; a negative number counts from the end."""

    def damage(data):
        path = data_file(data)
        path.write_bytes(path.read_bytes()[: keep if keep is not None else path.stat().st_size // 2])

    return damage


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit_manifest(**changes):
    return lambda data: edit_json(data / MANIFEST, **changes)


def escape_folder(data):
    files = json.loads((data / MANIFEST).read_text())["files"]
    edit_json(data / MANIFEST, files=files | {"../../x": {"bytes": 1, "sha256": "0"}})


def empty_training(data):
    splits = json.loads((data / MANIFEST).read_text())["splits"]
    edit_json(data / MANIFEST, splits={**splits, "train": {**splits["train"], "blocks": 0}})


def rewrite_ids(value):
    """Damage: a data folder that is whole, but holds an id that no tokenizer gave."""

    def damage(data):
        splits = load_from_disk(str(data))
        rows = splits["train"].to_dict()["input_ids"]
        rows[-1][-1] = value
        made = DatasetDict(train=Dataset.from_dict({"input_ids": rows}), validation=splits["validation"])
        made.save_to_disk(str(data / "new"))
        for name in ("train", "validation"):
            shutil.rmtree(data / name)
            (data / "new" / name).rename(data / name)
        shutil.rmtree(data / "new")
        edit_json(data / MANIFEST, files=describe_files(data))

    return damage


DAMAGED_MANIFEST = f"data/{MANIFEST} is damaged"
DAMAGED_BLOCKS = "train/data-00000-of-00001.arrow is damaged: "
DATA = [
    ("F1", shutil.rmtree, "data: data: no such directory; run prepare_data.py first"),
    ("F2", lambda data: (data / MANIFEST).unlink(), "data: data was not made by prepare_data.py"),
    ("F3-cut", lambda data: cut(data / MANIFEST), DAMAGED_MANIFEST),
    ("F3-empty", lambda data: (data / MANIFEST).write_text("{}"), DAMAGED_MANIFEST),
    ("F3-list", lambda data: (data / MANIFEST).write_text("[]"), DAMAGED_MANIFEST),
    ("F3-bytes", lambda data: (data / MANIFEST).write_bytes(b"\xff\xfe{}"), DAMAGED_MANIFEST),
    ("F3-format", edit_manifest(format="1"), DAMAGED_MANIFEST),
    ("F3-block", edit_manifest(block_size="32"), DAMAGED_MANIFEST),
    ("F3-zero-block", edit_manifest(block_size=0), DAMAGED_MANIFEST),
    ("F3-splits", edit_manifest(splits={"train": {"blocks": "9"}, "validation": {}}), DAMAGED_MANIFEST),
    ("F3-files", edit_manifest(files={"train/data-00000-of-00001.arrow": 7}), DAMAGED_MANIFEST),
    ("F3-no-files", edit_manifest(files={}), DAMAGED_MANIFEST),
    ("F3-tokenizer", edit_manifest(tokenizer="gpt2"), DAMAGED_MANIFEST),
    ("F4-0", shorten(0), (DAMAGED_BLOCKS + "0 bytes, expected", "run prepare_data.py again")),
    ("F4-1", shorten(1), (DAMAGED_BLOCKS + "1 bytes, expected", "run prepare_data.py again")),
    ("F4-8", shorten(8), DAMAGED_BLOCKS + "8 bytes, expected "),
    ("F4-half", shorten(None), (DAMAGED_BLOCKS, " bytes, expected ")),
    ("F4-last", shorten(-1), (DAMAGED_BLOCKS, " bytes, expected ")),
    ("F4-missing", lambda data: data_file(data).unlink(), "train/data-00000-of-00001.arrow is missing"),
    ("F5", shorten(-8), (DAMAGED_BLOCKS, " bytes, expected ")),
    ("F6", lambda data: flip_bit(data_file(data)), DAMAGED_BLOCKS + "checksum differs"),
    ("F7", lambda data: data_file(data).write_bytes(bytes(data_file(data).stat().st_size)),
     DAMAGED_BLOCKS + "checksum differs"),
    ("F8", escape_folder, f"data/{MANIFEST}: file name '../../x' not allowed"),
    ("F9", edit_manifest(format=99), ("data: format 99 is newer than this program", "(2)")),
    ("F11", rewrite_ids(400), "data has token id 400; the model knows 0 to 399"),
    ("F12", rewrite_ids(-1), "data has token id -1; the model knows 0 to 399"),
    ("F14", empty_training, "data: data has no training blocks"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "says"), [pytest.param(*row, id=name) for name, *row in DATA])
def test_prepared_folder(refuse, data, damage, says):
    """A prepared folder that is not as prepare_data.py left it is refused before it is used."""
    damage(data)
    refuse("finetune_generative", *train_flags("data"), "--output-dir", "run", says=says)


def test_data_of_another_tokenizer(refuse, here, book, prepared, model):
    """Row F10."""
    from utils.data.tokenizer import train_tokenizer

    train_tokenizer([book.read_text()[:4000]], 390).save_pretrained(model)
    says = ("data was made with another tokenizer than model's", "run prepare_data.py --model-name model")
    refuse("finetune_generative", *train_flags(prepared), "--model-name", "model", "--output-dir", "run", says=says)


def make_model(folder, tiny_model, **changes):
    """Save a model with the tiny model's tokenizer and another shape."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(tiny_model, **changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for path in tiny_model.glob("*token*"):
        shutil.copy(path, folder)
    return folder


def test_blocks_longer_than_the_model(refuse, here, prepared, tiny_model):
    """Row F13."""
    make_model(here / "short", tiny_model, n_positions=16)
    says = "data has blocks of 32 tokens; the model takes 16"
    refuse("finetune_generative", *train_flags(prepared), "--model-name", "short", "--output-dir", "run", says=says)


def test_fewer_blocks_than_a_batch(script, here, prepared):
    """Row F15: the batch is what there is, said once."""
    flags = [*train_flags(prepared), "--batch-size", 4096, "--max-steps", 1, "--output-dir", "run"]
    result = script("finetune_generative", *flags)
    assert result.code == 0
    n_blocks = json.loads((prepared / MANIFEST).read_text())["splits"]["train"]["blocks"]
    assert result.err.count(f"warning: a batch is the {n_blocks} blocks there are, not 4096") == 1


def test_unknown_hub_name(refuse, prepared, monkeypatch):
    """Row F19, with a hub of our own on this machine."""

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *words):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    flags = [*train_flags(prepared), "--model-name", "gtp2", "--output-dir", "run"]
    refuse("finetune_generative", *flags, says="model 'gtp2' does not exist on the hub")
    server.shutdown()


def only_pickle(model):
    """Leave weights only in a pickle that would write ./opened when read."""

    class Bomb:
        def __reduce__(self):
            return open, ("opened", "w")

    (model / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Bomb()}, model / "pytorch_model.bin")


def edit_config(**changes):
    return lambda model: edit_json(model / "config.json", **changes)


def set_config(text):
    return lambda model: (model / "config.json").write_text(text)


def weights(change):
    """Damage: pass the bytes of model.safetensors through a function."""

    def damage(model):
        path = model / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return damage


def not_a_number(model):
    tensors = load_file(model / "model.safetensors")
    tensors["transformer.wte.weight"][7, 7] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


LLAMA = '{"model_type": "llama"}'
BROKEN_WEIGHTS = "model: model/model.safetensors is damaged ("
MODELS = [
    ("F16", shutil.rmtree, "model: ./model: no such directory"),
    ("F16-file", lambda model: shutil.rmtree(model) or model.write_text("x"),
     "model: ./model: is a file, expected a directory"),
    ("F21", lambda model: (model / "config.json").unlink(), "model: model has no config.json"),
    ("F22", lambda model: cut(model / "config.json"), "model: model/config.json is damaged"),
    ("F23", set_config("{}"), "model: model/config.json does not name a model type"),
    ("F23-list", set_config("[]"), "model: model/config.json is damaged: not a JSON object"),
    ("F24", set_config(LLAMA), ("model lacks 291 tensors, first model.embed_tokens.weight", "config.json says llama")),
    ("F24-wide", set_config('{"model_type": "llama", "hidden_size": 1048576}'), "model.embed_tokens.weight"),
    ("F25", edit_config(model_type="bert"), "model: model is bert, not a causal language model"),
    ("F26-t5", edit_config(model_type="t5"), "model: model is t5, not a causal language model"),
    ("F26-unknown", edit_config(model_type="gtp9"), "model: model is gtp9, not a causal language model"),
    ("F27", edit_config(n_layer=3), "model: model lacks 12 tensors, first transformer.h.2."),
    ("F28", edit_config(n_layer=1), "model: model has 11 tensors too many, first transformer.h.1."),
    ("F29-vocabulary", edit_config(vocab_size=500),
     "model: model: transformer.wte.weight is 400x32, config.json says 500x32"),
    ("F29-positions", edit_config(n_positions=32),
     "model: model: transformer.wpe.weight is 64x32, config.json says 32x32"),
    ("F30", edit_config(n_head=5), "model: model: n_embd 32 is not divisible by n_head 5"),
    ("F31-negative", edit_config(n_layer=-1), "config.json: n_layer must be a whole number from 1, not -1"),
    ("F31-text", edit_config(n_embd="32"), "config.json: n_embd must be a whole number from 1, not '32'"),
    ("F31-layers", edit_config(n_layer=10**9), ("config.json says 1000000000 layers", "the weights have 28 tensors")),
    ("F31-wide", edit_config(n_embd=2**20), ("transformer.", "1048576")),
    ("F31-overflow", edit_config(n_embd=2**62), "model: model"),
    ("F31-beyond", edit_config(vocab_size=10**30), "model: model"),
    ("F31-activation", edit_config(activation_function="none"), "model: model"),
    ("F31-llama-text", set_config('{"model_type": "llama", "hidden_size": "wide"}'), "model: model"),
    ("F31-llama-zero", set_config('{"model_type": "llama", "num_attention_heads": 0}'), "model: model"),
    ("F32", lambda model: (model / "model.safetensors").unlink(), "model: model has no model.safetensors"),
    ("F32-link", lambda model: ((model / "model.safetensors").unlink(),
                                (model / "model.safetensors").symlink_to("/nonexistent")),
     "model/model.safetensors: no such file"),
    ("F32-state", lambda model: (model / "model.safetensors").rename(model / "optimizer.safetensors"),
     "model: model has no model.safetensors"),
    ("F33", only_pickle, "model: model has only a pickle file; convert it to safetensors"),
    ("F35-0", weights(lambda raw: b""), BROKEN_WEIGHTS),
    ("F35-4", weights(lambda raw: raw[:4]), BROKEN_WEIGHTS),
    ("F35-8", weights(lambda raw: raw[:8]), BROKEN_WEIGHTS),
    ("F35-100", weights(lambda raw: raw[:100]), BROKEN_WEIGHTS),
    ("F35-half", weights(lambda raw: raw[: len(raw) // 2]), (BROKEN_WEIGHTS, " bytes, header needs ")),
    ("F35-last", weights(lambda raw: raw[:-1]), (BROKEN_WEIGHTS, " bytes, header needs ")),
    ("F36", weights(lambda raw: struct.pack("<Q", 2**60) + raw[8:]), BROKEN_WEIGHTS),
    ("F37-json", weights(lambda raw: raw[:8] + b"[" + raw[9:]), BROKEN_WEIGHTS),
    ("F37-list", weights(lambda raw: struct.pack("<Q", 2) + b"[]"), BROKEN_WEIGHTS),
    ("F37-shape", weights(lambda raw: raw.replace(b'"shape":[400,32]', b'"shape":"400,32"')), "model: model"),
    ("F37-zeros", weights(lambda raw: bytes(len(raw))), BROKEN_WEIGHTS),
    ("F37-longer", weights(lambda raw: raw + bytes(10)), (BROKEN_WEIGHTS, " bytes, header needs ")),
    ("F39", not_a_number, "model: model: transformer.wte.weight has a value that is not a number"),
    ("F40", edit_config(auto_map={"AutoModelForCausalLM": "code.Model"}), "model: model wants to run its own code"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "says"), [pytest.param(*row, id=name) for name, *row in MODELS])
def test_model_folder(refuse, model, prepared, damage, says):
    """A model folder whose parts do not fit is refused, and nothing is filled with random numbers."""
    damage(model)
    refuse("finetune_generative", *train_flags(prepared), "--model-name", "./model", "--output-dir", "run", says=says)
    assert not Path("opened").exists()


def test_pickle_is_never_opened(refuse, model, prepared):
    """Row F34: the pickle of F33 does write a file when something reads it."""
    only_pickle(model)
    flags = [*train_flags(prepared), "--model-name", "./model", "--output-dir", "run"]
    refuse("finetune_generative", *flags, says="only a pickle file")
    torch.load(model / "pytorch_model.bin", weights_only=False)
    assert Path("opened").exists()


DEVICES = [
    ("F52", False, ["--device", "cuda"], "--device cuda: this PyTorch has no CUDA"),
    ("F54", True, ["--device", "cuda:9"], "--device cuda:9: this machine has 1 GPU"),
    ("F55", True, ["--device", "cuda", "--dtype", "bf16"], "--dtype bf16: not supported by this device"),
]


@pytest.mark.parametrize(("cuda", "flags", "says"), [pytest.param(*row, id=name) for name, *row in DEVICES])
def test_machine(refuse, prepared, monkeypatch, cuda, flags, says):
    """A device or number type that this machine lacks is refused."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **kwargs: False)
    refuse("finetune_generative", *train_flags(prepared), *flags, "--output-dir", "run", says=says)


def test_unfinished_run_goes_on(script, here, prepared, four_steps):
    """Row F58: the same command continues and says from where."""
    run = shutil.copytree(four_steps, here / "run")
    shutil.rmtree(run / "checkpoint-4")
    result = script("finetune_generative", *train_flags(prepared), "--save-every", 2, "--output-dir", "run")
    assert result.code == 0
    assert "resuming from step 2 of 4" in result.out
    assert (run / "checkpoint-4").is_dir()


def test_foreign_output_folder(refuse, here, prepared):
    """Row F59."""
    foreign_folder(here)
    says = ("output-dir: out is not empty and not made by finetune_generative.py", "use another or --overwrite")
    refuse("finetune_generative", *train_flags(prepared), "--output-dir", "out", says=says)


RESUME = ["--save-every", 2, "--output-dir", "run"]


def newest(change):
    """Damage: take the end of a run away, and change what it goes on from, so that the manifest agrees."""

    def damage(run):
        shutil.rmtree(run / "checkpoint-4")
        change(run / "checkpoint-2")
        edit_json(run / "checkpoint-2" / MANIFEST, files=describe_files(run / "checkpoint-2"))

    return damage


def change_tensors(name, **changes):
    return newest(lambda folder: save_file(load_file(folder / name) | changes, folder / name))


def damage_both(run):
    cut(run / "checkpoint-4" / "optimizer.safetensors")
    flip_bit(run / "checkpoint-2" / "model.safetensors")


def link_checkpoint(run):
    (run / "checkpoint-2").rename(run.parent / "elsewhere")
    (run / "checkpoint-2").symlink_to(run.parent / "elsewhere")


EXP_AVG = "exp_avg/transformer.wte.weight"
CHECKPOINTS = [
    ("F61", damage_both, ("output-dir: 2 checkpoints, none usable", "checkpoint-4 unusable (optimizer.safetensors is")),
    ("F68", change_tensors("optimizer.safetensors", **{EXP_AVG: torch.zeros(3, 3)}),
     "checkpoint-2/optimizer.safetensors: exp_avg of transformer.wte.weight is 3x3, expected 400x32"),
    ("F69", change_tensors("rng_state.safetensors", cpu=torch.zeros(10, dtype=torch.uint8)),
     "checkpoint-2/rng_state.safetensors: 10 bytes, expected 5056"),
    ("F70", link_checkpoint, "run/checkpoint-2 is a symbolic link"),
    ("F71", lambda run: edit_json(run / "checkpoint-4" / MANIFEST, format=99),
     "run/checkpoint-4: format 99 is newer than this program (1)"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "says"), [pytest.param(*row, id=name) for name, *row in CHECKPOINTS])
def test_checkpoints(refuse, here, prepared, four_steps, damage, says):
    """A run is not continued from what is not whole, nor begun anew without a word."""
    damage(shutil.copytree(four_steps, here / "run"))
    refuse("finetune_generative", *train_flags(prepared), *RESUME, says=says)


def other_threads(folder):
    state = json.loads((folder / "trainer_state.json").read_text())
    edit_json(folder / "trainer_state.json", machine=state["machine"] | {"threads": 99})


WARNED = [
    ("F62", lambda run: cut(run / "checkpoint-4" / "optimizer.safetensors"),
     ("warning: checkpoint-4 unusable (optimizer.safetensors is damaged: ", "; resuming from checkpoint-2")),
    ("F67", newest(other_threads), ("warning: not bit-identical from here: threads 1, was 99",)),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "says"), [pytest.param(*row, id=name) for name, *row in WARNED])
def test_resumed_with_a_warning(script, here, prepared, four_steps, damage, says):
    """An older checkpoint, or another machine, is good enough to go on; it is said once."""
    damage(shutil.copytree(four_steps, here / "run"))
    result = script("finetune_generative", *train_flags(prepared), *RESUME)
    assert result.code == 0, result.err
    assert [result.err.count(part) for part in says] == [1] * len(says)
    assert "resuming from step 2 of 4" in result.out
    assert (
        describe_files(here / "run" / "checkpoint-4")["model.safetensors"]
        == describe_files(four_steps / "checkpoint-4")["model.safetensors"]
    )


def fail_at(call, error):
    """Return a function that passes its arguments on, but raises error when called for the call-th time."""

    def wrap(original):
        calls = []

        def wrapped(*args, **kwargs):
            calls.append(1)
            if len(calls) == call:
                raise error
            return original(*args, **kwargs)

        return wrapped

    return wrap


def kill_worker(original):
    """Kill the data worker that is asked for its tenth batch."""
    calls = []

    def wrapped(*args, **kwargs):
        calls.append(1)
        if torch.utils.data.get_worker_info() and len(calls) == 10:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    return wrapped


def infinite_gradient(original):
    return lambda *args: original(*args) * float("inf")


SAFE = "checkpoint-2 is safe; "
GOES_ON = "run the same command to resume"
GOES_SMALLER = "try --micro-batch-size 1 or --gradient-checkpointing"
CPU_MEMORY = "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory. Error code 12"
FAILURES = [
    ("F56", "transformers.GPT2LMHeadModel.forward", fail_at(14, torch.OutOfMemoryError("CUDA out of memory")), [], 3,
     ("out of GPU memory (2 blocks per forward pass) at step ", "is safe; ", GOES_SMALLER)),
    ("F56-first", "transformers.GPT2LMHeadModel.forward", fail_at(3, torch.OutOfMemoryError("CUDA")), [], 3,
     ("out of GPU memory (2 blocks per forward pass) at step 0; ", "no checkpoint yet; ", GOES_SMALLER)),
    ("CPU-memory", "transformers.GPT2LMHeadModel.forward", fail_at(14, RuntimeError(CPU_MEMORY)), [], 3,
     ("error: out of memory (2 blocks per forward pass) at step ", "is safe; ", GOES_SMALLER)),
    ("memory-while-loading", "utils.training.sharding.shard", fail_at(1, torch.OutOfMemoryError("CUDA")), [], 3,
     ("out of GPU memory (2 blocks per forward pass) at step 0; ", "no checkpoint yet; ", GOES_SMALLER)),
    ("F73", "utils.training.checkpoint.save_optimizer", fail_at(2, OSError(errno.ENOSPC, "full")), [], 3,
     ("no space left on device", " at step 4; ", SAFE + GOES_ON)),
    ("F74-device", "utils.training.checkpoint.save_optimizer", fail_at(2, OSError(errno.EIO, "bad")), [], 3,
     ("input/output error", " at step 4; ", SAFE + GOES_ON)),
    ("F74-read-only", "utils.training.checkpoint.save_optimizer", fail_at(2, OSError(errno.EROFS, "ro")), [], 3,
     ("read-only file system", " at step 4; ", SAFE + GOES_ON)),
    ("F76", "torch.nn.utils.clip_grad_norm_", infinite_gradient, [], 4,
     ("gradient is not a finite number at step 1 (lr ", "try a --learning-rate below 5e-05, with --overwrite")),
    ("F77", "datasets.Dataset.__getitem__", kill_worker, ["--num-workers", 1, "--max-steps", 12], 3,
     ("a data worker was killed", " is safe; " + GOES_ON)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("place", "wrap", "flags", "code", "says"), [pytest.param(*row, id=name) for name, *row in FAILURES]
)
def test_failures_in_training(script, here, prepared, monkeypatch, place, wrap, flags, code, says):
    """What the machine or the numbers do in the middle ends with one line, which names the safe checkpoint."""
    owner, name = pkgutil.resolve_name(place.rpartition(".")[0]), place.rpartition(".")[2]
    monkeypatch.setattr(owner, name, wrap(getattr(owner, name)))
    result = script("finetune_generative", *train_flags(prepared), *RESUME, *flags)
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert result.code == code, result.err
    assert "Traceback" not in result.err
    assert len(errors) == 1
    assert [part for part in says if part not in errors[0]] == []


SMALL_DISK = [
    ("P48", "output-dir: out: disk full, the data needs 8.0 MB, 3.0 MB free"),
    ("F72", "output-dir: out: disk full, a new run needs 17."),
]


@pytest.mark.parametrize(("row", "says"), [pytest.param(*row, id=row[0]) for row in SMALL_DISK])
def test_too_little_room(refuse, book, tiny_model, prepared, monkeypatch, row, says):
    """What will not fit is not begun."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 3_000_000))
    flags = ["--input-path", book, *prepare_flags(tiny_model)]
    flags = flags if row == "P48" else [*train_flags(prepared), "--output-dir", "out"]
    refuse(SCRIPTS[row[0]], *flags, says=says, code=3)


HOLD = """
import sys, pathlib, utils.output_dir as output_dir
with output_dir.lock(pathlib.Path(sys.argv[1]), sys.argv[2]): print(); input()
"""


@pytest.mark.parametrize(("row", "kind"), [pytest.param(*r, id=r[0]) for r in [("P47", "prepare"), ("F57", "train")]])
def test_output_in_use(refuse, here, book, tiny_model, prepared, row, kind):
    """A folder has one writer; the second is told who the first is."""
    flags = ["--input-path", book, *prepare_flags(tiny_model)]
    flags = flags if row == "P47" else [*train_flags(prepared), "--output-dir", "out"]
    command = [sys.executable, "-c", HOLD, here / "out", kind]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        holder.stdout.readline()
        says = f"output-dir: out is in use by process {holder.pid} on {socket.gethostname()}"
        refuse(SCRIPTS[row[0]], *flags, says=says)
        holder.communicate("\n")


def test_bit_flip_in_weights_that_we_saved(refuse, here, prepared, four_steps):
    """Row F38: a run's folder has a manifest, so its model cannot be another one in silence."""
    flip_bit(shutil.copytree(four_steps, here / "model") / "model.safetensors")
    flags = [*train_flags(prepared), "--model-name", "model", "--output-dir", "run"]
    refuse("finetune_generative", *flags, says="model: model/model.safetensors is damaged: checksum differs")


TORCHRUN = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29500"}  # fmt: skip
PROCESSES = [
    ("F66-F78-F80", {"WORLD_SIZE": "4", "RANK": "0"}, "RANK is set, LOCAL_RANK is not set; start"),
    ("WORLD_SIZE", {"WORLD_SIZE": "2"}, "WORLD_SIZE is set, RANK is not set; start several processes with torchrun"),
    ("F79", {"RANK": "0"}, ("RANK is set, LOCAL_RANK is not set; start several processes with torchrun",)),
    ("LOCAL_WORLD_SIZE", {"LOCAL_WORLD_SIZE": "x"}, "LOCAL_WORLD_SIZE is 'x', expected a number"),
    ("F79-port", TORCHRUN | {"MASTER_PORT": "x"}, "MASTER_PORT is 'x', expected a number; start several"),
    ("F15", TORCHRUN | {"WORLD_SIZE": "16"}, "is less than the 16 processes; use a larger one, or fewer"),
]


@pytest.mark.parametrize("stray", [{"MASTER_PORT": "tcp://10.0.0.1:80"}, {"LOCAL_RANK": "-1"}])
def test_a_stray_variable_starts_no_processes(monkeypatch, stray):
    """Kubernetes sets MASTER_PORT for a service called master."""
    for name, value in stray.items():
        monkeypatch.setenv(name, value)
    check_processes(8)


@pytest.mark.parametrize(("environment", "says"), [pytest.param(*row, id=name) for name, *row in PROCESSES])
def test_many_processes(refuse, script, prepared, monkeypatch, environment, says):
    """Several processes are refused; row F81: the first of them speaks, the others end with the same code."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    flags = [*train_flags(prepared), "--output-dir", "run"]
    refuse("finetune_generative", *flags, says=says)
    monkeypatch.setenv("RANK", "1")
    assert script("finetune_generative", *flags) == (2, "", "")
    assert script("finetune_generative", "--epochs", 0) == (2, "", "")


HUBS = [
    ("F17", {"HF_HUB_OFFLINE": "1"}, ("model gpt2: not in the cache and HF_HUB_OFFLINE is set", "results/base_model")),
    ("F18", {"HF_HUB_OFFLINE": "0"}, ("model gpt2: not in the cache and no answer in 1 s", "results/base_model")),
]


@pytest.mark.parametrize(("environment", "says"), [pytest.param(*row, id=name) for name, *row in HUBS])
def test_hub_out_of_reach(refuse, here, prepared, monkeypatch, environment, says):
    """No network, and a hub that accepts and stays silent; tests/model/test_hub.py has more of them."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here / "hub"))
        monkeypatch.setattr("utils.model.hub.ANSWER_SECONDS", 1)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        flags = [*train_flags(prepared), "--model-name", "gpt2", "--output-dir", "run"]
        refuse("finetune_generative", *flags, says=says, code=3)


def test_local_folder_called_gpt2(script, here, book, tiny_model):
    """Row F20: it wins over the hub's, and that is said once."""
    shutil.copytree(tiny_model, here / "gpt2")
    result = script("prepare_data", "--input-path", book, *prepare_flags("gpt2"))
    assert result.code == 0
    assert result.err.count("warning: using ./gpt2, a local directory") == 1


def test_finished_run_is_left_alone(script, prepared, four_steps):
    """Row F60."""
    before = describe_files(four_steps)
    result = script("finetune_generative", *train_flags(prepared), "--save-every", 2, "--output-dir", four_steps)
    assert result.code == 0
    assert "already complete at step 4" in result.out
    assert describe_files(four_steps) == before


def other_data(here, book, tiny_model, script):
    flags = ["--input-path", book, "--seed", 7, *prepare_flags(tiny_model, "other")]
    assert script("prepare_data", *flags).code == 0
    return ["--data-dir", "other"]


def other_model(here, book, tiny_model, script):
    shutil.copytree(tiny_model, here / "other")
    return ["--model-name", "other"]


REFUSED_RESUMES = [
    ("F63", other_data, ("resume: data differs from the run's (sha256 ", " not ", "--overwrite")),
    ("F64", other_model, ("resume: --model-name other but the run has", "--overwrite")),
    ("F65-rate", ["--learning-rate", "1e-4"], "resume: --learning-rate 0.0001 but the run has 5e-05"),
    ("F65-batch", ["--batch-size", 3], "resume: --batch-size 3 but the run has 2"),
    ("F65-accumulation", ["--grad-accum-steps", 2], "resume: --grad-accum-steps 2 but the run has 1"),
    ("F65-seed", ["--seed", 1], "resume: --seed 1 but the run has 42"),
    ("F65-schedule", ["--lr-schedule", "linear"], "resume: --lr-schedule linear but the run has cosine"),
    ("F65-epochs", ["--epochs", 1], "resume: --epochs 1 but the run has 3"),
    ("F65-length", ["--max-steps", 8], "resume: --max-steps 8 but the run has 4"),
]


@pytest.mark.parametrize(("other", "says"), [pytest.param(*row, id=name) for name, *row in REFUSED_RESUMES])
def test_resume_with_other_settings(refuse, script, here, book, tiny_model, prepared, four_steps, other, says):
    """A run goes on with its own settings or not at all; the difference is named."""
    shutil.copytree(four_steps, here / "run")
    flags = other(here, book, tiny_model, script) if callable(other) else other
    flags = [*train_flags(prepared), "--save-every", 2, "--output-dir", "run", *flags]
    refuse("finetune_generative", *flags, says=says)


def test_overwrite_waits_for_good_input(refuse, here, prepared, four_steps):
    """A refused command has not removed the run that --overwrite would have replaced."""
    shutil.copytree(four_steps, here / "run")
    flags = [*train_flags(prepared), "--output-dir", "run", "--overwrite", "--model-name", "./nowhere"]
    refuse("finetune_generative", *flags, says="model: ./nowhere: no such directory")


def test_divergence(script, here, prepared):
    """Row F75: a huge learning rate ends with exit 4, its step and rate; what was saved stays good."""
    flags = [*train_flags(prepared), "--learning-rate", "1e30", "--warmup-ratio", 0, "--save-every", 1,
             "--lr-schedule", "constant"]  # fmt: skip
    result = script("finetune_generative", *flags, "--output-dir", "run")
    assert result.code == 4
    assert "Traceback" not in result.err
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "not a finite number at step " in errors[0]
    assert "(lr 1e+30)" in errors[0]
    assert "checkpoint-" in errors[0]
    assert "is safe" in errors[0]


@pytest.mark.parametrize("output", ["model", "model/run", "data", "data/train"])
def test_output_inside_an_input(refuse, model, data, output):
    """Row F82: neither the model's folder nor the data's is written to, not even with --overwrite."""
    flags = [*train_flags("data"), "--model-name", "model", "--output-dir", output, "--overwrite"]
    refuse("finetune_generative", *flags, says=("output-dir: refusing to use", output.split("/")[0]))


GOOD_SAMPLE = ["--max-new-tokens", 4, "--num-validation-prompts", 0, *PAIR]


@pytest.fixture
def write(script, pair):
    """Run generate_text on two tiny models; returns the result and the samples written."""

    def run_and_read(*flags):
        result = script("generate_text", *GOOD_SAMPLE, *flags)
        assert result.code == 0, result.err
        return result, [json.loads(line) for line in Path("tuned/samples.jsonl").open(encoding="utf-8")]

    return run_and_read


def test_empty_prompt(write):
    """Row G1: it starts from the end-of-text token."""
    samples = write("--prompt", "")[1]
    assert [sample["prompt_ids"] for sample in samples] == [[0], [0]]
    assert samples[0]["generated_ids"] == samples[1]["generated_ids"]


PROMPTS = [
    ("G3", ["--prompt", "x " * 300], ("tokens, the model takes 64; cut it or give --truncate",)),
    ("G3-long", ["--prompt", "x " * 300, "--max-new-tokens", 500], ("the model takes 64; cut it or give --truncate",)),
    ("G-file", ["--to-file", "new.txt", "--prompt", "x " * 300], "the model takes 64; cut it or give --truncate"),
    ("G-file-folder", ["--to-file", "model", "--prompt", "x"], "--to-file: model is a directory"),
    ("G-file-there", ["--to-file", "binary", "--prompt", "x"], "--to-file: binary exists already; give another name"),
    ("G-file-nowhere", ["--to-file", "no/new.txt", "--prompt", "x"], "--to-file: no: no such directory"),
    ("G8-large", ["--prompt", "x", "--top-k", 401], "--top-k must be 0 to 400, not 401"),
    ("G12", ["--prompt", "caf\udce9"], "prompt is not valid UTF-8"),
    ("G13-missing", ["--prompts-file", "prompts.txt"], "prompts.txt: no such file"),
    ("G13-folder", ["--prompts-file", "model"], "model: is a directory, expected a text file"),
    ("G13-binary", ["--prompts-file", "binary"], "binary is not text: byte 0x80 at offset 128"),
    ("G13-utf16", ["--prompts-file", "utf16"], "utf16 looks like UTF-16"),
]  # fmt: skip


MEASURING = [
    ("guard", ["--max-copy", 8], "--max-copy needs the text that the model was trained on; give its"),
    ("control-missing", ["--control-path", "control.txt"], "control.txt: no such file"),
    ("control-folder", ["--control-path", "model"], "model: is a directory, expected a text file"),
    ("control-latin", ["--control-path", "latin"], ("at offset 3 (line 1); convert it",)),
]


@pytest.mark.parametrize(("flags", "says"), [pytest.param(*row, id=name) for name, *row in MEASURING])
def test_texts_to_measure_with(refuse, here, pair, flags, says):
    """What a flag names must be there; nothing is written without it."""
    (here / "latin").write_bytes("café\n".encode("latin-1"))
    refuse("generate_text", *GOOD_SAMPLE, *flags, says=says)


@pytest.mark.parametrize(("flags", "says"), [pytest.param(*row, id=name) for name, *row in PROMPTS])
def test_prompts(refuse, here, pair, flags, says):
    """A prompt that the model cannot take is refused with the count of its tokens."""
    (here / "binary").write_bytes(bytes(range(256)))
    (here / "utf16").write_text("two\nprompts", encoding="utf-16")
    refuse("generate_text", *GOOD_SAMPLE, *flags, says=says)


def test_truncated_prompt(write):
    """Row G3: --truncate keeps the end of the prompt, half a context at least; a prompt that fits stays whole."""
    for new_tokens, kept in ((4, 60), (64, 32), (200, 32)):
        samples = write("--prompt", "x " * 300, "--truncate", "--max-new-tokens", new_tokens)[1]
        assert {len(sample["prompt_ids"]) for sample in samples} == {kept}
    whole = write("--prompt", "x " * 30, "--truncate", "--max-new-tokens", 50)[1]
    assert {len(sample["prompt_ids"]) for sample in whole} == {60}


def test_prompt_and_sample_over_the_context(write):
    """Row G2: the prompt alone has to fit into the 64 tokens."""
    samples = write("--prompt", "x " * 30, "--max-new-tokens", 150)[1]
    assert {len(sample["prompt_ids"]) for sample in samples} == {60}
    assert max(len(sample["generated_ids"]) for sample in samples) == 150


def test_prompts_file_lines(write, here):
    """A prompt is a line: only a line feed ends it, not a form feed or U+2028."""
    (here / "prompts.txt").write_text("one\u2028two\n\nthree\x0cfour\x85five\r\n", encoding="utf-8", newline="")
    samples = write("--prompts-file", "prompts.txt")[1]
    assert [s["prompt"] for s in samples[:2]] == ["one\u2028two", "three\x0cfour\x85five"]


def unfinished_save(base, tuned):
    for step in (100, 200):
        shutil.copytree(tuned, tuned / f"checkpoint-{step}")
    (tuned / "model.safetensors").unlink()


def smaller_vocabulary(base, tuned):
    from utils.data.tokenizer import train_tokenizer

    shutil.rmtree(tuned)
    make_model(tuned, base, vocab_size=390)
    train_tokenizer([TEXT * 300], 300).save_pretrained(tuned)


TUNED = [
    ("G14", lambda base, tuned: shutil.rmtree(tuned), "model: tuned: no such directory; has training finished?"),
    ("G15", unfinished_save, "model: tuned has no finished model; newest is checkpoint-200"),
    ("G16", lambda base, tuned: not_a_number(tuned), "model: tuned: transformer.wte.weight has a value that is not a"),
    ("G17", smaller_vocabulary, ("base has 400 tokens, tuned ", "; not the same family")),
    ("G18", lambda base, tuned: shutil.rmtree(base) or base.symlink_to(tuned), "base and tuned are the same directory"),
    ("G19-config", lambda base, tuned: edit_json(tuned / "config.json", model_type="t5"), "tuned is t5, not a causal"),
    ("G19-weights", lambda base, tuned: cut(tuned / "model.safetensors"), "tuned/model.safetensors is damaged ("),
    ("G19-pickle", lambda base, tuned: only_pickle(tuned), "model: tuned has only a pickle file"),
    ("G19-tokenizer", lambda base, tuned: cut(tuned / "tokenizer.json"), "tuned/tokenizer.json is damaged"),
    ("G19-base", lambda base, tuned: cut(base / "model.safetensors"), "model/model.safetensors is damaged ("),
    ("G19-run", lambda base, tuned: (tuned / "run_config.json").write_text("{"), "tuned/run_config.json is damaged"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "says"), [pytest.param(*row, id=name) for name, *row in TUNED])
def test_finetuned_folder(refuse, pair, damage, says):
    """Two folders that are not a base and what became of it are refused."""
    damage(*pair)
    refuse("generate_text", *GOOD_SAMPLE, says=says)


def test_damaged_data_in_generation(refuse, pair, data):
    """Row G19 for the held-out text."""
    rewrite_ids(400)(data)
    says = "data has token id 400; the model knows 0 to 399"
    refuse("generate_text", *GOOD_SAMPLE, "--data-dir", "data", says=says)


def test_results_are_replaced_whole(write):
    """Row G23: a second call leaves its own samples only, no quiz made of others, and no partial file."""
    write("--prompt", "The old house", "--num-samples", 3)
    Path("tuned/quiz.html").write_text("snippets of those")
    samples = write("--prompt", "Ada")[1]
    assert not Path("tuned/quiz.html").exists()
    assert "The old house" not in Path("tuned/report.md").read_text() + Path("tuned/report.html").read_text()
    assert [sample["prompt"] for sample in samples] == ["Ada", "Ada"]
    assert not list(Path("tuned").glob(".*"))


def start(*argv, **kwargs):
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | kwargs.pop("env", {})
    environment.pop("PYTHONUNBUFFERED", None)  # an error at the last flush is what a user sees
    return subprocess.run([sys.executable, *map(str, argv)], env=environment, check=False, text=True, **kwargs)


def test_terminal_without_utf8(pair):
    """Row G21: characters that the terminal lacks are replaced there, and whole in the file."""
    flags = ["--prompt", "Café 日本", "--no-do-sample", *GOOD_SAMPLE]
    done = start(ROOT / "generate_text.py", *flags, env={"PYTHONIOENCODING": "ascii"}, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "Caf? ??" in done.stdout
    assert "Café 日本" in Path("tuned/samples.jsonl").read_text(encoding="utf-8")


SPEAK = "from utils.cli import run; run(lambda: print('a line\\n' * {}))"
SPEAKERS = [["-c", SPEAK.format(1)], ["-c", SPEAK.format(100_000)], ["prepare_data.py", "--help"]]


@pytest.mark.parametrize("speaker", SPEAKERS, ids=["short", "long", "help"])
def test_reader_leaves(speaker):
    """Row G20: output into a closed pipe ends without a word."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as closed:
        done = start(*speaker, cwd=ROOT, stdout=closed, stderr=subprocess.PIPE)
    assert done.returncode in (0, 141)
    assert done.stderr == ""


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_output_is_closed(closed):
    """A stream that does not exist is no defect: the exit status tells the same."""
    for flags, code in (("--help", 0), ("--no-such-flag", 2)):
        command = f"{sys.executable} prepare_data.py {flags} {closed}"
        done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=30)
        assert (done.returncode, "Traceback" in done.stderr) == (code, False), done


@pytest.mark.parametrize("speaker", SPEAKERS, ids=["short", "long", "help"])
def test_output_is_full(speaker):
    """Row G22."""
    with open("/dev/full", "wb") as full:
        done = start(*speaker, cwd=ROOT, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 3
    assert done.stderr == "error: cannot write output: no space left on device\n"


def read_ids(folder):
    """All ids of a prepared folder in the order of the book, tails left out."""
    return load_from_disk(str(folder))["train"].with_format("numpy")["input_ids"][:].flatten().tolist()


@pytest.fixture
def prepare_whole(script, here, tiny_model):
    """Prepare a book without validation; returns its tokens as text."""
    from utils.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tiny_model)

    def prepare(content, block=2, name="book.txt"):
        Path(name).write_bytes(content)
        flags = [f"--input-path={name}", "--val-split", 0, "--overwrite", *prepare_flags(tiny_model, block=block)]
        result = script("prepare_data", *flags)
        assert result.code == 0, result.err
        return tokenizer.decode(read_ids("out"))

    return prepare


LINES = "First line.\nSecond line.\n\nThird, after a gap.\n"
ACCEPTED = [
    ("mark", b"\xef\xbb\xbf" + LINES.encode(), LINES),
    ("crlf", LINES.replace("\n", "\r\n").encode(), LINES),
    ("cr", LINES.replace("\n", "\r").encode(), LINES),
    ("no-newline", LINES.rstrip().encode(), LINES.rstrip()),
    ("separators", "a\u2028b\x0cc\x85d\u2029e\x0bf\n".encode(), "a\u2028b\x0cc\x85d\u2029e\x0bf\n"),
    ("inner-mark", "a\ufeffb\n".encode(), "a\ufeffb\n"),
    ("any-language", "Ünïcödé, 日本語, עברית, 🙂\n".encode(), "Ünïcödé, 日本語, עברית, 🙂\n"),
    ("control", b"a\tb\x07c\x1bd\n" * 9, "a\tb\x07c\x1bd\n" * 9),
]


@pytest.mark.parametrize(("content", "expected"), [pytest.param(*row, id=name) for name, *row in ACCEPTED])
def test_text_arrives_unchanged(prepare_whole, content, expected):
    """A mark at the start goes, line ends become LF, and nothing else changes."""
    text = prepare_whole(content)
    assert expected.startswith(text)
    assert len(text) >= len(expected) - 1  # an odd token at the end fills no block


def test_end_of_text_typed_in_a_book(prepare_whole):
    """Typed, it is ordinary text: the id that ends a document does not appear."""
    typed = "He wrote <|endoftext|> and went on.\n"
    assert typed.startswith(prepare_whole(typed.encode())[:-1])
    assert 0 not in read_ids("out")


def test_exactly_one_block(prepare_whole, tiny_model):
    """A text of one block's tokens is one block."""
    from utils.data.tokenizer import load_tokenizer

    n_tokens = len(load_tokenizer(tiny_model)(LINES)["input_ids"])
    assert prepare_whole(LINES.encode(), block=n_tokens) == LINES
    assert load_from_disk("out")["train"].num_rows == 1


def test_long_line_and_long_word(prepare_whole):
    """One line of 1 MB, and 200 kB without a space."""
    for text in ("word and word. " * 70_000, "abcdefghij" * 20_000):
        assert text.startswith(prepare_whole(text.encode(), block=64)[:-8])


@pytest.mark.slow
def test_very_long_line(prepare_whole):
    """One line of 30 MB, and 1 MB without a space."""
    for text in ("word and word. " * 2_000_000, "abcdefghij" * 100_000):
        assert text.startswith(prepare_whole(text.encode(), block=64)[:-8])


def test_read_only_book(script, here, book, tiny_model):
    """A book that may only be read, in a folder that may only be read."""
    shelf = here / "shelf"
    shelf.mkdir()
    shutil.copy(book, shelf / "book.txt")
    (shelf / "book.txt").chmod(0o444)
    (here / "open").mkdir(mode=0o777)
    (here / "open").chmod(0o777)
    let_others_in(shelf, tiny_model / "config.json")
    shelf.chmod(0o555)
    with ordinary_user():
        result = script("prepare_data", "--input-path", "shelf/book.txt", *prepare_flags(tiny_model, "open/out"))
    assert result.code == 0, result.err
    assert hash_file(shelf / "book.txt") == hash_file(book)


@pytest.mark.parametrize("name", ["a b.txt", 'it\'s "so".txt', "-book.txt", "--block-size.txt", "книга日本.txt"])
def test_odd_book_names(prepare_whole, name):
    """A path is taken as it is given."""
    assert LINES.startswith(prepare_whole(LINES.encode(), name=name))


def test_flag_with_underscores(refuse):
    """--block_size is --block-size, and its range holds."""
    refuse("prepare_data", "--block_size", 0, says="--block-size must be 2 to 1024, not 0")


def test_machine_error_has_code_3(refuse, book, tiny_model, monkeypatch):
    """A device that fails is not the user's input."""

    def fail(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setattr(Path, "read_bytes", fail)
    says = "book.txt: input/output error"
    refuse("prepare_data", "--input-path", book, *prepare_flags(tiny_model), says=says, code=3)


def test_every_row_has_a_case():
    """Each row of the table is named by a test's id or docstring here."""
    named = set(re.findall(r"\b[PFG][1-9]\d?\b", Path(__file__).read_text(encoding="utf-8")))
    rows = [f"{letter}{number}" for letter, last in (("P", 50), ("F", 82), ("G", 24)) for number in range(1, last + 1)]
    assert [row for row in rows if row not in named] == []
