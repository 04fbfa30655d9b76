"""Stage 1: turn book.txt into block-sized token tensors.

    book -> segments for training and validation -> tokens -> blocks of --block-size tokens

Writes the folder that finetune_generative.py opens. notes/01_dataset_prep.md explains every step.
"""

import json
import math
import os
from pathlib import Path

from utils.argument_types import auto_or, file_path, model_name, names_of, number, text_encoding
from utils.cli import Parser, parse_first, print_table, run
from utils.errors import UserError, warn

MAKER = "prepare_data.py"
DEFAULT_BOOK = Path("results/data/book.txt")
MAX_BLOCK = 1024
# The faults that utils/data/doctor.py knows, in the order of mending.
CLEAN = ("mojibake", "gutenberg", "pages", "hyphens", "lines", "quotes", "duplicates")
DEFAULT_BATCH = 8
TOKENIZER_CHARS = 1 << 28  # of the text that a tokenizer is learned from
# With fewer training tokens than this, the text is memorized before its style is learned.
SMALL_BOOK_TOKENS = 20_000


def parse_args(argv=None):
    parser = Parser("Turn a book into block-sized token tensors.", epilog="next: python finetune_generative.py")
    add = parser.add_argument_group("text").add_argument
    add("--input-path", action="extend", nargs="+", type=file_path, metavar="FILE",
        help=f"text, EPUB, Word or HTML files, or folders of .txt and .md files (default: {DEFAULT_BOOK})")  # fmt: skip
    add("--encoding", type=text_encoding, default="utf-8", help="text encoding of the files")
    add("--clean", type=names_of(*CLEAN), metavar="LIST",
        help=f"faults of the text to mend, joined by commas: all, or {', '.join(CLEAN)} (default: none)")  # fmt: skip
    add("--val-split", type=number(float, 0, 1, below=True), default=0.1,
        help="share of the text for validation, 0 up to below 1, taken as whole segments")  # fmt: skip
    add("--val-path", action="extend", nargs="+", type=file_path, metavar="FILE",
        help="use these whole files for validation instead; they may also be in --input-path")  # fmt: skip
    add = parser.add_argument_group("tokens").add_argument
    add("--model-name", type=model_name, default="gpt2",
        help="model to prepare for, name or folder; it gives the tokenizer and limits the block size")  # fmt: skip
    add("--train-tokenizer", type=number(int, 257, 1_000_000), metavar="N",
        help="train a byte-level BPE tokenizer of N tokens on the training text instead")  # fmt: skip
    add("--block-size", type=number(int, 2, MAX_BLOCK), default=128, help="tokens per block")
    add("--num-workers", type=auto_or(number(int, 0, 64)), metavar="N",
        help="processes that tokenize, 0 for this one (default: auto, one per core, up to 8, above 64 MB)")  # fmt: skip
    add = parser.add_argument_group("output").add_argument
    add("--output-dir", type=Path, default=Path("results/data/blocks"), help="folder to write")
    add("--overwrite", action="store_true", help="replace the contents of --output-dir")
    add("--seed", type=number(int, 0, 2**32 - 1), default=42, help="seed of the positions of validation segments")
    args = parser.parse_args(argv)
    args.input_path = args.input_path or [DEFAULT_BOOK]  # as a default of the flag, it would be extended
    return args


if __name__ == "__main__":  # before the heavy imports: --help and a mistyped flag are answered in 0.1 s, not in 2 s
    args = parse_first(parse_args)

from tqdm import tqdm

from utils.data import doctor
from utils.data.blocks import FORMAT, read_manifest, save_blocks
from utils.data.corpus import EXAMINED, SLICE_BYTES, is_large, measure_books, read_segments
from utils.data.formats import READERS
from utils.data.text import choose_chapters, find_books
from utils.data.tokenizer import TokenWriter, fingerprint_tokenizer, load_tokenizer, start_ids, train_tokenizer
from utils.data.workers import choose_workers, open_workers
from utils.evaluation.ngrams import measure_leakage
from utils.model.hub import locate_model, position_limit, read_config
from utils.output_dir import check_output_dir, lock
from utils.storage import MANIFEST, clear_folder, diff_settings, publish_files, sweep, verify_folder


def read_books(args):
    """Read, measure and examine every file, those of --val-path last; return the books and (file name, finding)."""
    validation = find_books(args.val_path or [])
    apart = {os.path.realpath(path) for path in validation}
    training = [path for path in find_books(args.input_path) if os.path.realpath(path) not in apart]
    if not training:
        raise UserError("--val-path holds every file of --input-path; none is left for training")
    paths, books, findings = training + validation, [], []
    if args.num_workers is None:
        args.num_workers = choose_workers(sum(os.path.getsize(path) for path in paths if os.path.isfile(path)))
    for book, found in measure_books(paths, validation, args.encoding, args.clean, args.num_workers):
        books.append(book)
        findings += [(book.name, finding) for finding in found]
        if args.output_dir.resolve() in book.path.resolve().parents:
            raise UserError(f"output-dir: refusing to use {args.output_dir}; it holds the book {book.name}")
    return books, findings


def load_model_tokenizer(args):
    """Load the tokenizer of --model-name and check that the blocks will fit its model."""
    folder = locate_model(args.model_name, "tokenizer")
    config = read_config(folder / "config.json") if (folder / "config.json").is_file() else {}
    tokenizer = load_tokenizer(folder)
    limit, vocab_size = position_limit(config), config.get("vocab_size")
    if limit and args.block_size > limit:
        raise UserError(f"--block-size {args.block_size} is more than the model's {limit} positions")
    if isinstance(vocab_size, int) and len(tokenizer) > vocab_size:
        raise UserError(f"tokenizer has {len(tokenizer)} ids, the model {vocab_size}")
    return tokenizer


def collect_settings(args, books, tokenizer):
    """Return all that shapes the result: equal settings give an equal folder."""
    return {
        "block_size": args.block_size,
        "val_path": [book.name for book in books if book.validation] or None,
        "val_split": None if args.val_path else args.val_split,
        "encoding": args.encoding,
        "clean": ",".join(args.clean) if args.clean else None,
        "seed": args.seed,
        "model_name": None if args.train_tokenizer else args.model_name,
        "train_tokenizer": args.train_tokenizer,
        "tokenizer": None if tokenizer is None else fingerprint_tokenizer(tokenizer),
        # The same bytes give other text when they are converted.
        "books": [READERS.get(book.path.suffix.lower(), "") + book.sha256 for book in books],
    }


def is_prepared(folder):
    """Return whether this script wrote a folder, by its manifest; a damaged one is left for find_prepared to report."""
    if not (folder / MANIFEST).is_file():
        return False
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (ValueError, RecursionError):
        return True
    return isinstance(manifest, dict) and manifest.get("made_by") == MAKER


def find_prepared(args, settings):
    """Return the manifest of an output folder that is up to date, else None; other settings are refused by name."""
    if args.overwrite or not (args.output_dir / MANIFEST).is_file():
        return None
    manifest = read_manifest(args.output_dir)
    changed = diff_settings(manifest.get("settings"), settings)
    if changed:
        name, was, now = (" ".join(map(str, value)) if isinstance(value, list) else value for value in changed)
        flag = f"--{name.replace('_', '-')}"
        how = f"without {flag}" if was is None else f"with {flag} {was}"
        how = f"{how}, now {'without' if now is None else now}"
        how = {"books": "with other text", "tokenizer": "with another tokenizer"}.get(name, how)
        raise UserError(f"output-dir: {args.output_dir} was prepared {how}; use another or --overwrite")
    interrupted = "replaces" in manifest or verify_folder(args.output_dir)
    return None if interrupted else manifest


def prepare(args, books, tokenizer, settings):
    """Write the output folder and return its manifest."""
    manifest = {"format": FORMAT, "made_by": MAKER, "settings": settings}
    # Per token, of about four bytes of text, two ids of two bytes: raw and in blocks; and the tokenizer's files.
    size = sum(book.n_bytes for book in books) + 8_000_000
    with publish_files(args.output_dir, manifest, size, "the data") as folder:
        if tokenizer is None:
            tokenizer = learn_tokenizer(args, books)
        tokenizer.save_pretrained(folder / "tokenizer")
        manifest |= {
            "model_name": settings["model_name"],
            "block_size": args.block_size,
            "tokenizer": {"sha256": settings["tokenizer"] or fingerprint_tokenizer(tokenizer),
                          "size": len(tokenizer), "end_of_text_id": tokenizer.eos_token_id,
                          **({"start_id": start_ids(tokenizer)[0]} if start_ids(tokenizer) else {})},
            "books": [{"name": book.name, "sha256": book.sha256, "chars": book.n_chars, "words": book.n_words,
                       "cleaned": book.cleaned}
                      for book in books],
            **describe_chapters(args, books),
            **write_blocks(args, books, tokenizer, folder),
        }  # fmt: skip
    if args.overwrite:
        clear_folder(args.output_dir, keep=[MANIFEST, *(name.split("/")[0] for name in manifest["files"])])
    return manifest


def learn_tokenizer(args, books):
    """Train a tokenizer on the training text; of a large corpus, on pieces spread evenly over it."""
    one_in = 1 + sum(book.n_chars for book in books) // TOKENIZER_CHARS
    source = "the training text" if one_in == 1 else f"one in {one_in} pieces of the training text"
    print(f"learning a tokenizer of {args.train_tokenizer:,} tokens from {source}", flush=True)
    segments = read_segments(books, args.encoding, args.val_split, args.seed, args.clean)
    texts = (segment.text for segment in segments if segment.split == "train")
    tokenizer = train_tokenizer(texts, args.train_tokenizer, one_in)
    if len(tokenizer) < args.train_tokenizer:
        print(f"learned {len(tokenizer):,} tokens: the text is too small for more", flush=True)
    return tokenizer


def describe_chapters(args, books):
    """Return how many chapters the books have, and how many are validation text as a whole; {} without chapters."""
    count, by_file = sum(len(book.chapters) for book in books), any(book.validation for book in books)
    whole = 0 if by_file else len(choose_chapters(books, args.val_split, args.seed))
    return {"chapters": {"count": count, "whole": whole}} if count else {}


def write_blocks(args, books, tokenizer, folder):
    """Tokenize every segment, write the blocks, and return their counts and spans."""
    writer = TokenWriter(folder, tokenizer)
    n_chars = sum(book.n_chars for book in books)
    segments = read_segments(books, args.encoding, args.val_split, args.seed, args.clean)
    with (
        tqdm(total=n_chars, unit="char", unit_scale=True, desc="tokenizing", delay=1) as bar,
        open_workers(writer.encode, args.num_workers) as run_all,
    ):
        for (segment, in_pieces), encoded in run_all((segment, writer.exact) for segment in segments):
            writer.append(segment, in_pieces, *encoded)
            bar.update(len(segment.text))
    start = start_ids(tokenizer)
    check_block_counts(args, writer.n_tokens, args.block_size - len(start))
    tokens = writer.open_tokens()
    save_blocks(tokens, args.block_size, folder, start)
    leakage = measure_leakage(tokens["train"], tokens["validation"], args.num_workers)
    writer.remove_files()
    counts = {split: writer.count_split(split, args.block_size - len(start)) for split in tokens}
    return {"splits": counts, "leakage": leakage, "spans": writer.spans}


def check_block_counts(args, n_tokens, size):
    """Refuse a text that leaves a split without a block, which takes `size` tokens of it."""
    total = sum(n_tokens.values())
    texts = {args.input_path[0]: total}
    if args.val_path:
        texts = {args.input_path[0]: n_tokens["train"], f"--val-path {args.val_path[0]}": n_tokens["validation"]}
    for text, count in texts.items():
        if count < size:
            raise UserError(f"{text} gives {count} token{'s' if count != 1 else ''}; one block needs {size} "
                            "- use a longer text or a smaller --block-size")  # fmt: skip
    wanted = {"training": "train"} | ({"validation": "validation"} if args.val_split else {})
    empty = [name for name, split in wanted.items() if n_tokens[split] < size]
    if empty:
        raise UserError(f"the text gives {total // size} blocks; --val-split {args.val_split:g} of them leaves none "
                        f"for {empty[0]}; change --val-split or use a smaller --block-size")  # fmt: skip


def print_faults(books, findings):
    """Print one line per fault that --clean has mended, and one per fault that it would mend."""
    rows, large = [], [book.name for book in books if is_large(book.path)]
    if large:
        several = f" and {len(large) - 1} more" * (len(large) > 1)
        rows.append(("examined", f"{EXAMINED} or more parts of {SLICE_BYTES >> 20} MB of {large[0]}{several}"))
    for name, (_, fault, mending) in doctor.FAULTS.items():
        mended = [book.cleaned[name] for book in books if book.cleaned.get(name)]
        found = [(book, finding) for book, finding in findings if finding.name == name]
        if mended:
            where = f" in {len(mended)} of {len(books)} books" if len(books) > 1 else ""
            rows.append((name, f"mended: {sum(mended):,} {fault}{where}"))
        if found:
            first, finding = found[0]
            where = f" in {len(found)} of {len(books)} books, first {first}" if len(books) > 1 else ""
            total = sum(finding.count for _, finding in found)
            rows.append((name, f"{total:,} {fault}{where}: {finding.example}; --clean {name} {mending}"))
    print_table("faults of the text", rows if len(rows) > bool(large) else [*rows, ("none", "found")])


def print_summary(args, manifest):
    train, validation = manifest["splits"]["train"], manifest["splits"]["validation"]
    n_tokens, leakage = train["tokens"] + validation["tokens"], manifest["leakage"]
    bytes_per_token = (train["bytes"] + validation["bytes"]) / n_tokens
    n_words = sum(book["words"] for book in manifest["books"])
    sampled = f" (estimated from one in {leakage['one_in']})" if "one_in" in leakage else ""

    chapters = manifest.get("chapters")
    if chapters:
        how = "segments are cut at paragraph ends within them"
        if chapters["whole"]:
            how = f"{chapters['whole']} whole ones, spread over the book, are validation text"
        elif args.val_path or not args.val_split:
            how = "each is one segment"
        chapters = f"{chapters['count']}; {how}"

    row = ("{segments} segments, {tokens:,} tokens -> {blocks:,} blocks of {block_size} "
           "(tail of {tail_tokens} tokens left out)")  # fmt: skip
    print_table(f"prepared {args.output_dir}", [
        ("text", f"{train['chars'] + validation['chars']:,} characters, {n_words:,} words"),
        ("chapters", chapters),
        ("tokens", f"{n_tokens:,}, {bytes_per_token:.2f} bytes per token"),
        ("training", row.format(**train, block_size=args.block_size)),
        ("validation", row.format(**validation, block_size=args.block_size)),
        ("repetition", f"{leakage['repeated_share']:.2%} of training's 32-token n-grams occur earlier in training"
                       + sampled),
        ("leakage", f"{leakage['leaked_ngrams']:,} of {leakage['validation_ngrams']:,} 32-token n-grams of validation "
                    f"also occur in training{sampled}"),
        ("steps per epoch", f"{math.ceil(train['blocks'] / DEFAULT_BATCH):,} at the default batch of {DEFAULT_BATCH}"),
    ])  # fmt: skip
    if bytes_per_token < 2.5:
        warn(f"the tokenizer does not fit this text: {bytes_per_token:.2f} bytes per token, below 2.5; "
             "training will be slow and weak (--train-tokenizer learns one that fits)")  # fmt: skip
    if train["tokens"] < SMALL_BOOK_TOKENS:
        warn(f"the book is very small ({train['tokens']:,} training tokens) and will be memorized; "
             "train for one or two epochs and compare the validation loss")  # fmt: skip
    if leakage["leaked_ngrams"] > 0.01 * max(1, leakage["validation_ngrams"]):
        warn("validation repeats training: the validation loss will look better than it is")


def main(args):
    check_output_dir(args.output_dir, is_prepared(args.output_dir), MAKER, args.overwrite, [args.model_name])
    with lock(args.output_dir, "prepare"):
        books, findings = read_books(args)
        tokenizer = None if args.train_tokenizer else load_model_tokenizer(args)
        settings = collect_settings(args, books, tokenizer)
        print_faults(books, findings)
        prepared = find_prepared(args, settings)
        sweep(args.output_dir)
        manifest = prepared or prepare(args, books, tokenizer, settings)
    print_summary(args, manifest)
    up_to_date = "up to date: the same command on the same book, nothing to do"
    print(up_to_date if prepared else "next: python finetune_generative.py")


if __name__ == "__main__":
    run(main, args)
