"""Blocks: what is stored is the text, positions in it are found again, batches are arithmetic."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_book
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from utils.data.blocks import BatchOrder, Blocks, open_blocks, pick_evenly
from utils.data.text import choose_validation_spans, read_book, split_book
from utils.data.tokenizer import load_tokenizer
from utils.errors import UserError
from utils.storage import MANIFEST, read_json, write_sealed

SPLITS = ("train", "validation")


@pytest.fixture(scope="module")
def three_books(tmp_path_factory, prepare, tiny_model):
    """Return the paths of three books and the folder prepared from them; the first ends in validation."""
    root = tmp_path_factory.mktemp("three")
    first = make_book(90)
    second = "\n\n".join(
        f"Caf\u00e9 {i}: \U0001f44b the {i * 7 % 50} gulls.\u00a0 Typed <|endoftext|>!" for i in range(70)
    )
    paths = [root / name for name in ("c.txt", "a.txt", "b.txt")]
    for path, text in zip(paths, [first, second, make_book(60)[::-1]], strict=True):
        path.write_text(text, encoding="utf-8")
    folder = prepare(root / "blocks", paths, tiny_model, "--block-size", 16, "--val-split", 0.25, "--seed", 49)
    return paths, folder


@pytest.fixture(scope="module")
def prepare():
    """Run prepare_data.py: prepare(output_dir, books, model, *flags) -> output_dir."""
    import prepare_data

    def run_prepare(folder, books, model, *flags):
        argv = ["--output-dir", folder, "--model-name", model, *flags, "--input-path", *books]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["prepare_data.py", *map(str, argv)])
            prepare_data.main(prepare_data.parse_args())
        return folder

    return run_prepare


def stream_of(blocks, split):
    """Return the stored tokens of a split, its blocks end to end."""
    return getattr(blocks, split)[:]["input_ids"].flatten().tolist()


def check_text(folder, paths, tokenizer):
    """Decode every segment's span and compare it with the book; return how many tokens were left out."""
    blocks, texts = open_blocks(folder), [read_book(path)[0] for path in paths]
    left_out, checked = 0, 0
    for split in SPLITS:
        stream = stream_of(blocks, split)
        for span in blocks.manifest["spans"]:
            if span["split"] != split:
                continue
            a, b = span["tokens"]
            text = texts[span["book"]][slice(*span["chars"])]
            assert span["bytes"] == len(text.encode())
            decoded = tokenizer.decode(stream[a:b])
            if b <= len(stream):
                assert decoded == text
                checked += 1
            else:
                assert text.startswith(decoded.rstrip("\ufffd"))
                left_out += b - max(a, len(stream))
    assert checked >= len(blocks.manifest["spans"]) - 2
    return left_out


# What is stored


def test_decoding_gives_back_every_segment(prepared, book, tiny_model):
    left_out = check_text(prepared, [book], load_tokenizer(tiny_model))
    assert left_out == sum(s["tail_tokens"] for s in read_json(prepared / MANIFEST)["splits"].values())


def test_decoding_gives_back_every_segment_of_three_books(three_books, tiny_model):
    paths, folder = three_books
    check_text(folder, paths, load_tokenizer(tiny_model))


def test_the_segments_are_those_chosen_over_all_books(three_books):
    texts = [read_book(path)[0] for path in three_books[0]]
    offsets = [0, *itertools.accumulate(map(len, texts))]
    intervals = choose_validation_spans(offsets.pop(), 0.25, 49)
    planned = [p for i, text in enumerate(texts) for p in split_book(text, i, offsets[i], intervals)]
    spans = read_json(three_books[1] / MANIFEST)["spans"]
    assert [(s["split"], s["book"], *s["chars"]) for s in spans] == [
        (p.split, p.book_index, p.start, p.end) for p in planned
    ]


def test_end_of_text_stands_exactly_between_books(three_books, tiny_model):
    _, folder = three_books
    blocks, eos = open_blocks(folder), load_tokenizer(tiny_model).eos_token_id
    spans = blocks.manifest["spans"]
    lasts = [[s for s in spans if s["book"] == index][-1] for index in range(3)]
    assert {s["split"] for s in lasts[:2]} == {"train", "validation"}, "the fixture tries both"
    for split in SPLITS:
        expected = [s["tokens"][1] for s in lasts[:2] if s["split"] == split]
        stream = stream_of(blocks, split)
        assert [position for position, token in enumerate(stream) if token == eos] == expected
        # Nothing else stands between the segments.
        mine = [s["tokens"] for s in spans if s["split"] == split]
        for (_, end), (start, _) in itertools.pairwise(mine):
            assert start == end + (end in expected)


@pytest.mark.parametrize("which", ["one", "three"])
def test_blocks_open_as_tensors_and_counts_agree(which, prepared, three_books):
    from datasets import load_from_disk

    folder = prepared if which == "one" else three_books[1]
    manifest = read_json(folder / MANIFEST)
    size = manifest["block_size"]
    opened, ends = load_from_disk(str(folder)).with_format("torch"), 0
    assert sorted(opened) == ["train", "validation"]
    assert opened["train"].column_names == ["input_ids"]
    for split in SPLITS:
        counts, ids = manifest["splits"][split], opened[split][:]["input_ids"]
        assert ids.dtype == torch.int64
        assert ids.shape == (counts["blocks"], size)
        assert counts["blocks"] * size + counts["tail_tokens"] == counts["tokens"]
        assert 0 <= counts["tail_tokens"] < size
        spans = [s for s in manifest["spans"] if s["split"] == split]
        assert counts["segments"] == len(spans)
        assert counts["chars"] == sum(b - a for a, b in (s["chars"] for s in spans))
        assert counts["bytes"] == sum(s["bytes"] for s in spans)
        ends += counts["tokens"] - sum(b - a for a, b in (s["tokens"] for s in spans))
        assert ids.max() < manifest["tokenizer"]["size"]
    assert ends == len(manifest["books"]) - 1
    chars = sum(manifest["splits"][split]["chars"] for split in SPLITS)
    assert chars == sum(b["chars"] for b in manifest["books"])


def test_validation_and_training_share_no_character(three_books, prepared, book):
    for folder, paths in ((prepared, [book]), (three_books[1], three_books[0])):
        texts = [read_book(path)[0] for path in paths]
        taken = [np.zeros(len(text), int) for text in texts]
        for span in read_json(folder / MANIFEST)["spans"]:
            taken[span["book"]][slice(*span["chars"])] += 1
        assert all((t == 1).all() for t in taken)


def test_no_paragraph_of_validation_stands_in_training(prepared, tiny_model):
    """The book repeats no paragraph, so no validation paragraph may be in the training blocks."""
    blocks, tokenizer = open_blocks(prepared), load_tokenizer(tiny_model)
    text = {split: tokenizer.decode(stream_of(blocks, split)) for split in SPLITS}
    validation = text["validation"].split("\n\n")
    assert len(validation) > 15
    assert not [p for p in validation[:-1] if p in text["train"]]  # the last is cut off by the tail
    assert blocks.manifest["leakage"]["leaked_ngrams"] == 0


# Places


def blocks_of_segments(n_segments, n_tokens, block_size=4):
    """Return Blocks whose validation is n_segments of n_tokens, counting up from 0: an id is its own position."""
    rows = np.arange(n_segments * n_tokens // block_size * block_size).reshape(-1, block_size)
    spans = [{"split": "validation", "tokens": [i * n_tokens, (i + 1) * n_tokens]} for i in range(n_segments)]
    validation = Dataset.from_dict({"input_ids": rows.tolist()}).with_format("torch")
    return Blocks(Path(), {"block_size": block_size, "spans": spans, "tokenizer": {}}, None, validation)


class Spelling:
    """Stands in for a tokenizer: the ids named decode to what is said, all others to a word."""

    def __init__(self, said=()):
        self.said = dict(said)

    def batch_decode(self, rows):
        return list(map(self.decode, rows))

    def decode(self, ids):
        return "".join(self.said.get(token, " word") for token in ids)


@pytest.mark.parametrize("which", ["one", "three"])
def test_ids_are_the_rows_end_to_end(which, prepared, three_books):
    blocks = open_blocks(prepared if which == "one" else three_books[1])
    for split in SPLITS:
        assert blocks.ids(split).tolist() == stream_of(blocks, split)


def test_spans_end_where_the_blocks_do(three_books):
    blocks = open_blocks(three_books[1])
    for split in SPLITS:
        spans, n_ids = blocks.spans(split), len(blocks.ids(split))
        assert [span for *_, span in spans] == [s for s in blocks.manifest["spans"] if s["split"] == split]
        assert [(a, b) for a, b, _ in spans] == [(s["tokens"][0], min(s["tokens"][1], n_ids)) for *_, s in spans]
    assert [b for _, b, _ in blocks_of_segments(5, 11).spans("validation")] == [11, 22, 33, 44, 52]


@settings(max_examples=60, deadline=None)
@given(n_values=st.integers(0, 60), count=st.integers(0, 70))
def test_picked_values_are_spread(n_values, count):
    picked = pick_evenly(list(range(n_values)), count)
    assert len(picked) == min(count, n_values)
    gaps = [b - a for a, b in itertools.pairwise([*picked, n_values])]
    assert not picked or (picked[0] == 0 and max(gaps) - min(gaps) <= 1 and min(gaps) > 0)


@pytest.mark.parametrize("length", [1, 4, 5, 12, 13])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 7, 999])
def test_windows_lie_within_segments_without_overlap(length, count):
    found = [ids.tolist() for ids in blocks_of_segments(5, 12).windows("validation", length, count)]
    assert len(found) == min(count, 5 * (12 // length))
    assert all(ids == list(range(ids[0], ids[0] + length)) for ids in found)
    assert all(ids[0] // 12 == ids[-1] // 12 for ids in found), "within a segment"
    positions = [position for ids in found for position in ids]
    assert positions == sorted(set(positions)), "in the book's order, none twice"
    if count >= 5 and found:
        assert {ids[0] // 12 for ids in found} == set(range(5)), "from every segment"


def test_windows_are_text_of_the_books(three_books, tiny_model):
    paths, folder = three_books
    blocks, tokenizer = open_blocks(folder), load_tokenizer(tiny_model)
    texts = [read_book(path)[0] for path in paths]
    for split in SPLITS:
        segments = [texts[span["book"]][slice(*span["chars"])] for *_, span in blocks.spans(split)]
        found = tokenizer.batch_decode(blocks.windows(split, 24, 20))
        assert len(found) == 20
        assert all(any(text.strip("\ufffd") in segment for segment in segments) for text in found)


def test_a_training_ngram_is_located_in_its_book(three_books, tiny_model):
    """From the named character to the segment's end, the book has what the tokens from that position on decode to."""
    paths, folder = three_books
    blocks, tokenizer = open_blocks(folder), load_tokenizer(tiny_model)
    texts, ids, seen = [read_book(path)[0] for path in paths], blocks.ids("train"), set()
    for a, b, span in blocks.spans("train"):
        book, (first, last), is_whole = texts[span["book"]], span["chars"], b == span["tokens"][1]
        for position in {a, a + 1, b - 9, *range(a, b - 9, 61)}:
            rest = tokenizer.decode(ids[position:b])
            if rest.startswith("\ufffd"):  # in the middle of a character
                continue
            found = blocks.locate(position, 9, tokenizer)
            char = found["char"]
            assert book[char:last] == rest if is_whole else book[char:last].startswith(rest.rstrip("\ufffd"))
            assert (found["tokens"], found["book"]) == (9, paths[span["book"]].name)
            assert found["share"] == char / len(book)
            ngram = tokenizer.decode(ids[position : position + 9])
            assert found["text"] == ngram.rstrip("\ufffd")  # the rest of a cut character stands in "after"
            assert book[first:char].endswith(found["before"].lstrip("\ufffd")), "from this segment"
            assert (found["before"] == "") == (position == a)
            assert (found["after"] == "") == (position + 9 == b)
            assert book[char:last].startswith(found["text"] + found["after"])
            seen.add(found["book"])
    assert seen == {path.name for path in paths}


def positions_of(ngram, stream):
    return [i for i in range(len(stream) - len(ngram) + 1) if stream[i : i + len(ngram)] == ngram]


@pytest.mark.parametrize("count", [1, 3, 25])
def test_prompts_are_the_beginnings_of_validation_paragraphs(three_books, tiny_model, count):
    blocks, tokenizer = open_blocks(three_books[1]), load_tokenizer(tiny_model)
    stream, spans, begins = stream_of(blocks, "validation"), blocks.spans("validation"), []
    pairs = blocks.validation_prompts(tokenizer, count, 11, 9)
    assert len(pairs) == count
    for ids, following in pairs:
        assert 8 <= len(ids) <= 11
        assert len(ids + following) == 20
        assert "\ufffd" not in tokenizer.decode(ids)
        [position] = positions_of(ids + following, stream)
        [start] = [a for a, b, _ in spans if a <= position and position + 20 <= b]
        before = tokenizer.decode(stream[start:position])
        assert before.strip("\n") == "" or before.endswith("\n\n"), before
        assert position == start or not tokenizer.decode(ids).startswith("\n")
        begins.append(position)
    assert begins == sorted(set(begins))
    assert count < 3 or len({a for a, b, _ in spans for i in begins if a <= i < b}) > 1, "from more than one segment"


@pytest.mark.parametrize(("count", "chosen"), [(0, []), (1, [0]), (2, [0, 2]), (3, [0, 1, 3]), (5, [0, 1, 2, 3, 4])])
def test_prompts_are_spread_over_the_segments(count, chosen):
    pairs = blocks_of_segments(5, 12).validation_prompts(Spelling(), count, 3, 6)
    starts = [12 * i for i in chosen]
    assert pairs == [(list(range(s, s + 3)), list(range(s + 3, s + 9))) for s in starts]


def starts_of(pairs):
    return [ids[0] for ids, _ in pairs]


def test_prompts_start_at_paragraphs_then_lines_then_sentences_then_any_token():
    """Segments of 12 tokens, where a validation prompt of 9 may begin at the first 4."""
    blocks = blocks_of_segments(5, 12)
    paragraphs = {1: "\n", 2: "\n", 13: ".\n\n", 50: "\n", 51: "\n"}  # 52 is too late for a validation prompt
    lines = {24: " \n", 37: "\n"}
    sentences = {25: '?"', 38: ".", 48: ".", 49: "dot", 39: "3.5"}  # 49 does not begin with a space
    spelling = Spelling(paragraphs | lines | sentences)
    assert starts_of(blocks.validation_prompts(spelling, 7, 3, 6)) == [0, 3, 12, 14, 24, 36, 48]
    assert starts_of(blocks.validation_prompts(spelling, 8, 3, 6)) == [0, 3, 12, 14, 24, 25, 36, 38]
    assert starts_of(blocks.validation_prompts(spelling, 9, 3, 6)) == [0, 3, 12, 14, 24, 25, 36, 38, 48]
    assert starts_of(blocks.validation_prompts(spelling, 10, 3, 6)) == [
        0,
        3,
        12,
        14,
        24,
        25,
        26,
        36,
        38,
        48,
    ]  # lines too
    anywhere = [12 * i + k for i in range(5) for k in range(4)]
    assert starts_of(blocks.validation_prompts(spelling, 20, 3, 6)) == anywhere
    assert starts_of(blocks.validation_prompts(spelling, 999, 3, 6)) == anywhere
    assert starts_of(blocks.validation_prompts(Spelling({13: ".", 14: "word", 25: "!\u201d"}), 6, 3, 6)) == [
        0,
        12,
        24,
        26,
        36,
        48,
    ]


LLAMA = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]


@pytest.mark.parametrize(
    "decoder",
    [decoders.Sequence(LLAMA), decoders.Metaspace(), decoders.ByteLevel()],
    ids=["Llama", "Metaspace", "GPT-2"],
)
def test_sentences_are_found_whatever_a_decoder_does_to_the_first_space(decoder):
    space = "\u0120" if isinstance(decoder, decoders.ByteLevel) else "\u2581"
    said = {13: ".", 25: "3.5", 38: "?", 39: "dot"}
    rust = Tokenizer(models.WordLevel({said.get(i, f"{space}word{i}"): i for i in range(60)}, unk_token="."))
    rust.decoder = decoder
    pairs = blocks_of_segments(5, 12).validation_prompts(PreTrainedTokenizerFast(tokenizer_object=rust), 6, 3, 6)
    assert starts_of(pairs) == [0, 12, 14, 24, 36, 48]


def test_no_prompt_reaches_over_the_end_of_a_segment():
    assert blocks_of_segments(5, 11).validation_prompts(Spelling(), 2, 3, 9) == []
    # 55 tokens in blocks of 4: the last 3 were left out, so the last segment has 8.
    for next_tokens, last in ((5, 44), (6, 35)):
        pairs = blocks_of_segments(5, 11).validation_prompts(Spelling(), 99, 3, next_tokens)
        assert all(ids + after == list(range(ids[0], ids[0] + 3 + next_tokens)) for ids, after in pairs)
        assert all(ids[0] // 11 == after[-1] // 11 for ids, after in pairs)
        assert starts_of(pairs)[-1] == last
        assert len(pairs) == 4 * (11 - 3 - next_tokens + 1) + (last == 44)
    assert len(blocks_of_segments(5, 11).validation_prompts(Spelling(), 5, 3, 5)) == 5


# Opening a folder


def test_a_data_folder_is_opened_as_it_was_written(prepared):
    blocks = open_blocks(prepared)
    assert blocks.block_size == 32
    assert all(getattr(blocks, split)[:]["input_ids"].dtype == torch.int64 for split in SPLITS)
    counts = blocks.manifest["splits"]["validation"]
    assert blocks.bytes_per_token == counts["bytes"] / counts["tokens"]
    ids = [token for split in SPLITS for token in stream_of(blocks, split)]
    assert blocks.id_range() == (min(ids), max(ids))


@pytest.mark.parametrize("position", [0, 0.3, 0.5, 0.9, -1])
@pytest.mark.parametrize("split", SPLITS)
def test_a_flipped_bit_is_refused(prepared, tmp_path, split, position):
    folder = shutil.copytree(prepared, tmp_path / "blocks")
    [path] = (folder / split).glob("*.arrow")
    raw = bytearray(path.read_bytes())
    raw[int(position * len(raw)) if position >= 0 else -1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match=rf"{split}/data.*arrow is damaged: checksum differs; run prepare_data.py"):
        open_blocks(folder)


@pytest.mark.parametrize("kept", [0, 1, 8, 0.5, -8, -1])
def test_a_cut_file_is_refused(prepared, tmp_path, kept):
    folder = shutil.copytree(prepared, tmp_path / "blocks")
    [path] = (folder / "train").glob("*.arrow")
    raw = path.read_bytes()
    cut = raw[: int(kept * len(raw)) if isinstance(kept, float) else kept]
    path.write_bytes(cut)
    with pytest.raises(UserError, match=rf"damaged: {len(cut)} bytes, expected {len(raw)}"):
        open_blocks(folder)


def test_a_missing_file_is_refused(prepared, tmp_path):
    folder = shutil.copytree(prepared, tmp_path / "blocks")
    (folder / "dataset_dict.json").unlink()
    with pytest.raises(UserError, match=r"dataset_dict.json is missing"):
        open_blocks(folder)


def test_a_folder_between_two_preparations_is_refused(prepared, tmp_path):
    """Its files are those of before, whole, under the new manifest: the counts would be of another text."""
    folder = shutil.copytree(prepared, tmp_path / "blocks")
    manifest = read_json(folder / MANIFEST)
    changed = {"files": {"train/data": {"bytes": 1, "sha256": "0"}}, "replaces": manifest["files"]}
    write_sealed(folder, manifest | changed)
    with pytest.raises(UserError, match="its preparation was cut short"):
        open_blocks(folder)


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (1, r"data: .*blocks has format 1, expected 2; run prepare_data.py again with --overwrite"),
        (3, r"data: format 3 is newer than this program \(2\)"),
    ],
)
def test_another_format_is_refused(prepared, tmp_path, made, says):
    folder = shutil.copytree(prepared, tmp_path / "blocks")
    write_sealed(folder, read_json(folder / MANIFEST) | {"format": made})
    with pytest.raises(UserError, match=says):
        open_blocks(folder)


def test_a_data_folder_without_training_blocks_is_refused(prepared, tmp_path):
    folder = shutil.copytree(prepared, tmp_path / "blocks")
    manifest = read_json(folder / MANIFEST)
    manifest["splits"]["train"]["blocks"] = 0
    write_sealed(folder, manifest)
    with pytest.raises(UserError, match="has no training blocks"):
        open_blocks(folder)


# Batches


@settings(max_examples=60, deadline=None)
@given(
    n_blocks=st.integers(1, 50),
    batch_size=st.integers(1, 60),
    grad_accum_steps=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
    first_step=st.integers(0, 40),
)
def test_every_block_once_an_epoch_from_any_step(n_blocks, batch_size, grad_accum_steps, seed, first_step):
    settings_ = (n_blocks, batch_size, grad_accum_steps, seed)
    order = BatchOrder(*settings_)
    for epoch in range(3):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        updates = [order.step_batches(step) for step in steps]
        assert sorted(n for update in updates for batch in update for n in batch) == list(range(n_blocks))
        for update in updates:
            assert 1 <= len(update) <= grad_accum_steps
            assert all(len(batch) == batch_size for batch in update[:-1])
            assert 1 <= len(update[-1]) <= batch_size
        full = batch_size * grad_accum_steps
        assert all(sum(map(len, update)) == full for update in updates[:-1])
    # Any update can be had alone, in any order of asking, and iteration starts anywhere.
    alone = [BatchOrder(*settings_).step_batches(step) for step in range(first_step, first_step + 9)]
    resumed = list(BatchOrder(*settings_).batches(first_step, first_step + 9))
    assert resumed == [batch for update in alone for batch in update]
    whole = list(BatchOrder(*settings_).batches(0, first_step + 9))
    assert whole[len(whole) - len(resumed) :] == resumed


def test_each_epoch_and_each_seed_has_its_own_order():
    def first_epochs(seed):
        return [tuple(BatchOrder(40, 40, 1, seed).step_batches(epoch)[0]) for epoch in range(4)]

    assert len({*first_epochs(1), *first_epochs(2)}) == 8
    assert first_epochs(1) == first_epochs(1)
    assert tuple(range(40)) not in first_epochs(1)


def test_accumulation_divides_the_same_step():
    """4 x 1 and 2 x 2 are the same blocks in the same order."""
    for step in range(30):
        wide, deep = (BatchOrder(37, b, a, 5).step_batches(step) for b, a in ((4, 1), (2, 2)))
        assert [*itertools.chain(*wide)] == [*itertools.chain(*deep)]
