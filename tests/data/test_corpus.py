"""Files larger than memory: read in slices and tokenized by worker processes, they give what a whole text would."""

import hashlib
import itertools
import os
import re
import shutil
import signal
import time
from collections import namedtuple

import numpy as np
import pytest
from conftest import make_book, write_segment
from counts import record_count
from forked import Child, digest_files, run_child, strays, workshop  # noqa: F401
from languages import make_text
from test_tokenizer import segment, semicolon_bpe

import utils.data.blocks as blocks
import utils.data.corpus as corpus
import utils.data.tokenizer as tokens
import utils.data.workers as workers
import utils.evaluation.memorization as memorization
from utils.data.blocks import TokenView, open_blocks, save_blocks
from utils.data.corpus import measure_books, read_segments, read_slices, split_slices
from utils.data.text import choose_validation_spans, read_book
from utils.data.tokenizer import (
    StoredTokens,
    TokenWriter,
    encode_text,
    load_tokenizer,
    pieces_are_exact,
    train_tokenizer,
)
from utils.errors import UserError
from utils.evaluation import ngrams
from utils.evaluation.ngrams import measure_leakage
from utils.storage import read_json

KILL = signal.SIGKILL
TEXTS = {
    "English": make_book(120),
    "lines": "".join(f"{i}: a line of its own.\r\n" for i in range(900)),
    "Russian": make_text("Russian", 60),
    "Chinese": make_text("Chinese", 120),
    "Thai": make_text("Thai", 60),
    "gaps": "A b.\n\n  \n\t c\r\rd \u00a0 e\u3000f\r\n" * 300 + " \n",
}


@pytest.fixture
def small_limits(monkeypatch):
    """Treat small files as large ones: small_limits(slice_bytes, margin)."""

    def set_limits(slice_bytes=700, margin=200):
        for name, value in (("WHOLE_BYTES", 1000), ("SLICE_BYTES", slice_bytes), ("MARGIN", margin)):
            monkeypatch.setattr(corpus, name, value)

    set_limits()
    return set_limits


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def children():
    """List the processes that this one has started and that still live."""
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return file.read().split()


# Slices


@pytest.mark.parametrize("slice_bytes", [7, 64, 700])
@pytest.mark.parametrize("name", TEXTS)
def test_slices_are_the_text_and_end_where_pieces_may(tmp_path, small_limits, name, slice_bytes):
    small_limits(slice_bytes)
    path, digest = write(tmp_path / "a.txt", "\ufeff" + TEXTS[name]), hashlib.sha256()
    slices = list(read_slices(path, "utf-8", digest))
    whole, book = read_book(path)
    assert "".join(slices) == whole
    assert digest.hexdigest() == book.sha256
    assert len(slices) > len(whole) / (2 * slice_bytes + 300) or name in ("Chinese", "Thai")
    for one, other in itertools.pairwise(slices):
        assert (one[-1].isspace(), other[0].isspace()) == (False, True)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1251", "utf-32"])
def test_slices_in_other_encodings(tmp_path, small_limits, encoding):
    path = write(tmp_path / "a.txt", TEXTS["Russian"].replace("\n", "\r\n"), encoding)
    assert "".join(read_slices(path, encoding, hashlib.sha256())) == read_book(path, encoding)[0]


@pytest.mark.parametrize("at", [5, 4_000, 9_999])
@pytest.mark.parametrize(
    ("bad", "encoding"), [(b"\xff", "utf-8"), (b"\0", "utf-8"), (b"\xe4\xb8", "utf-8"), (b"+2AA-", "utf-7")]
)
def test_what_is_no_text_is_refused_as_in_a_small_file(tmp_path, small_limits, monkeypatch, at, bad, encoding):
    raw = make_book(200).encode()[:10_000]
    path = tmp_path / "a.txt"
    path.write_bytes(raw[:at] + bad + raw[at:])
    with pytest.raises(UserError) as large:
        list(measure_books([path], [], encoding, None, 0))
    monkeypatch.setattr(corpus, "WHOLE_BYTES", 1 << 20)
    with pytest.raises(UserError) as small:
        list(measure_books([path], [], encoding, None, 0))
    assert str(large.value) == str(small.value)


def test_other_formats_a_text_without_spaces_and_clean_are_refused(tmp_path, small_limits, monkeypatch):
    def refusal(content, faults=None):
        path = tmp_path / "a.txt"
        path.write_bytes(content)
        with pytest.raises(UserError) as refused:
            list(measure_books([path], [], "utf-8", faults, 0))
        return str(refused.value)

    assert "is a PDF; save it as plain text" in refusal(b"%PDF" + b"a b " * 900)
    monkeypatch.setattr(corpus, "LONGEST_SLICE", 2_000)
    assert "has no end of a word in 2,100 characters; expected text with spaces" in refusal(b"a" * 5_000)
    assert "has 3,600 bytes; --clean mends files up to 1,000" in refusal(b"a b " * 900, ["quotes"])


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path, small_limits):
    path = write(tmp_path / "a.txt", make_book(100))
    slices = read_slices(path, "utf-8", hashlib.sha256())
    next(slices)
    with open(path, "a") as file:
        file.write("more of it\n" * 200)
    with pytest.raises(UserError, match="changed while it was read; try again"):
        list(slices)


@pytest.mark.parametrize("n_workers", [0, 2])
@pytest.mark.parametrize("name", TEXTS)
def test_a_large_book_is_measured_like_a_small_one(tmp_path, small_limits, name, n_workers):
    paths = [write(tmp_path / f"{i}.txt", text) for i, text in enumerate((TEXTS[name], "a small one", TEXTS[name] * 2))]
    found = [book for book, _ in measure_books(paths, paths[2:], "utf-8", None, n_workers)]
    assert found == [read_book(path, validation=path == paths[2])[1] for path in paths]


def test_some_slices_are_examined_all_over_the_file(tmp_path, small_limits, monkeypatch):
    monkeypatch.setattr(corpus, "EXAMINED", 3)
    good = make_book(400)
    third = len(good) // 3
    for at in (0, third, 2 * third):
        spoiled = good[:at] + good[at : at + third // 2].replace(" a ", " caf\u00c3\u00a9 ") + good[at + third // 2 :]
        [(_, findings)] = measure_books([write(tmp_path / "a.txt", spoiled)], [], "utf-8", None, 0)
        assert [finding.name for finding in findings] == ["mojibake"]
        assert 0 < findings[0].count < spoiled.count("\u00c3")


# Segments


@pytest.mark.parametrize("slice_bytes", [300, 5_000, 10**6])
@pytest.mark.parametrize("name", TEXTS)
def test_segments_of_a_large_book_do_not_depend_on_the_slices(tmp_path, small_limits, name, slice_bytes):
    text = TEXTS[name].replace("\r\n", "\n").replace("\r", "\n")
    path = write(tmp_path / "a.txt", text)
    spans = [(a + 50, b + 50) for a, b in choose_validation_spans(len(text), 0.2, 3)]

    def joined(size):
        small_limits(size)
        parts = list(split_slices(read_slices(path, "utf-8", hashlib.sha256()), 4, 50, len(text), spans))
        assert "".join(part.text for part in parts) == text
        assert all(text[part.start : part.end] == part.text and part.book_index == 4 for part in parts)
        assert not parts[0].continues
        for one, other in itertools.pairwise(parts):
            assert one.end == other.start
            assert other.continues == (one.split == other.split)
        starts = [part for part in parts if not part.continues]
        ends = [part.start for part in starts[1:]] + [len(text)]
        return [(part.split, part.start, end) for part, end in zip(starts, ends, strict=True)]

    found = joined(slice_bytes)
    assert found == joined(450)
    validation = [(start, end) for split, start, end in found if split == "validation"]
    assert len(validation) == len(spans)
    for (start, end), (a, b) in zip(validation, spans, strict=True):
        assert max(abs(start - a + 50), abs(end - b + 50)) <= 200
        if name == "English":
            assert text[start - 2 : start] == text[end - 2 : end] == "\n\n"


def test_whole_large_books_for_validation_and_for_training(tmp_path, small_limits):
    paths = [write(tmp_path / f"{name}.txt", TEXTS[name]) for name in ("English", "Russian")]
    books = [book for book, _ in measure_books(paths, paths[1:], "utf-8", None, 0)]
    parts = list(read_segments(books, "utf-8", 0.1, 1))
    assert len(parts) > 10
    for index, split in enumerate(("train", "validation")):
        mine = [part for part in parts if part.book_index == index]
        assert {part.split for part in mine} == {split}
        assert [part.continues for part in mine] == [False] + [True] * (len(mine) - 1)
    books[1] = books[1].__class__(paths[1], "0" * 64, *(books[1].n_chars, books[1].n_bytes, books[1].n_words), True)
    with pytest.raises(UserError, match=r"Russian\.txt changed while it was read"):
        list(read_segments(books, "utf-8", 0.1, 1))


# The whole script


@pytest.fixture
def prepare(script, tiny_model, tmp_path, small_limits):
    """Prepare a large book and a small one: prepare('--flag', value, to='blocks') -> code, out, err."""
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder / "a.txt", make_book(120))
    write(folder / "b.txt", "A small book.\n\nIt has two lines.\n")
    write(folder / "c.txt", make_text("Russian", 40))

    def run_prepare(*flags, to="blocks", model=tiny_model):
        given = ["--input-path", folder, "--block-size", 32, "--output-dir", tmp_path / to]
        return script("prepare_data", *given, *(["--model-name", model] if model else []), *flags)

    return run_prepare


@pytest.mark.parametrize("extra", [["--val-split", 0], ["--train-tokenizer", 300]], ids=["all", "learned"])
def test_any_number_of_workers_gives_the_same_bytes(prepare, tmp_path, extra):
    model = {"model": None} if "--train-tokenizer" in extra else {}
    for n in (0, 1, 3):
        result = prepare("--num-workers", n, *extra, to=f"blocks{n}", **model)
        assert (result.code, children()) == (0, []), result.err
        assert digest_files(tmp_path / f"blocks{n}") == digest_files(tmp_path / "blocks0")
    assert "examined  32 or more parts of 2 MB of a.txt and 1 more\n" in result.out


@pytest.mark.parametrize("slice_bytes", [90, 700, 4_000])
@pytest.mark.parametrize("language", ["English", "Russian", "Chinese", "Thai", "gaps"])
def test_tokens_are_those_of_the_whole_segments(tmp_path, small_limits, language, slice_bytes):
    small_limits(slice_bytes)
    path = write(tmp_path / "a.txt", TEXTS[language])
    whole, tokenizer = read_book(path)[0], train_tokenizer([TEXTS["English"] + TEXTS[language]], 600)
    books = [book for book, _ in measure_books([path], [], "utf-8", None, 0)]
    writer = TokenWriter(tmp_path, tokenizer)
    parts = list(read_segments(books, "utf-8", 0.1, 1))
    for part in parts:
        write_segment(writer, part)
    stored = {split: ids[:] for split, ids in writer.open_tokens().items()}
    assert len(writer.spans) < len(parts)
    for span in writer.spans:
        text = whole[slice(*span["chars"])]
        assert stored[span["split"]][slice(*span["tokens"])].tolist() == encode_text(tokenizer, [text])
        assert span["bytes"] == len(text.encode())


def test_workers_agree_on_a_tokenizer_that_forbids_pieces_late(tmp_path, monkeypatch):
    """Pieces are given up while workers hold segments that they were told to tokenize in pieces."""
    monkeypatch.setattr(tokens, "PIECE_CHARS", 60)
    tokenizer, verse = semicolon_bpe()
    plain = make_book(20).replace(";", ",")
    segments = [segment(text) for text in [plain, plain, verse, plain + verse * 9, plain, verse]]
    assert [pieces_are_exact(tokenizer, s.text) for s in segments] == [True, True, False, True, True, False]
    for n in (0, 2):
        (tmp_path / str(n)).mkdir()
        writer = TokenWriter(tmp_path / str(n), tokenizer)
        with workers.open_workers(writer.encode, n) as run_all:
            for (each, in_pieces), encoded in run_all((each, writer.exact) for each in segments):
                writer.append(each, in_pieces, *encoded)
        stored = writer.open_tokens()["train"][:]
        for each, span in zip(segments[2:], writer.spans[2:], strict=True):
            assert stored[slice(*span["tokens"])].tolist() == encode_text(tokenizer, [each.text])


# Workers that end too early


def encode_or(act, start):
    """Return a form of TokenWriter.encode that does something else from a character on."""
    encode = TokenWriter.encode

    def encode_or_act(self, item):
        if item[0].start > start:
            act()
        return encode(self, item)

    return encode_or_act


def limits():
    """In a child: treat small files as large ones."""
    corpus.WHOLE_BYTES, corpus.SLICE_BYTES, corpus.MARGIN = 1000, 300, 100


def test_a_killed_worker_is_one_line_and_leaves_nothing(prepare, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(TokenWriter, "encode", encode_or(lambda: os.kill(os.getpid(), KILL), 4_000))
        code, _, err = prepare("--num-workers", 2)
    assert code == 3
    line = re.sub(r".*[\r\n](?=error)", "", err, flags=re.DOTALL)
    assert line == "error: a worker process was killed (out of memory?); use less than --num-workers 2\n"
    assert children() == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
    assert prepare("--num-workers", 2).code == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, KILL])
def test_however_the_main_process_ends_its_workers_end_too(workshop, tmp_path, number):  # noqa: F811
    """Stopped or killed in the middle, by a signal to it alone; the same command then gives the same files."""
    out, pids = tmp_path / "out", tmp_path / "pids"
    pids.mkdir()

    def hang():
        (pids / str(os.getpid())).touch()
        time.sleep(60)

    def hang_soon():
        limits()
        TokenWriter.encode = encode_or(hang, 1_500)

    command = workshop.prepare(out, "--num-workers", 2)
    child = Child(*command, prepare=hang_soon)
    wait_until(lambda: len(list(pids.iterdir())) == 2)
    child.kill(number)
    ended = child.wait()
    assert ended.code == (-number if number == KILL else 128 + number), ended.err
    assert "Traceback" not in ended.err
    wait_until(lambda: not any(is_alive(path.name) for path in pids.iterdir()))
    assert out.exists() == (number == KILL)
    again, reference = run_child(*command, prepare=limits), tmp_path / "reference"
    assert again.code == 0, again.err
    assert run_child(*workshop.prepare(reference, "--num-workers", 0), prepare=limits).code == 0
    assert digest_files(out) == digest_files(reference)
    assert not strays(out)


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_killed_at_any_time_it_ends_as_if_undisturbed(workshop, tmp_path, amount):  # noqa: F811
    out, rng = tmp_path / "out", np.random.default_rng()
    command = workshop.prepare(out, "--num-workers", 2)
    started = time.monotonic()
    assert run_child(*command, prepare=limits).code == 0
    seconds, wanted = time.monotonic() - started, digest_files(out)
    for _ in range(count := amount(1, 100)):
        shutil.rmtree(out)
        for _ in range(2):
            child = Child(*command, prepare=limits)
            time.sleep(rng.random() * seconds)
            child.kill()
            child.wait()
        assert run_child(*command, prepare=limits).code == 0
        assert digest_files(out) == wanted
        assert not strays(out)
    record_count("corpus", kills=2 * count)


def test_a_workers_own_error_arrives_as_it_was():
    def refuse(number):
        if number == 3:
            raise UserError(f"{number} is odd", 4)
        return number * 2

    for n in (0, 1, 3):
        with workers.open_workers(refuse, n) as run_all:
            assert list(run_all([0, 2, 4] * 9)) == [(0, 0), (2, 4), (4, 8)] * 9
        with pytest.raises(UserError, match="3 is odd") as raised, workers.open_workers(refuse, n) as run_all:
            list(run_all([0, 2, 4, 3]))
        assert raised.value.code == 4
    assert children() == []


def test_items_are_taken_only_a_few_ahead():
    taken = []
    with workers.open_workers(abs, 2) as run_all:
        for item, _ in run_all(taken.append(i) or i for i in range(100)):
            assert len(taken) <= item + 6
    assert len(taken) == 100


def test_small_texts_need_no_workers(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(3), raising=False)
    assert [workers.choose_workers(size) for size in (10**6, 1 << 26, 1 << 27)] == [0, 0, 3]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(99), raising=False)
    assert workers.choose_workers(1 << 27) == 8


# Blocks and figures of a large corpus


@pytest.mark.parametrize("start", [[], [7]])
def test_blocks_in_several_files_are_those_of_one(tmp_path, monkeypatch, start):
    ids = np.random.default_rng(0).integers(0, 60_000, 1_003).astype(np.uint16)
    ids.tofile(tmp_path / "ids")
    splits = {"train": StoredTokens(tmp_path / "ids", ids.dtype, len(ids)), "validation": ids[:0]}
    monkeypatch.setattr(blocks, "SHARD_BYTES", 500)
    save_blocks(splits, 8, tmp_path / "blocks", start)
    names = [entry["filename"] for entry in read_json(tmp_path / "blocks/train/state.json")["_data_files"]]
    assert len(names) == 1003 // (8 - len(start)) * 16 // 500 + 1
    assert names == sorted(path.name for path in (tmp_path / "blocks/train").glob("*.arrow"))
    found = blocks.datasets.load_from_disk(str(tmp_path / "blocks"))
    rows = ids[: 1003 // (8 - len(start)) * (8 - len(start))].reshape(-1, 8 - len(start)).tolist()
    assert found["train"].with_format(None)["input_ids"][:] == [start + row for row in rows]
    assert len(found["validation"]) == 0
    view = TokenView(found["train"].data.table.column("input_ids"), 8, len(start))
    whole = [i for row in rows for i in row]
    assert len(view) == len(whole)
    for a, b in [(0, None), (0, 0), (0, 1), (5, 6), (3, 700), (13, 14), (990, 5_000), (2_000, 3_000), (20, 10)]:
        assert view[a:b].tolist() == whole[a:b]


def test_stored_tokens_are_read_by_slices(tmp_path):
    ids = np.arange(50, dtype=np.uint32)
    ids.tofile(tmp_path / "ids")
    stored = StoredTokens(tmp_path / "ids", ids.dtype, 50)
    for a, b in [(0, None), (3, 9), (9, 3), (49, 99), (60, 70)]:
        assert stored[a:b].tolist() == ids[a:b].tolist()


@pytest.mark.parametrize("n_workers", [0, 2])
def test_leakage_of_a_large_corpus_is_estimated(monkeypatch, n_workers):
    rng = np.random.default_rng(1)
    train, validation = (rng.integers(0, 900, n).astype(np.uint16) for n in (60_000, 20_000))
    validation[5_000:10_000] = train[20_000:25_000]
    train[40_000:50_000] = train[:10_000]
    exact = measure_leakage(train, validation)
    assert (exact["leaked_ngrams"], "one_in" in exact) == (4_969, False)
    monkeypatch.setattr(ngrams, "keep_one_in", lambda n: 1 + n // 10_000)
    monkeypatch.setattr(ngrams, "CHUNK", 7_000)
    found = measure_leakage(train, validation, n_workers)
    assert (found["one_in"], found["validation_ngrams"]) == (7, exact["validation_ngrams"])
    assert found["leaked_ngrams"] == pytest.approx(4_969, rel=0.1)
    assert found["repeated_share"] == pytest.approx(exact["repeated_share"], rel=0.1)


def test_a_sampled_corpus_says_so(prepare, monkeypatch):
    monkeypatch.setattr(ngrams, "keep_one_in", lambda n: 4)
    monkeypatch.setattr("prepare_data.TOKENIZER_CHARS", 5_000)
    out = prepare("--train-tokenizer", 300, model=None).out
    assert out.count("(estimated from one in 4)") == 2
    assert re.search(r"tokens from one in \d pieces of the training text", out)


def test_a_tokenizer_is_the_same_whether_learned_from_pieces_or_not():
    text = make_book(600) + TEXTS["Russian"]
    whole, again = train_tokenizer([text], 500), train_tokenizer([text[:20_000], text[20_000:]], 500)
    assert whole.get_vocab() == again.get_vocab()
    assert train_tokenizer([text], 500, 3).get_vocab() != whole.get_vocab()


def test_prompts_and_copying_of_a_large_corpus_look_at_a_part(prepared, tiny_model, monkeypatch, capsys):
    data, tokenizer = open_blocks(prepared), load_tokenizer(prepared / "tokenizer")
    everywhere = data.validation_prompts(tokenizer, 500, 4, 4)
    monkeypatch.setattr(blocks, "PROMPT_TOKENS", len(data.ids("validation")) // 2)
    assert 0 < len(data.validation_prompts(tokenizer, 500, 4, 4)) < len(everywhere)
    monkeypatch.setattr(memorization, "MONITOR_TRAIN", 100)
    model = namedtuple("Model", "config")(namedtuple("Config", "to_dict")(lambda: {"n_positions": 64}))
    monitor = memorization.CopyMonitor(data, model, tokenizer, 2, None, 1)
    assert len(monitor.train) == 100
    said = f"copying is measured against the first 100 of {len(data.ids('train')):,} training tokens\n"
    assert capsys.readouterr().out == said
