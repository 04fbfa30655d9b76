"""Stage 1: turn book.txt into block-sized token tensors.

    book -> segments for training and validation -> tokens -> blocks of --block-size tokens

Reads the book, sets whole segments aside for validation, tokenizes, and writes a folder that
finetune_generative.py opens. notes/01_dataset_prep.md explains every step.
"""

import math
import os
from pathlib import Path

from utils.cli import Parser, number, parse_first, print_table, run, text_encoding
from utils.errors import UserError, warn

MAX_BLOCK = 1024
DEFAULT_BATCH = 8
# Fewer training tokens than this are learned by heart before the style is learned.
SMALL_BOOK_TOKENS = 20_000


def parse_args(argv=None):
    parser = Parser("Turn a book into block-sized token tensors.", epilog="next: python finetune_generative.py")
    add = parser.add_argument_group("text").add_argument
    add("--input-path", nargs="+", type=Path, metavar="FILE", default=["results/data/book.txt"],
        help="text files, or folders of .txt and .md files, in this order")  # fmt: skip
    add("--encoding", type=text_encoding, default="utf-8", help="text encoding of the files")
    add("--val-split", type=number(float, 0, 1, below=True), default=0.1,
        help="share of the text kept aside as validation segments, 0 up to below 1")  # fmt: skip
    add("--val-path", nargs="+", type=Path, metavar="FILE",
        help="keep these whole files aside instead (they may also lie in --input-path)")  # fmt: skip
    add = parser.add_argument_group("tokens").add_argument
    add("--model-name", default="gpt2", help="model to prepare for, name or folder; gives tokenizer and position limit")
    add("--train-tokenizer", type=number(int, 257, 1_000_000), metavar="N",
        help="learn a byte-level BPE tokenizer of N tokens from the training text instead")  # fmt: skip
    add("--block-size", type=number(int, 2, MAX_BLOCK), default=128, help="tokens a block")
    add = parser.add_argument_group("output").add_argument
    add("--output-dir", type=Path, default=Path("results/data/blocks"), help="folder to write")
    add("--overwrite", action="store_true", help="replace what --output-dir holds")
    add("--seed", type=number(int, 0, 2**32 - 1), default=42, help="chooses the places of the segments")
    args = parser.parse_args(argv)
    args.input_path = [Path(path) for path in args.input_path]
    return args


if __name__ == "__main__":  # before the heavy imports: --help and a mistyped flag are answered in 0.1 s, not in 4 s
    args = parse_first(parse_args)


def read_books(args):
    """Measure every file once: what it holds and its sha256, held-out files last."""
    from utils.data.text import find_books, read_book

    validation = find_books(args.val_path or [])
    apart = {os.path.realpath(path) for path in validation}
    training = [path for path in find_books(args.input_path) if os.path.realpath(path) not in apart]
    if not training:
        raise UserError("--val-path holds every file of --input-path; none is left for training")
    books = [read_book(path, args.encoding)[1] for path in training + validation]
    for book in books:
        if args.output_dir.resolve() in book.path.resolve().parents:
            raise UserError(f"output-dir: refusing to use {args.output_dir}; it holds the book {book.path.name}")
    return books, len(validation)


def segments(args, books, n_held_out):
    """Yield the segments of all books, read again one at a time so that memory stays bounded."""
    from utils.data.text import Segment, choose_validation_spans, read_book, split_book

    n_chars = sum(book.n_chars for book in books)
    intervals = [] if n_held_out else choose_validation_spans(n_chars, args.val_split, args.seed)
    offset = 0
    for index, book in enumerate(books):
        text, again = read_book(book.path, args.encoding)
        if again.sha256 != book.sha256:
            raise UserError(f"{book.path} changed while it was read; try again")
        if index >= len(books) - n_held_out:
            yield Segment("validation", index, 0, len(text), True, text)
        else:
            yield from split_book(text, index, offset, intervals)
        offset += book.n_chars


def tokenizer_of_model(args):
    """Load the tokenizer of --model-name and check that the blocks will fit its model."""
    from utils.data.tokenizer import load_tokenizer
    from utils.model.hub import locate_model, position_limit, read_config

    folder = locate_model(args.model_name, "tokenizer")
    config = read_config(folder / "config.json") if (folder / "config.json").is_file() else None
    tokenizer = load_tokenizer(folder)
    if config:
        limit, vocab_size = position_limit(config), config.get("vocab_size")
        if limit and args.block_size > limit:
            raise UserError(f"--block-size {args.block_size} is more than the model's {limit} positions")
        if isinstance(vocab_size, int) and len(tokenizer) > vocab_size:
            raise UserError(f"tokenizer has {len(tokenizer)} ids, the model {vocab_size}")
    return tokenizer


def write_blocks(args, books, n_held_out, tokenizer, folder):
    """Tokenize every segment, write the blocks, and return what the manifest says of them."""
    from tqdm import tqdm

    from utils.data.blocks import save_blocks
    from utils.data.tokenizer import TokenWriter
    from utils.evaluation.ngrams import measure_leakage

    writer = TokenWriter(folder, tokenizer, len(books))
    total = sum(book.n_chars for book in books)
    with tqdm(total=total, unit="char", unit_scale=True, desc="tokenizing", delay=1) as bar:
        for segment in segments(args, books, n_held_out):
            writer.write(segment)
            bar.update(len(segment.text))
    tokens = writer.open_tokens()
    check_block_counts(args, {split: len(ids) for split, ids in tokens.items()}, bool(n_held_out))
    save_blocks(tokens, args.block_size, folder)
    overlap = measure_leakage(tokens["train"], tokens["validation"])
    del tokens
    for path in writer.paths.values():
        path.unlink(missing_ok=True)
    splits = {}
    for split in writer.paths:
        spans = [span for span in writer.spans if span["split"] == split]
        n_tokens = writer.n_tokens[split]
        splits[split] = {
            "segments": len(spans),
            "chars": sum(span["chars"][1] - span["chars"][0] for span in spans),
            "bytes": sum(span["bytes"] for span in spans),
            "tokens": n_tokens,
            "blocks": n_tokens // args.block_size,
            "tail_tokens": n_tokens % args.block_size,
        }
    return splits, overlap, writer.spans


def check_block_counts(args, n_tokens, has_val_path):
    total = sum(n_tokens.values())
    if total < args.block_size:
        tokens = "1 token" if total == 1 else f"{total} tokens"
        raise UserError(
            f"{args.input_path[0]} gives {tokens}; one block needs {args.block_size} - "
            "use a longer text or a smaller --block-size"
        )
    blocks = total // args.block_size
    wants_validation = args.val_split > 0 or has_val_path
    for split, wanted in (("train", True), ("validation", wants_validation)):
        if wanted and n_tokens[split] < args.block_size:
            part = "training" if split == "train" else "validation"
            raise UserError(
                f"the text gives {blocks} blocks; --val-split {args.val_split:g} of them leaves none for {part}; "
                "change --val-split or use a smaller --block-size"
            )


def settings_of(args, books, n_held_out, tokenizer):
    """Everything that shapes the result: equal settings give an equal folder."""
    from utils.data.tokenizer import fingerprint_tokenizer

    return {
        "block_size": args.block_size,
        "val_path": [book.path.name for book in books[len(books) - n_held_out :]] or None,
        "val_split": None if n_held_out else args.val_split,
        "encoding": args.encoding,
        "seed": args.seed,
        "model_name": None if args.train_tokenizer else args.model_name,
        "train_tokenizer": args.train_tokenizer,
        "tokenizer": None if tokenizer is None else fingerprint_tokenizer(tokenizer),
        "books": [book.sha256 for book in books],
    }


def is_up_to_date(args, settings, manifest):
    """Compare with a folder made before; other settings are refused by name."""
    from utils.storage import verify_folder

    before = manifest.get("settings", {})
    changed = [name for name, value in settings.items() if before.get(name) != value]
    if not changed:
        return "replaces" not in manifest and verify_folder(args.output_dir) is None  # else cut short
    name, value = changed[0], before.get(changed[0])
    flag = f"--{name.replace('_', '-')}"
    was = f"without {flag}" if value is None else f"with {flag} {value}"
    now = "without" if settings[name] is None else settings[name]
    what = {"books": "with other text", "tokenizer": "with another tokenizer"}.get(name, f"{was}, now {now}")
    raise UserError(f"output-dir: {args.output_dir} was prepared {what}; use another or --overwrite")


def print_summary(args, manifest, n_words):
    train, validation = manifest["splits"]["train"], manifest["splits"]["validation"]
    tokens = train["tokens"] + validation["tokens"]
    bytes_per_token = (train["bytes"] + validation["bytes"]) / tokens
    overlap = manifest["overlap"]

    def part(counts):
        return (
            f"{counts['segments']} segments, {counts['tokens']:,} tokens -> {counts['blocks']:,} blocks "
            f"of {args.block_size} (tail of {counts['tail_tokens']} tokens left out)"
        )

    print_table(f"prepared {args.output_dir}", [
        ("text", f"{train['chars'] + validation['chars']:,} characters, {n_words:,} words"),
        ("tokens", f"{tokens:,}, {bytes_per_token:.2f} bytes a token"),
        ("training", part(train)),
        ("validation", part(validation)),
        ("repeats itself", f"{overlap['repeated_share']:.2%} of the training text's 32-token runs stood before"),
        ("leaks", f"{overlap['leaked_ngrams']:,} of {overlap['validation_ngrams']:,} 32-token runs of validation "
                  "also stand in training"),
        ("steps an epoch", f"{math.ceil(train['blocks'] / DEFAULT_BATCH):,} at the default batch of {DEFAULT_BATCH}"),
    ])  # fmt: skip
    if bytes_per_token < 2.5:
        warn(f"the tokenizer does not fit this text: {bytes_per_token:.2f} bytes a token, below 2.5; "
             "training will be slow and weak (--train-tokenizer learns one that fits)")  # fmt: skip
    if train["tokens"] < SMALL_BOOK_TOKENS:
        warn(f"the book is very small ({train['tokens']:,} training tokens): expect it to be learned by heart; "
             "keep to one or two epochs and compare the held-out loss")  # fmt: skip
    if overlap["leaked_ngrams"] > 0.01 * max(1, overlap["validation_ngrams"]):
        warn("validation repeats training: the held-out loss will look better than it is")


def prepare(args, books, n_held_out):
    """Write the output folder, which is locked, or find that it is up to date; return its manifest."""
    from utils.data.blocks import FORMAT, read_manifest
    from utils.data.tokenizer import fingerprint_tokenizer, train_tokenizer
    from utils.storage import MANIFEST, clear_folder, publish_files, sweep

    tokenizer = None if args.train_tokenizer else tokenizer_of_model(args)
    settings = settings_of(args, books, n_held_out, tokenizer)
    sweep(args.output_dir)
    if (args.output_dir / MANIFEST).is_file() and not args.overwrite:
        before = read_manifest(args.output_dir)
        if is_up_to_date(args, settings, before):
            return before, True
    manifest = {"format": FORMAT, "made_by": "prepare_data.py", "settings": settings}
    # Ids of two bytes, once raw and once in blocks, at four bytes of text a token; a tokenizer beside them.
    size = sum(book.n_bytes for book in books) + 8_000_000
    with publish_files(args.output_dir, manifest, size, "the data") as folder:
        if tokenizer is None:
            print(f"learning a tokenizer of {args.train_tokenizer:,} tokens from the training text", flush=True)
            texts = (p.text for p in segments(args, books, n_held_out) if p.split == "train")
            tokenizer = train_tokenizer(texts, args.train_tokenizer)
        splits, overlap, spans = write_blocks(args, books, n_held_out, tokenizer, folder)
        tokenizer.save_pretrained(folder / "tokenizer")
        fingerprint = {"sha256": settings["tokenizer"] or fingerprint_tokenizer(tokenizer), "size": len(tokenizer),
                       "end_of_text_id": tokenizer.eos_token_id}  # fmt: skip
        facts = [{"name": b.path.name, "sha256": b.sha256, "chars": b.n_chars, "words": b.n_words} for b in books]
        manifest |= {"model_name": settings["model_name"], "block_size": args.block_size, "tokenizer": fingerprint,
                     "books": facts, "splits": splits, "overlap": overlap, "spans": spans}  # fmt: skip
    clear_folder(args.output_dir, keep=[MANIFEST, *(name.split("/")[0] for name in manifest["files"])])
    return manifest, False


def main(args):
    from utils.output_dir import check_output_dir, lock
    from utils.storage import MANIFEST

    is_ours = (args.output_dir / MANIFEST).is_file()
    check_output_dir(args.output_dir, is_ours, "prepare_data.py", args.overwrite, [args.model_name])
    with lock(args.output_dir, "prepare"):
        books, n_held_out = read_books(args)
        manifest, up_to_date = prepare(args, books, n_held_out)
    print_summary(args, manifest, sum(book.n_words for book in books))
    if up_to_date:
        print("up to date: the same command on the same book, nothing to do")
    else:
        print("next: python finetune_generative.py")


if __name__ == "__main__":
    run(main, args)
