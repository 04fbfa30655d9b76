"""Tokenizers and tokens: load or train a tokenizer, turn segments into ids."""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import transformers  # its classes load on first use: AutoTokenizer takes a second that a new tokenizer does not need
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from utils.data.text import Segment
from utils.errors import UserError
from utils.storage import read_json

SPLITS = ("train", "validation")
PIECE_CHARS = 4096
GROUP = 256  # pieces tokenized at once: enough for every core, few enough to bound the memory
END_OF_TEXT = "<|endoftext|>"
# Just before white space that follows a non-space: no token of GPT-2's BPE crosses it. The separators
# 1c to 1f are white space for Python only; GPT-2 joins them to punctuation.
PIECE_CUT = re.compile(r"(?<=\S)(?=[^\S\x1c-\x1f])")


def load_tokenizer(folder: Path):
    """Load the tokenizer of a model folder; UserError if it is missing, damaged or without an end-of-text token."""
    files = ("tokenizer.json", "vocab.json", "tokenizer.model", "spiece.model")
    if not any((folder / name).is_file() for name in files):
        raise UserError(f"tokenizer: {folder} has no tokenizer.json")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "config.json"):
        if (folder / name).is_file():
            read_json(folder / name, "tokenizer: ")
    try:
        # Without the False, the library asks at a terminal whether the folder's own code may run.
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokenizer("a word")  # some fields of its files are not read before
        templates = tokenizer.chat_template
        for template in templates.values() if isinstance(templates, dict) else [templates or ""]:
            if not isinstance(template, str):
                raise TypeError("its chat template is no text")  # and could not be saved with a model
    except ImportError as error:
        raise UserError(f"tokenizer: {folder} needs a package that is not installed: {error}") from None
    except BaseException as error:
        # Each kind fails in its own way, the Rust library with a bare Exception or with a panic, which is none.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        what = "/tokenizer.json is damaged" if type(error) is Exception else " is damaged, it cannot be loaded"
        raise UserError(f"tokenizer: {folder}{what}: {error}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer: {folder} has no end-of-text token")
    if len(start_ids(tokenizer)) > 1:
        n_start = len(start_ids(tokenizer))
        raise UserError(f"tokenizer: {folder} puts {n_start} tokens before a text, at most one is known")
    return tokenizer


def start_ids(tokenizer) -> list[int]:
    """Return the ids that a tokenizer puts before a text: the start token of Llama, Mistral or Gemma, none of GPT-2."""
    text, whole = (tokenizer("x", add_special_tokens=special)["input_ids"] for special in (False, True))
    starts = [start for start in range(len(whole)) if whole[start : start + len(text)] == text]
    return whole[: starts[0]] if starts else []


def fingerprint_tokenizer(tokenizer) -> str:
    """Return a sha256 that is equal for tokenizers that give text the same ids."""
    sample = tokenizer("The old house, isn't it?\n\n  1871 \u00e9", add_special_tokens=False)["input_ids"]
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps([vocabulary, sample, *start_ids(tokenizer)]).encode()).hexdigest()


def train_tokenizer(texts: Iterable[str], vocab_size: int, one_in: int = 1):
    """Train a byte-level BPE tokenizer like GPT-2's, which encodes any text; vocab_size includes the end-of-text token.

    Of a large corpus, one in `one_in` pieces is enough. Pieces have the words of the whole text, in less memory.
    Source: Sennrich et al. 2016 (BPE); Radford et al. 2019 (on bytes).
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    pieces = itertools.chain.from_iterable(map(cut_pieces, texts))
    tokenizer.train_from_iterator(itertools.islice(pieces, 0, None, one_in), trainer)
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def cut_pieces(text: str) -> list[str]:
    """Cut a text into pieces that GPT-2's tokenizer encodes to the same ids; tests/data/test_tokenizer.py proves it."""
    pieces, start = [], 0
    while start < len(text):
        cut = PIECE_CUT.search(text, start + PIECE_CHARS)
        end = cut.start() if cut else len(text)
        pieces.append(text[start:end])
        start = end
    return pieces


def encode_text(tokenizer, pieces: list[str]) -> list[int]:
    """Tokenize pieces to one list of ids; a special token that stands in the text is treated as text."""
    rust = getattr(tokenizer, "backend_tokenizer", None)
    if rust is None:
        encoded = tokenizer(pieces, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    else:  # the same without offsets and masks
        rust.no_truncation()
        rust.no_padding()
        rust.encode_special_tokens = True
        encoded = (piece.ids for piece in rust.encode_batch_fast(pieces, add_special_tokens=False))
    return list(itertools.chain.from_iterable(encoded))


def pieces_are_exact(tokenizer, text: str) -> bool:
    """Say whether a tokenizer encodes pieces as the whole text; those that mark the start of a text do not."""
    # Every cut of the sample is tried; its first line has some, even if the text is a single word.
    sample = "One two.\n\n  Three\n" + text[: 2 * PIECE_CHARS]
    return encode_text(tokenizer, PIECE_CUT.split(sample)) == encode_text(tokenizer, [sample])


@dataclass(frozen=True)
class StoredTokens:
    """Token ids in a raw file: a slice is an array, (n_tokens,). A mapped file would count as resident memory."""

    path: Path
    dtype: np.dtype
    n_tokens: int

    def __len__(self) -> int:
        return self.n_tokens

    def __getitem__(self, part: slice) -> np.ndarray:
        start, end, _ = part.indices(self.n_tokens)
        if end <= start:
            return np.zeros(0, self.dtype)
        return np.fromfile(self.path, self.dtype, end - start, offset=start * self.dtype.itemsize)


class TokenWriter:
    """Append the tokens of segments to raw files, one per split, with an end-of-text token between two books."""

    def __init__(self, folder: Path, tokenizer) -> None:
        self.tokenizer = tokenizer
        self.dtype = np.min_scalar_type(len(tokenizer) - 1)  # the smallest unsigned type that holds every id
        self.paths = {split: folder / f"{split}.bin" for split in SPLITS}
        self.spans: list[dict] = []
        self.n_tokens = dict.fromkeys(SPLITS, 0)
        self.exact = True

    def encode(self, item: tuple[Segment, bool]) -> tuple[np.ndarray, bool]:
        """Tokenize a segment, in pieces if that is said to be exact; return its ids, and whether it was."""
        segment, exact = item
        exact = exact and pieces_are_exact(self.tokenizer, segment.text)
        pieces = cut_pieces(segment.text) if exact else [segment.text]
        groups = (encode_text(self.tokenizer, pieces[first : first + GROUP]) for first in range(0, len(pieces), GROUP))
        return np.concatenate([self._store(ids) for ids in ([], *groups)]), exact

    def append(self, segment: Segment, asked: bool, ids: np.ndarray, exact: bool) -> None:
        """Append what encode((segment, asked)) returned; call it in the order of the segments."""
        if asked and not self.exact:  # a segment before this one forbade pieces after a worker had started on this one
            ids, exact = self.encode((segment, False))
        self.exact = exact
        if self.spans and self.spans[-1]["book"] != segment.book_index:
            self._append(self.spans[-1]["split"], self._store([self.tokenizer.eos_token_id]))
        if not segment.continues:
            start = self.n_tokens[segment.split]
            self.spans.append({"split": segment.split, "book": segment.book_index, "chars": [segment.start, 0],
                               "tokens": [start, 0], "bytes": 0})  # fmt: skip
        self._append(segment.split, ids)
        span = self.spans[-1]
        span["chars"][1], span["tokens"][1] = segment.end, self.n_tokens[segment.split]
        span["bytes"] += len(segment.text.encode())

    def _store(self, ids: list[int]) -> np.ndarray:
        if ids and max(ids) > np.iinfo(self.dtype).max:  # the cast would wrap it
            raise UserError(f"tokenizer: id {max(ids)} is beyond its own vocabulary of {len(self.tokenizer)}")
        return np.array(ids, self.dtype)

    def _append(self, split: str, ids: np.ndarray) -> None:
        with open(self.paths[split], "ab") as file:
            file.write(ids.tobytes())
        self.n_tokens[split] += len(ids)

    def open_tokens(self) -> dict[str, "StoredTokens"]:
        """Return the tokens of each split, which are read from its file as they are used."""
        return {split: StoredTokens(path, self.dtype, self.n_tokens[split]) for split, path in self.paths.items()}

    def remove_files(self) -> None:
        """Remove the raw files."""
        for path in self.paths.values():
            path.unlink(missing_ok=True)

    def count_split(self, split: str, size: int) -> dict[str, int]:
        """Count what was written to a split, `size` tokens of it per block; tail_tokens are those that are left."""
        spans, n_tokens = [span for span in self.spans if span["split"] == split], self.n_tokens[split]
        n_chars = sum(span["chars"][1] - span["chars"][0] for span in spans)
        return {"segments": len(spans), "chars": n_chars, "bytes": sum(span["bytes"] for span in spans),
                "tokens": n_tokens, "blocks": n_tokens // size, "tail_tokens": n_tokens % size}  # fmt: skip
