"""Blocks: what is stored is the text, overlap equals a brute-force count, batches are arithmetic."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_book
from hypothesis import given, settings
from hypothesis import strategies as st

from utils import data
from utils.book import plan_validation, read_book, split_book
from utils.cli import UserError
from utils.data import BatchOrder, Blocks, hash_runs, measure_overlap, open_blocks
from utils.files import MANIFEST, read_json, write_sealed
from utils.tokens import load_tokenizer

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
            prepare_data.main()
        return folder

    return run_prepare


def stream_of(blocks, split):
    """Return the stored tokens of a split, its blocks end to end."""
    return getattr(blocks, split)[:]["input_ids"].flatten().tolist()


def check_text(folder, paths, tokenizer):
    """Decode every passage's span and compare it with the book; return how many tokens were left out."""
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


def test_decoding_gives_back_every_passage(prepared, book, tiny_model):
    left_out = check_text(prepared, [book], load_tokenizer(tiny_model))
    assert left_out == sum(s["tail_tokens"] for s in read_json(prepared / MANIFEST)["splits"].values())


def test_decoding_gives_back_every_passage_of_three_books(three_books, tiny_model):
    paths, folder = three_books
    check_text(folder, paths, load_tokenizer(tiny_model))


def test_the_passages_are_those_that_the_plan_chose_over_all_books(three_books):
    texts = [read_book(path)[0] for path in three_books[0]]
    offsets = [0, *itertools.accumulate(map(len, texts))]
    intervals = plan_validation(offsets.pop(), 0.25, 49)
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
        assert [place for place, token in enumerate(stream) if token == eos] == expected
        # Nothing else stands between the passages.
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
        assert counts["passages"] == len(spans)
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
    """The book repeats no paragraph, so none of the held-out ones may be in the training blocks."""
    blocks, tokenizer = open_blocks(prepared), load_tokenizer(tiny_model)
    text = {split: tokenizer.decode(stream_of(blocks, split)) for split in SPLITS}
    held_out = text["validation"].split("\n\n")
    assert len(held_out) > 15
    assert not [p for p in held_out[:-1] if p in text["train"]]  # the last is cut off by the tail
    assert blocks.manifest["overlap"]["leaked_runs"] == 0


# Opening


def test_openings_are_the_beginnings_of_held_out_passages(three_books, tiny_model):
    paths, folder = three_books
    blocks, tokenizer = open_blocks(folder), load_tokenizer(tiny_model)
    texts = [read_book(path)[0] for path in paths]
    spans = [s for s in blocks.manifest["spans"] if s["split"] == "validation"]
    passages = [texts[s["book"]][slice(*s["chars"])] for s in spans]
    pairs = blocks.openings(3, 21, 19)
    assert len(pairs) == 3
    begins = []
    for ids, following in pairs:
        assert (len(ids), len(following)) == (21, 19)
        decoded = tokenizer.decode(ids + following).rstrip("\ufffd")
        begins.append(next(i for i, p in enumerate(passages) if p.startswith(decoded)))
    assert len(set(begins)) == 3


def blocks_of_passages(n_passages, n_tokens, block_size=4):
    """Return Blocks whose validation is n_passages of n_tokens, counting up from 0."""
    rows = torch.arange(n_passages * n_tokens // block_size * block_size).view(-1, block_size)

    class Rows:
        def __len__(self):
            return len(rows)

        def __getitem__(self, index):
            return {"input_ids": rows[index]}

    spans = [{"split": "validation", "tokens": [i * n_tokens, (i + 1) * n_tokens]} for i in range(n_passages)]
    return Blocks(Path(), {"block_size": block_size, "spans": spans}, None, Rows())


@pytest.mark.parametrize(
    ("count", "chosen"), [(0, []), (1, [0]), (2, [0, 2]), (3, [0, 1, 3]), (5, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4])]
)
def test_openings_are_spread_over_the_passages(count, chosen):
    pairs = blocks_of_passages(5, 12).openings(count, 3, 6)
    starts = [12 * i for i in chosen]
    assert pairs == [(list(range(s, s + 3)), list(range(s + 3, s + 9))) for s in starts]


def test_passages_too_short_for_an_opening_are_passed_over():
    assert blocks_of_passages(5, 11).openings(2, 3, 9) == []
    # 55 tokens in blocks of 4: the last 3 were left out, so the last passage has 8.
    assert len(blocks_of_passages(5, 11).openings(9, 3, 5)) == 5
    assert len(blocks_of_passages(5, 11).openings(9, 3, 6)) == 4


def test_a_data_folder_is_opened_as_it_was_written(prepared):
    blocks = open_blocks(prepared)
    assert blocks.block_size == 32
    assert all(getattr(blocks, split)[:]["input_ids"].dtype == torch.int64 for split in SPLITS)
    counts = blocks.manifest["splits"]["validation"]
    assert blocks.bytes_per_token == counts["bytes"] / counts["tokens"]
    ids = [token for split in SPLITS for token in stream_of(blocks, split)]
    assert blocks.id_range() == (min(ids), max(ids))


@pytest.mark.parametrize("place", [0, 0.3, 0.5, 0.9, -1])
@pytest.mark.parametrize("split", SPLITS)
def test_a_flipped_bit_is_refused(prepared, tmp_path, split, place):
    folder = shutil.copytree(prepared, tmp_path / "blocks")
    [path] = (folder / split).glob("*.arrow")
    raw = bytearray(path.read_bytes())
    raw[int(place * len(raw)) if place >= 0 else -1] ^= 1
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


def test_a_data_folder_without_training_blocks_is_refused(prepared, tmp_path):
    folder = shutil.copytree(prepared, tmp_path / "blocks")
    manifest = read_json(folder / MANIFEST)
    manifest["splits"]["train"]["blocks"] = 0
    write_sealed(folder, manifest)
    with pytest.raises(UserError, match="has no training blocks"):
        open_blocks(folder)


# Overlap


def count_overlap(train, validation, run):
    """Count as measure_overlap does, by comparing tuples."""
    runs = [tuple(train[i : i + run]) for i in range(len(train) - run + 1)]
    held_out = [tuple(validation[i : i + run]) for i in range(len(validation) - run + 1)]
    return {
        "validation_runs": len(held_out),
        "leaked_runs": sum(r in set(runs) for r in held_out),
        "repeated_share": round(1 - len(set(runs)) / len(runs), 6) if runs else 0.0,
    }


@st.composite
def token_streams(draw):
    """Draw two streams over a small vocabulary, with parts of one planted in the other and in itself."""
    ids = st.lists(st.integers(0, draw(st.sampled_from([1, 3, 60_000]))), max_size=60)
    train, validation = draw(ids), draw(ids)
    for _ in range(draw(st.integers(0, 3))):
        a, length = draw(st.integers(0, 50)), draw(st.integers(1, 12))
        source, target = draw(st.sampled_from([(train, validation), (train, train), (validation, validation)]))
        place = draw(st.integers(0, len(target)))
        target[place:place] = source[a : a + length]
    return train, validation


@settings(max_examples=150, deadline=None)
@given(streams=token_streams(), run=st.integers(1, 6), chunk=st.sampled_from([1, 2, 7, 1 << 20]))
def test_overlap_equals_a_brute_force_count(streams, run, chunk):
    train, validation = (np.array(ids, np.uint16) for ids in streams)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "RUN_TOKENS", run)
        found = measure_overlap(train, validation, chunk)
    assert found == count_overlap(train.tolist(), validation.tolist(), run)


def test_overlap_of_runs_of_32_tokens():
    rng = np.random.default_rng(0)
    train = rng.integers(0, 500, 4_000).astype(np.uint16)
    validation = rng.integers(0, 500, 900).astype(np.uint16)
    validation[100:140] = train[3_960:]  # the last 40: 9 runs of 32
    validation[500:531] = train[:31]  # one token short of a run
    train[2_000:2_040] = train[50:90]
    found = measure_overlap(train, validation, chunk=100)
    assert found == count_overlap(train.tolist(), validation.tolist(), 32)
    assert (found["leaked_runs"], found["validation_runs"]) == (9, 869)
    assert found["repeated_share"] == round(9 / 3_969, 6)


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 2), max_size=80), run=st.integers(1, 5))
def test_two_runs_have_one_hash_when_they_are_equal_and_only_then(ids, run):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "RUN_TOKENS", run)
        hashes = hash_runs(np.array(ids, np.uint16)).tolist()
    runs = [tuple(ids[i : i + run]) for i in range(len(ids) - run + 1)]
    assert len(hashes) == len(runs)
    assert len(set(zip(hashes, runs, strict=True))) == len(set(hashes)) == len(set(runs))


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
        updates = [order.update(step) for step in steps]
        assert sorted(n for update in updates for batch in update for n in batch) == list(range(n_blocks))
        for update in updates:
            assert 1 <= len(update) <= grad_accum_steps
            assert all(len(batch) == batch_size for batch in update[:-1])
            assert 1 <= len(update[-1]) <= batch_size
        full = batch_size * grad_accum_steps
        assert all(sum(map(len, update)) == full for update in updates[:-1])
    # Any update can be had alone, in any order of asking, and iteration starts anywhere.
    alone = [BatchOrder(*settings_).update(step) for step in range(first_step, first_step + 9)]
    resumed = list(BatchOrder(*settings_).batches(first_step, first_step + 9))
    assert resumed == [batch for update in alone for batch in update]
    whole = list(BatchOrder(*settings_).batches(0, first_step + 9))
    assert whole[len(whole) - len(resumed) :] == resumed


def test_each_epoch_and_each_seed_has_its_own_order():
    def first_epochs(seed):
        return [tuple(BatchOrder(40, 40, 1, seed).update(epoch)[0]) for epoch in range(4)]

    assert len({*first_epochs(1), *first_epochs(2)}) == 8
    assert first_epochs(1) == first_epochs(1)
    assert tuple(range(40)) not in first_epochs(1)


def test_accumulation_divides_the_same_update():
    """4 x 1 and 2 x 2 are the same blocks in the same order."""
    for step in range(30):
        wide, deep = (BatchOrder(37, b, a, 5).update(step) for b, a in ((4, 1), (2, 2)))
        assert [*itertools.chain(*wide)] == [*itertools.chain(*deep)]
