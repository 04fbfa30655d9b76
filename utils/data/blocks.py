"""Blocks: write and open the prepared folder, find places in it, order the batches.

Owns the folder that prepare_data.py writes. Text is utils/data/text.py's, tokens are utils/data/tokenizer.py's.
"""

import functools
import hashlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UserError
from utils.storage import MANIFEST, join_hashes, read_sealed, verify_folder

FORMAT = 1
AROUND = 25  # tokens shown before and after a run of the book


def save_blocks(tokens: dict[str, np.ndarray], block_size: int, folder: Path) -> None:
    """Write each split's tokens as rows of exactly block_size ids, a datasets DatasetDict.

    Args:
        tokens: (n_tokens,) ids by split; the tail shorter than a block is left out.
        block_size: tokens a row.
        folder: receives train/ and validation/.
    """
    import pyarrow as pa
    from datasets import Dataset, DatasetDict, disable_progress_bars, enable_progress_bars

    disable_progress_bars()
    splits = {}
    for split, ids in tokens.items():
        whole = ids[: len(ids) // block_size * block_size]
        values = pa.array(whole, type=pa.from_numpy_dtype(ids.dtype))
        rows = pa.FixedSizeListArray.from_arrays(values, block_size)
        # A fingerprint from the content: the same book gives the same files, byte for byte.
        digest = hashlib.sha256(whole.tobytes()).hexdigest()[:16]
        splits[split] = Dataset(pa.table({"input_ids": rows}), fingerprint=digest)
    # datasets writes no file at all for an empty split, and then cannot open it.
    DatasetDict(splits).save_to_disk(
        folder, num_shards={name: None if len(rows) else 1 for name, rows in splits.items()}
    )
    enable_progress_bars()


@dataclass(frozen=True)
class Blocks:
    """An opened data folder: rows of token ids and what the manifest says of them."""

    folder: Path
    manifest: dict
    train: Any
    validation: Any

    @property
    def block_size(self) -> int:
        return self.manifest["block_size"]

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of the validation text for each of its tokens."""
        counts = self.manifest["splits"]["validation"]
        return counts["bytes"] / counts["tokens"] if counts["tokens"] else 0.0

    @property
    def sha256(self) -> str:
        """The checksum of all blocks, from the manifest, with which the files were compared when they were opened."""
        return join_hashes(entry["sha256"] for name, entry in self.manifest["files"].items() if "/data-" in name)

    def id_range(self) -> tuple[int, int]:
        """Return the least and the greatest token id."""
        import pyarrow.compute as pc

        splits = [split.data.column("input_ids") for split in (self.train, self.validation) if len(split)]
        ranges = [pc.min_max(pc.list_flatten(column)).as_py() for column in splits]
        return min(ids["min"] for ids in ranges), max(ids["max"] for ids in ranges)

    def ids(self, split: str) -> np.ndarray:
        """Return all token ids of a split's blocks, (n_blocks * block_size,), in the book's order."""
        import pyarrow.compute as pc

        return pc.list_flatten(getattr(self, split).data.table.column("input_ids")).to_numpy()

    def spans(self, split: str) -> list[tuple[int, int, dict]]:
        """Return where the segments of a split begin and end in ids(split), with what the manifest says of each."""
        end = len(getattr(self, split)) * self.block_size
        spans = [span for span in self.manifest["spans"] if span["split"] == split]
        return [(span["tokens"][0], min(span["tokens"][1], end), span) for span in spans]

    def segments(self, split: str) -> list[np.ndarray]:
        """Return the token ids of each segment of a split."""
        ids = self.ids(split)
        return [ids[start:end] for start, end, _ in self.spans(split)]

    def windows(self, split: str, length: int, count: int) -> list[np.ndarray]:
        """Return up to `count` windows of `length` tokens, spread over the segments; none overlap."""
        ids = self.ids(split)
        starts = [start for a, b, _ in self.spans(split) for start in range(a, b - length + 1, length)]
        return [ids[start : start + length] for start in pick_evenly(starts, count)]

    def validation_prompts(
        self, tokenizer, count: int, prompt_tokens: int, next_tokens: int
    ) -> list[tuple[list, list]]:
        """Return beginnings of validation paragraphs and what the author wrote next.

        Args:
            tokenizer: tells where lines end.
            count: how many, spread over the places with enough text after them. Where paragraphs are too few,
                lines begin a validation prompt, then sentences, then any token.
            prompt_tokens, next_tokens: tokens of each.
        Returns:
            (prompt ids, next ids) pairs.
        """
        ids, needed = self.ids("validation"), prompt_tokens + next_tokens
        unique, inverse = np.unique(ids, return_inverse=True)
        texts = tokenizer.batch_decode(unique[:, None].tolist())
        line, empty, stop, space = (
            np.array([bool(re.search(pattern, text)) for text in texts], bool)[inverse]
            for pattern in (r"\n$", r"\n\n$", r"[.!?][\"'\u201d\u2019)]*$", r"^ ")
        )
        empty[1:] |= line[1:] & line[:-1]
        begins = [before[:-1] & follows[1:] for before, follows in ((empty, ~line), (line, ~line), (stop, space))]
        begins[2] |= begins[1]
        inside = [range(a, b - needed + 1) for a, b, _ in self.spans("validation")]
        for begin in (*begins, None):
            starts = [i for places in inside for i in places if begin is None or i == places[0] or begin[i - 1]]
            if len(starts) >= count:
                break
        return [
            (ids[i : i + prompt_tokens].tolist(), ids[i + prompt_tokens : i + needed].tolist())
            for i in pick_evenly(starts, count)
        ]

    def locate(self, position: int, length: int, tokenizer) -> dict[str, Any]:
        """Say where in its book a run of training tokens stands.

        Args:
            position: of its first token in ids("train").
            length: tokens.
            tokenizer: turns them into text, and tells how many characters stand before them in their segment.
        Returns:
            tokens (length), book (file name), char (from 0), share (of the book, 0 to 1), text, and the words of the
            segment before and after.
        """
        start, end, span = [entry for entry in self.spans("train") if entry[0] <= position][-1]
        book, ids = self.manifest["books"][span["book"]], self.ids("train")
        # A token may begin within a character: what is decoded of its first bytes is not counted.
        char = span["chars"][0] + len(tokenizer.decode(ids[start:position]).rstrip("\ufffd"))
        cuts = [max(start, position - AROUND), position, position + length, min(end, position + length + AROUND)]
        texts = [tokenizer.decode(ids[a:b]) for a, b in itertools.pairwise(cuts)]
        return {"tokens": length, "book": book["name"], "char": char, "share": char / book["chars"],
                **dict(zip(("before", "text", "after"), texts, strict=True))}  # fmt: skip


def pick_evenly(values: list, count: int) -> list:
    """Return `count` of the values, spread evenly, or all when there are fewer."""
    count = min(count, len(values))
    return [values[i * len(values) // count] for i in range(count)]


def read_manifest(folder: Path) -> dict:
    """Read a data folder's manifest.

    Raises:
        UserError: the folder is missing, was not made by prepare_data.py, or is of a newer format.
    """
    if not folder.is_dir():
        raise UserError(f"data: {folder}: no such directory; run prepare_data.py first")
    if not (folder / MANIFEST).is_file():
        raise UserError(f"data: {folder} was not made by prepare_data.py")
    try:
        manifest = read_sealed(folder)
    except UserError as error:
        raise UserError(f"{error}; run prepare_data.py again with --overwrite") from None
    try:
        if manifest["format"] > FORMAT:
            raise UserError(f"data: format {manifest['format']} is newer than this program ({FORMAT})")
        splits = {name: manifest["splits"][name] for name in ("train", "validation")}
        counts = [part[key] for part in splits.values() for key in ("blocks", "tokens", "bytes")]
        counts += [place for span in manifest["spans"] for place in span["tokens"] if splits[span["split"]]]
        manifest["tokenizer"]["sha256"], next(name for name in manifest["files"] if name.startswith("train/data"))
        if min(manifest["block_size"] - 2, *counts, *(entry["bytes"] for entry in manifest["files"].values())) < 0:
            raise ValueError
    except (KeyError, TypeError, AttributeError, ValueError, StopIteration):
        raise UserError(f"{folder / MANIFEST} is damaged; run prepare_data.py again with --overwrite") from None
    return manifest


def open_blocks(folder: Path) -> Blocks:
    """Open a data folder, every file compared with its checksum before it is mapped.

    Returns:
        Blocks whose train and validation give input_ids as (B, block_size) int64 tensors.
    Raises:
        UserError: missing, damaged or empty.
    """
    manifest = read_manifest(folder)
    problem = verify_folder(folder)
    if "replaces" in manifest:  # its files may be those of before; what it says of them is not
        problem = f"data: {folder}: its preparation was cut short"
    if problem:
        raise UserError(f"{problem}; run prepare_data.py again")
    if manifest["splits"]["train"]["blocks"] < 1:
        raise UserError(f"data: {folder} has no training blocks")
    splits = _map_splits(folder, manifest)
    return Blocks(folder, manifest, splits["train"], splits["validation"])


def _map_splits(folder: Path, manifest: dict):
    """Map the blocks, and compare them with the manifest: a checksum that agrees makes no file well-formed."""
    import pyarrow.compute as pc
    from datasets import load_from_disk

    try:
        splits = load_from_disk(str(folder)).with_format("torch")
        for name, counts in manifest["splits"].items():
            column = splits[name].data.table.column("input_ids")
            column.validate(full=True)
            ids, lengths = pc.list_flatten(column), set(pc.unique(pc.list_value_length(column)).to_pylist())
            if (len(column), ids.null_count, lengths - {manifest["block_size"]}) != (counts["blocks"], 0, set()):
                raise ValueError(f"{name} is not {counts['blocks']} blocks of {manifest['block_size']} tokens")
            if len(splits[name]) != len(column) or "int" not in str(ids.type):
                raise ValueError(f"{name} is not a list of token ids")
    except Exception as error:  # Arrow and datasets each fail in their own ways
        raise UserError(f"data: {folder} is damaged, run prepare_data.py again: {error}") from None
    return splits


class BatchOrder:
    """The blocks of every micro-batch, a pure function of seed, epoch and step.

    The last update of an epoch takes what is left, so every block is seen once an epoch.

    Args:
        n_blocks: blocks in training.
        batch_size: blocks a micro-batch.
        grad_accum_steps: micro-batches an update.
        seed: shuffles; each epoch in its own order.
    """

    def __init__(self, n_blocks: int, batch_size: int, grad_accum_steps: int, seed: int) -> None:
        self.n_blocks, self.batch_size, self.seed = n_blocks, batch_size, seed
        self.blocks_per_step = batch_size * grad_accum_steps
        self.steps_per_epoch = -(-n_blocks // self.blocks_per_step)
        self._shuffled = functools.lru_cache(maxsize=2)(self._shuffle)

    def step_batches(self, step: int) -> list[list[int]]:
        """Return the micro-batches of one update, as lists of block numbers."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = self._shuffled(epoch)[place * self.blocks_per_step : (place + 1) * self.blocks_per_step]
        return [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]

    def batches(self, first_step: int, max_steps: int) -> Iterator[list[int]]:
        """Yield the micro-batches of the updates from first_step up to, not including, max_steps."""
        for step in range(first_step, max_steps):
            yield from self.step_batches(step)

    def _shuffle(self, epoch: int) -> list[int]:
        return np.random.default_rng([self.seed, epoch]).permutation(self.n_blocks).tolist()
