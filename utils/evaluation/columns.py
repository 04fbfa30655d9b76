"""The columns of a report: texts of one source, cut alike, each once, ready to be measured."""

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.data.blocks import Blocks
from utils.data.text import read_book
from utils.errors import UserError
from utils.evaluation.stylometry import split_terms, split_words

N_WINDOWS = 200  # of training and of validation text, as long as a sample, are compared with the samples
SEPARATOR = re.compile(r"^---[^\S\n]*$", re.MULTILINE)


@dataclass(frozen=True, eq=False)
class Column:
    """Texts of one source, with their token ids; those of one group (a prompt, a longer text) belong together."""

    texts: list[str]
    ids: list[np.ndarray]
    groups: list[int]
    name: str = ""  # its resampling has a seed of its own
    n_dropped: int = 0  # equal to another, empty, or the rest of a text

    @functools.cached_property
    def words(self) -> list[list[str]]:
        """The words of each text."""
        return [split_words(text) for text in self.texts]

    @functools.cached_property
    def terms(self) -> list[list[str]]:
        """The terms of each text."""
        return [split_terms(text) for text in self.texts]

    @property
    def n_words(self) -> int:
        return sum(map(len, self.words))

    @property
    def n_terms(self) -> int:
        return sum(map(len, self.terms))


def build_column(texts: list[str], ids: list[np.ndarray], groups: list[int], name: str = "") -> Column:
    """Return the texts that are not empty, each once: a copy would count twice and stand on both sides of a test."""
    first = {text: index for index, text in reversed(list(enumerate(texts))) if text.strip()}
    kept = sorted(first.values())
    chosen = ([values[i] for i in kept] for values in (texts, ids, groups))
    return Column(*chosen, name, n_dropped=len(texts) - len(kept))


def build_columns(samples: list[dict], data: Blocks, tokenizer, length: int) -> dict[str, Column]:
    """Return the columns base, finetuned and, if there is validation text, reference: windows of `length` tokens."""
    columns = {name: column_of_samples(samples, name) for name in ("base", "finetuned")}
    windows = data.windows("validation", length, N_WINDOWS) or data.segments("validation")  # no segment is as long
    if windows:
        columns["reference"] = build_column(
            tokenizer.batch_decode(windows), windows, list(range(len(windows))), "reference"
        )
    return columns


def column_of_samples(samples: list[dict], model: str) -> Column:
    """Return the samples of a model, grouped by prompt."""
    rows = [sample for sample in samples if sample["model"] == model]
    prompts = {prompt: number for number, prompt in enumerate(dict.fromkeys(row["prompt"] for row in rows))}
    ids = [np.array(row["generated_ids"], np.int64) for row in rows]
    return build_column([row["text"] for row in rows], ids, [prompts[row["prompt"]] for row in rows], model)


def read_judged(path: Path) -> list[tuple[str, object]]:
    """Read the texts of a file, each with its group: rows of .jsonl with "text", or text with lines of --- between."""
    whole = read_book(path)[0]
    if path.suffix.lower() != ".jsonl":
        return [(text.strip("\n"), number) for number, text in enumerate(SEPARATOR.split(whole))]
    rows, models = [], set()
    for number, line in enumerate(whole.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
                row["text"].encode()  # half of a surrogate pair is no text
                prompt = row.get("prompt")
                rows.append((row["text"].strip("\n"), prompt if isinstance(prompt, str) else number))
                models |= {repr(row["model"])} if "model" in row else set()
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise UserError(f'{path}: line {number} is not a JSON object with a "text"') from None
    if len(models) > 1:
        raise UserError(f"{path} has texts of {len(models)} models ({', '.join(sorted(models))}); keep those of one")
    return rows


def columns_of_files(paths: list[Path], tokenizer, length: int) -> dict[str, Column]:
    """Return the texts of files as columns, by the files' names without their endings."""
    stems = [path.stem for path in paths]
    for stem in stems:
        if not stem.isprintable():
            raise UserError(f"--judge: {stem!r} has characters that cannot be printed; rename the file")
        if stems.count(stem) > 1:
            raise UserError(f"--judge: two files are called {stem}; rename one")
    return {path.stem: column_of_file(path, tokenizer, length) for path in paths}


def column_of_file(path: Path, tokenizer, length: int) -> Column:
    """Return the texts of a file, longer ones cut into windows of `length` tokens.

    The rest of a text is left out if it is shorter than half a window. The windows of a single text stand for
    themselves.
    """
    rows, texts, ids, groups = read_judged(path), [], [], []
    numbers = {group: number for number, group in enumerate(dict.fromkeys(group for _, group in rows))}
    for text, group in rows:
        encoded = tokenizer(text, add_special_tokens=False)["input_ids"]
        for start in range(0, max(1, len(encoded)), length):
            part = np.array(encoded[start : start + length], np.int64)
            texts.append("" if start and 2 * len(part) < length else tokenizer.decode(part))
            ids.append(part)
            groups.append(len(ids) if len(rows) == 1 else numbers[group])
    return build_column(texts, ids, groups, f"judged/{path.stem}")
