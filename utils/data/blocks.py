"""Blocks: write and open the prepared folder, find positions in it, order the batches."""

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from utils.data.text import STOPS, WIDE_STOP
from utils.errors import UserError
from utils.storage import MANIFEST, join_hashes, read_sealed, verify_folder

FORMAT = 2
SHARD_BYTES = 500_000_000  # of one Arrow file, as datasets writes them
PROMPT_TOKENS = 1 << 22  # of the validation text, in which prompts are looked for
CONTEXT_TOKENS = 25  # shown before and after a located n-gram
AGAIN = "run prepare_data.py again with --overwrite"
datasets.disable_progress_bars()


def save_blocks(tokens: dict[str, Sequence], block_size: int, folder: Path, start: Sequence[int] = ()) -> None:
    """Write (n_tokens,) ids by split as rows of block_size, `start` before each, a DatasetDict; a tail is left out."""
    for split, ids in tokens.items():
        _save_split(ids, block_size, folder / split, start)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(tokens)}))


def _save_split(ids: Sequence, block_size: int, folder: Path, start: Sequence[int]) -> None:
    """Write the rows of a split, one file at a time, as Dataset.save_to_disk would: it needs all in memory."""
    size, digest = block_size - len(start), hashlib.sha256()
    n_rows = len(ids) // size
    n_files = n_rows * block_size * ids.dtype.itemsize // SHARD_BYTES + 1
    ends = [n_rows * i // n_files * size for i in range(n_files + 1)]
    files = [f"data-{i:05d}-of-{n_files:05d}.arrow" for i in range(n_files)]
    for name, (first, last) in zip(files, itertools.pairwise(ends), strict=True):
        _save_file(ids[first:last], block_size, folder, start, digest)  # in a function of its own: its memory is freed
        if n_files > 1:
            (folder / "data-00000-of-00001.arrow").rename(folder / name)
    state = json.loads((folder / "state.json").read_text()) | {"_data_files": [{"filename": name} for name in files]}
    (folder / "state.json").write_text(json.dumps(state, indent=2, sort_keys=True))


def _save_file(ids: np.ndarray, block_size: int, folder: Path, start: Sequence[int], digest) -> None:
    """Save ids as a dataset of one file, named by `digest`, a hashlib object that is updated by them."""
    if start:
        ids = np.pad(ids.reshape(-1, block_size - 1), ((0, 0), (1, 0)), constant_values=start[0]).reshape(-1)
    digest.update(ids)
    rows = pa.FixedSizeListArray.from_arrays(pa.array(ids, type=pa.from_numpy_dtype(ids.dtype)), block_size)
    # A fingerprint from the content: the same book gives the same files, byte for byte. Without num_shards, datasets
    # writes no file at all for an empty split, and then cannot open it.
    part = datasets.Dataset(pa.table({"input_ids": rows}), fingerprint=digest.hexdigest()[:16])
    part.save_to_disk(folder, num_shards=1)


@dataclass(frozen=True)
class TokenView:
    """The token ids of the text in a column of blocks, (n_tokens,): a slice is an array, read from the mapped files."""

    column: pa.ChunkedArray
    block_size: int
    n_start: int

    def __len__(self) -> int:
        return len(self.column) * (self.block_size - self.n_start)

    def __getitem__(self, part: slice) -> np.ndarray:
        start, end, _ = part.indices(len(self))
        size = self.block_size - self.n_start
        first, n_rows = start // size, max(0, -(-end // size) - start // size)
        rows = pc.list_flatten(self.column.slice(first, n_rows)).to_numpy().reshape(-1, self.block_size)
        return rows[:, self.n_start :].reshape(-1)[start - first * size : end - first * size]


@dataclass(frozen=True)
class Blocks:
    """An opened data folder: rows of token ids, described by the manifest."""

    folder: Path
    manifest: dict
    train: datasets.Dataset
    validation: datasets.Dataset

    @property
    def block_size(self) -> int:
        return self.manifest["block_size"]

    @property
    def start_ids(self) -> list[int]:
        """The token before the text of each block, if the tokenizer has one."""
        start = self.manifest["tokenizer"].get("start_id")
        return [] if start is None else [start]

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes per token of the validation text, 0 without one."""
        counts = self.manifest["splits"]["validation"]
        return counts["bytes"] / counts["tokens"] if counts["tokens"] else 0.0

    @property
    def sha256(self) -> str:
        """The checksum of all blocks, from the manifest; open_blocks compared the files with it."""
        return join_hashes(entry["sha256"] for name, entry in self.manifest["files"].items() if "/data-" in name)

    def id_range(self) -> tuple[int, int]:
        """Return the smallest and the largest token id."""
        columns = [pc.list_flatten(split.data.table.column("input_ids")) for split in (self.train, self.validation)]
        found = [pc.min_max(ids).as_py() for ids in columns if len(ids)]
        return min(ids["min"] for ids in found), max(ids["max"] for ids in found)

    def view(self, split: str) -> TokenView:
        """Return the token ids of a split's text that fills its blocks, without reading them."""
        return TokenView(getattr(self, split).data.table.column("input_ids"), self.block_size, len(self.start_ids))

    def ids(self, split: str) -> np.ndarray:
        """Return the token ids of a split's text that fills its blocks, (n_tokens,), in the book's order."""
        return self.view(split)[:]

    def spans(self, split: str) -> list[tuple[int, int, dict]]:
        """Return (start, end, manifest entry) of each segment of a split, as positions in ids(split)."""
        end = len(getattr(self, split)) * (self.block_size - len(self.start_ids))
        spans = [span for span in self.manifest["spans"] if span["split"] == split]
        return [(span["tokens"][0], min(span["tokens"][1], end), span) for span in spans]

    def segments(self, split: str) -> list[np.ndarray]:
        """Return the token ids of each segment of a split."""
        ids = self.ids(split)
        return [ids[start:end] for start, end, _ in self.spans(split)]

    def window_starts(self, split: str, length: int, count: int) -> list[int]:
        """Return the positions in ids(split) of up to `count` windows of `length` tokens.

        They are spread over the segments and do not overlap.
        """
        starts = [start for a, b, _ in self.spans(split) for start in range(a, b - length + 1, length)]
        return pick_evenly(starts, count)

    def windows(self, split: str, length: int, count: int) -> list[np.ndarray]:
        """Return the token ids of these windows."""
        return [self.view(split)[start : start + length] for start in self.window_starts(split, length, count)]

    def validation_prompts(self, tokenizer, count: int, n_prompt: int, n_reference: int) -> list[tuple[list, list]]:
        """Return up to `count` pairs of prompt and reference ids, spread over the validation segments.

        Prompts start at paragraphs; where there are too few, at lines too, then at sentences, then at any token.
        """
        ids, length = self.view("validation")[:PROMPT_TOKENS], n_prompt + n_reference
        unique, inverse = np.unique(ids, return_inverse=True)
        twice = tokenizer.batch_decode(unique[:, None].repeat(2, axis=1).tolist())
        texts = [text[len(text) // 2 :] for text in twice]  # the second one: some decoders drop the space of the first

        def match(pattern: str) -> np.ndarray:
            return np.array([bool(re.search(pattern, text)) for text in texts], bool)[inverse]

        line, paragraph, sentence = match(r"\n$"), match(r"\n\n$"), match(rf"[.!?{STOPS}][\"'\u201d\u2019)]*$")
        paragraph[1:] |= line[1:] & line[:-1]
        after_line = line[:-1] & ~line[1:]
        after_sentence = (sentence[:-1] & match(r"^ ")[1:]) | (match(rf"{WIDE_STOP}$")[:-1] & ~line[1:])
        # Whether a prompt may start at each token but the first, in the order of preference.
        orders = [paragraph[:-1] & ~line[1:], after_line, after_line | after_sentence, np.ones_like(after_line)]
        fits = [range(start, min(end, len(ids)) - length + 1) for start, end, _ in self.spans("validation")]
        for may_start in orders:
            starts = [i for segment in fits for i in segment if i == segment[0] or may_start[i - 1]]
            if len(starts) >= count:
                break
        return [self._cut_prompt(ids[i : i + length].tolist(), n_prompt, tokenizer) for i in pick_evenly(starts, count)]

    @staticmethod
    def _cut_prompt(ids: list[int], n_prompt: int, tokenizer) -> tuple[list[int], list[int]]:
        """Cut ids into prompt and reference, the prompt up to 3 tokens shorter at either end to have whole characters.

        A character of UTF-8 has 4 bytes at most, and a token may be one of them.
        """
        start, end = 0, n_prompt
        while start < min(3, n_prompt - 1) and tokenizer.decode(ids[start:end]).startswith("\ufffd"):
            start += 1
        while end > max(start + 1, n_prompt - 3) and tokenizer.decode(ids[start:end]).endswith("\ufffd"):
            end -= 1
        return ids[start:end], ids[end:]

    def locate(self, position: int, length: int, tokenizer) -> dict[str, Any]:
        """Locate in the book the training n-gram of `length` tokens at `position` of ids("train").

        Returns its first character (from 0), the share of the book before it (0 to 1), and the text around it.
        """
        start, end, span = [entry for entry in self.spans("train") if entry[0] <= position][-1]
        book, ids = self.manifest["books"][span["book"]], self.ids("train")
        # A token may start within a character, whose first bytes decode to a replacement that is not counted.
        char = span["chars"][0] + len(tokenizer.decode(ids[start:position]).rstrip("\ufffd"))
        first, last = max(start, position - CONTEXT_TOKENS), min(end, position + length + CONTEXT_TOKENS)
        cuts = [0, position - first, position - first + length, last - first]
        before, text, after = (text.strip("\ufffd") for text in decode_cuts(tokenizer, ids[first:last], cuts))
        return {"tokens": length, "book": book["name"], "char": char, "share": char / book["chars"],
                "before": before, "text": text, "after": after}  # fmt: skip


def decode_cuts(tokenizer, ids, cuts: list[int]) -> list[str]:
    """Decode ids in pieces between positions; a character that lies across a cut stands whole in the later piece."""
    text = tokenizer.decode(ids)
    ends = [len(tokenizer.decode(ids[:cut]).rstrip("\ufffd")) for cut in cuts[1:-1]]
    return [text[start:end] for start, end in itertools.pairwise([0, *ends, len(text)])]


def pick_evenly(values: list, count: int) -> list:
    """Return `count` of the values, spread evenly, or all when there are fewer."""
    count = min(count, len(values))
    return [values[i * len(values) // count] for i in range(count)]


def read_manifest(folder: Path) -> dict:
    """Read a data folder's manifest; UserError if it is missing, damaged or has another format."""
    if not folder.is_dir():
        raise UserError(f"data: {folder}: no such directory; run prepare_data.py first")
    if not (folder / MANIFEST).is_file():
        raise UserError(f"data: {folder} was not made by prepare_data.py")
    try:
        manifest = read_sealed(folder)
    except UserError as error:
        raise UserError(f"{error}; {AGAIN}") from None
    try:
        if manifest["format"] > FORMAT:
            raise UserError(f"data: format {manifest['format']} is newer than this program ({FORMAT})")
        if manifest["format"] < FORMAT:
            raise UserError(f"data: {folder} has format {manifest['format']}, expected {FORMAT}; {AGAIN}")
        splits = {name: manifest["splits"][name] for name in ("train", "validation")}
        numbers = [part[key] for part in splits.values() for key in ("blocks", "tokens", "bytes")]
        numbers += [position for span in manifest["spans"] for position in span["tokens"] if splits[span["split"]]]
        numbers.append(manifest["tokenizer"].get("start_id", 0))
        manifest["tokenizer"]["sha256"], next(name for name in manifest["files"] if name.startswith("train/data"))
        if min(manifest["block_size"] - 2, *numbers, *(entry["bytes"] for entry in manifest["files"].values())) < 0:
            raise ValueError
    except (KeyError, TypeError, AttributeError, ValueError, StopIteration):
        raise UserError(f"{folder / MANIFEST} is damaged; {AGAIN}") from None
    return manifest


def open_blocks(folder: Path) -> Blocks:
    """Open a data folder whose files match their checksums; input_ids are (B, block_size) int64 tensors."""
    manifest = read_manifest(folder)
    problem = verify_folder(folder)
    if "replaces" in manifest:  # the files may be the previous ones, which this manifest does not describe
        problem = f"data: {folder}: its preparation was cut short"
    if problem:
        raise UserError(f"{problem}; run prepare_data.py again")
    if manifest["splits"]["train"]["blocks"] < 1:
        raise UserError(f"data: {folder} has no training blocks")
    try:
        splits = _map_splits(folder, manifest)
    except Exception as error:  # Arrow and datasets each fail in their own ways
        raise UserError(f"data: {folder} is damaged, run prepare_data.py again: {error}") from error
    return Blocks(folder, manifest, splits["train"], splits["validation"])


def _map_splits(folder: Path, manifest: dict) -> datasets.DatasetDict:
    """Map the blocks and compare them with the manifest: a matching checksum does not make a file valid."""
    splits = datasets.load_from_disk(str(folder)).with_format("torch")
    for name, counts in manifest["splits"].items():
        column = splits[name].data.table.column("input_ids")
        column.validate(full=True)
        ids, lengths = pc.list_flatten(column), set(pc.unique(pc.list_value_length(column)).to_pylist())
        if (len(column), ids.null_count, lengths - {manifest["block_size"]}) != (counts["blocks"], 0, set()):
            raise ValueError(f"{name} is not {counts['blocks']} blocks of {manifest['block_size']} tokens")
        if len(splits[name]) != len(column) or "int" not in str(ids.type):
            raise ValueError(f"{name} is not a list of token ids")
    return splits


class BatchOrder:
    """The blocks of every batch, a pure function of seed, epoch and step.

    An epoch has each block once, in its own order; its last step takes the blocks that are left.
    """

    def __init__(self, n_blocks: int, batch_size: int, grad_accum_steps: int, seed: int) -> None:
        self.n_blocks, self.batch_size, self.seed = n_blocks, batch_size, seed
        self.blocks_per_step = batch_size * grad_accum_steps
        self.steps_per_epoch = -(-n_blocks // self.blocks_per_step)
        self._shuffled = functools.lru_cache(maxsize=2)(self._shuffle)

    def step_batches(self, step: int) -> list[list[int]]:
        """Return the batches of a step, as lists of block numbers."""
        epoch, index = divmod(step, self.steps_per_epoch)
        order = self._shuffled(epoch)[index * self.blocks_per_step : (index + 1) * self.blocks_per_step]
        return [order[i : i + self.batch_size].tolist() for i in range(0, len(order), self.batch_size)]

    def batches(self, first_step: int, max_steps: int) -> Iterator[list[int]]:
        """Yield the batches of the steps from first_step up to, not including, max_steps."""
        for step in range(first_step, max_steps):
            yield from self.step_batches(step)

    def _shuffle(self, epoch: int) -> np.ndarray:  # a list would take 36 bytes per block
        return np.random.default_rng([self.seed, epoch]).permutation(self.n_blocks).astype(np.uint32)
