"""Tokenizers and tokens: load or learn a tokenizer, turn segments into ids.

Owns everything between characters and ids. Blocks are utils/data/blocks.py's.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from utils.data.text import Segment
from utils.errors import UserError
from utils.storage import read_json

SPLITS = ("train", "validation")
PIECE_CHARS = 4096
GROUP = 256  # pieces tokenized at once: enough for every core, and a million characters bound the memory
END_OF_TEXT = "<|endoftext|>"
# Just before white space that follows a non-space: no token of GPT-2's BPE ever reaches across.
# Python alone counts the separators 1c to 1f as white space; GPT-2 joins them to punctuation.
PIECE_CUT = re.compile(r"(?<=\S)(?=[^\S\x1c-\x1f])")


def load_tokenizer(folder: Path):
    """Load the tokenizer of a model folder.

    Raises:
        UserError: it is missing or damaged, or has no end-of-text token.
    """
    from transformers import AutoTokenizer

    files = ("tokenizer.json", "vocab.json", "tokenizer.model", "spiece.model")
    if not any((folder / name).is_file() for name in files):
        raise UserError(f"tokenizer: {folder} has no tokenizer.json")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "config.json"):
        if (folder / name).is_file():
            read_json(folder / name, "tokenizer: ")
    try:
        # Without the False, the library asks a person at a terminal whether the folder's own code may run.
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokenizer("a word")  # some fields of its files are not looked at before
    except Exception as error:  # each kind fails in its own way, the Rust library with a bare Exception
        what = "/tokenizer.json is damaged" if type(error) is Exception else " is damaged, it cannot be loaded"
        raise UserError(f"tokenizer: {folder}{what}: {error}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer: {folder} has no end-of-text token")
    return tokenizer


def fingerprint_tokenizer(tokenizer) -> str:
    """Return a sha256 that two tokenizers share when they give text the same ids."""
    probe = tokenizer("The old house, isn't it?\n\n  1871 \u00e9", add_special_tokens=False)["input_ids"]
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps([vocabulary, probe]).encode()).hexdigest()


def train_tokenizer(texts: Iterable[str], vocab_size: int):
    """Learn a byte-level BPE tokenizer of GPT-2's kind.

    Args:
        texts: training text, read once.
        vocab_size: number of ids, the end-of-text token included; at least 257.
    Returns:
        A transformers tokenizer; any text in any language can be encoded.
    Source: Sennrich et al. 2016 (BPE); Radford et al. 2019 (on bytes).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, unk_token=END_OF_TEXT
    )


def cut_pieces(text: str) -> list[str]:
    """Cut a text into pieces that a GPT-2 tokenizer encodes to the same ids as the whole.

    Source: tests/data/test_tokenizer.py compares them on GPT-2's own vocabulary.
    """
    pieces, start = [], 0
    while start < len(text):
        cut = PIECE_CUT.search(text, start + PIECE_CHARS)
        end = cut.start() if cut else len(text)
        pieces.append(text[start:end])
        start = end
    return pieces


def encode_text(tokenizer, pieces: list[str]) -> list[int]:
    """Tokenize pieces to one list of ids; a special token typed in the text stays ordinary text."""
    rust = getattr(tokenizer, "backend_tokenizer", None)
    if rust is None:
        encoded = tokenizer(pieces, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    else:  # what the call above does, without the offsets and masks that nobody reads here
        rust.no_truncation()
        rust.no_padding()
        rust.encode_special_tokens = True
        encoded = (piece.ids for piece in rust.encode_batch_fast(pieces, add_special_tokens=False))
    return list(itertools.chain.from_iterable(encoded))


def pieces_are_exact(tokenizer, text: str) -> bool:
    """Say whether this tokenizer may be given pieces: sentencepiece ones mark the start of a text.

    Every possible cut is tried, in a line of our own too: the first segment of a book may be one word.
    """
    sample = "One two.\n\n  Three\n" + text[: 8 * PIECE_CHARS]
    return encode_text(tokenizer, PIECE_CUT.split(sample)) == encode_text(tokenizer, [sample])


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest unsigned type that holds every id; a cast to a smaller one would wrap."""
    return np.min_scalar_type(vocab_size - 1)


class TokenWriter:
    """Append segments' tokens to one raw file a split, and keep count.

    Args:
        folder: where train.bin and validation.bin are written.
        tokenizer: any transformers tokenizer with an end-of-text token.
        n_books: an end-of-text token follows every book but the last.
    """

    def __init__(self, folder: Path, tokenizer, n_books: int) -> None:
        self.tokenizer, self.n_books = tokenizer, n_books
        self.dtype = token_dtype(len(tokenizer))
        self.paths = {split: folder / f"{split}.bin" for split in SPLITS}
        self.spans: list[dict] = []
        self.n_tokens = dict.fromkeys(SPLITS, 0)
        self.exact: bool | None = None

    def write(self, segment: Segment) -> None:
        """Tokenize a segment and append it to its split."""
        if self.exact is None:
            self.exact = pieces_are_exact(self.tokenizer, segment.text)
        pieces = cut_pieces(segment.text) if self.exact else [segment.text]
        start = self.n_tokens[segment.split]
        for first in range(0, len(pieces), GROUP):
            self._append(segment.split, encode_text(self.tokenizer, pieces[first : first + GROUP]))
        self.spans.append({
            "split": segment.split,
            "book": segment.book_index,
            "chars": [segment.start, segment.end],
            "tokens": [start, self.n_tokens[segment.split]],
            "bytes": len(segment.text.encode()),
        })  # fmt: skip
        if segment.ends_book and segment.book_index < self.n_books - 1:
            self._append(segment.split, [self.tokenizer.eos_token_id])

    def _append(self, split: str, ids: list[int]) -> None:
        if ids and max(ids) > np.iinfo(self.dtype).max:
            raise UserError(f"tokenizer: id {max(ids)} is beyond its own vocabulary of {len(self.tokenizer)}")
        with open(self.paths[split], "ab") as file:
            file.write(np.array(ids, dtype=self.dtype).tobytes())
        self.n_tokens[split] += len(ids)

    def open_tokens(self) -> dict[str, np.ndarray]:
        """Map each split's tokens, (n_tokens,) of the stored type."""
        return {
            split: np.memmap(path, self.dtype, "r") if self.n_tokens[split] else np.zeros(0, self.dtype)
            for split, path in self.paths.items()
        }
