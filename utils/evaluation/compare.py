"""The figures of a report: base, fine-tuned model and author, measured on the same things.

Functions return fields of report.Report, and `missing`: a sentence for each measure that was not possible.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import regex
from scipy.stats import binomtest
from tqdm import tqdm

from utils.data.blocks import Blocks, decode_cuts, pick_evenly
from utils.data.text import UNSPACED
from utils.evaluation import ngrams, stylometry
from utils.evaluation.columns import Column
from utils.evaluation.generation import Decoding
from utils.evaluation.loss import blocks_per_pass, cut_blocks, measure_gain, score_blocks, summarize_loss
from utils.evaluation.memorization import (
    COVERED_LETTERS,
    COVERED_WORDS,
    MONITOR_TRAIN,
    measure_copy_limit,
    measure_coverage,
    measure_extraction,
    monitor_lengths,
)
from utils.evaluation.style import MIN_WINDOWS, BookMeasures, compare_style, describe_lack, judge_style, sample_book

MODELS = ("base", "finetuned")
PREFIX_TOKENS, N_EXTRACTIONS = 32, 50
MIN_BLOCKS = 8  # for an interval
CONTROL_BLOCK = 128  # tokens per block of general text if there is no data folder
SHOWN_NGRAM = ngrams.NGRAM_LENGTHS[0]  # tokens: the shortest copied span that the page marks
SHOWN_PROMPTS, SHOWN_SAMPLES, CURVE_POINTS = 24, 3, 300
OTHER_LANGUAGE = (
    "style gain and cosine Delta, and whether the model learned more than the book's language: "
    "the general text is of another language; --control-path takes one of the same"
)
# Where words have no spaces between them, a cut leaves no part of one but perhaps of a character.
CUT_WORD = regex.compile(rf"^[\S--{UNSPACED}]*\s+|\s+[\S--{UNSPACED}]*$|^\ufffd+|\ufffd+$", regex.VERSION1)
QUESTIONS = 10  # pairs, and as many single snippets
SNIPPET_TOKENS = 150  # at most


def measure_losses(
    models: dict, tokenizer, data: Blocks | None, control: str, limit: int, seed: int, autocast: Callable
) -> tuple[dict[str, Any], list[str]]:
    """Measure the losses on validation and general text, style gain and forgetting.

    Args:
        control: general text, or "".
        limit: tokens of the models' context.
    """
    book = ("validation text", data.validation, data.bytes_per_token) if data else ("validation text", [], 0.0)
    general = cut_blocks(control, tokenizer, min(data.block_size if data else CONTROL_BLOCK, limit))
    scores, nats, missing = {}, {}, []
    bar = tqdm(total=len(models) * (len(book[1]) + len(general[0])), desc="scoring", unit="block", delay=2, leave=False)
    for text, (what, blocks, bytes_per_token) in {"book": book, "control": ("general text", *general)}.items():
        sums = {}
        for name, model in models.items() if len(blocks) else ():
            batch_size = blocks_per_pass(len(blocks[0]["input_ids"]))
            sums[name], n_targets = score_blocks(model, blocks, batch_size, autocast, bar.update)
            scores.setdefault(text, {})[name] = summarize_loss(sum(sums[name]), n_targets, bytes_per_token)
        if len(blocks) < MIN_BLOCKS:
            missing.append(f"the gain on {what}: there are {len(blocks)} blocks of it, {MIN_BLOCKS} are needed")
        else:
            nats[text] = sums | {"bytes": bytes_per_token * (n_targets // len(blocks))}
    bar.close()
    gains = measure_gain(nats, seed)
    percent = {"forgetting_percent": gains["forgetting"]["value"]} if "forgetting" in gains else {}
    return {"scores": scores, **gains, **percent}, missing


def extract_blocks(
    models: dict, data: Blocks, limit: int, decoding: Decoding, batch_size: int, autocast: Callable
) -> dict:
    """Measure extraction of training and of validation blocks, by model and split."""
    length = min(2 * PREFIX_TOKENS, data.block_size // 2 * 2, limit // 2 * 2)
    result = {name: {} for name in models}
    for split, blocks in (("train", data.train), ("validation", data.validation)):
        # Beginnings of blocks: training had these tokens at these very positions.
        rows = blocks[pick_evenly(range(len(blocks)), N_EXTRACTIONS)]["input_ids"][:, :length].tolist()
        for name, model in models.items():
            result[name][split] = measure_extraction(model, rows, decoding, batch_size, autocast)
    return result


def compare_texts(
    columns: dict[str, Column],
    judged: dict[str, Column],
    data: Blocks,
    tokenizer,
    control: str,
    window_tokens: int,
    read: Callable[[list[str]], list[np.ndarray]],
    seed: int,
) -> tuple[dict[str, Any], list[str]]:
    """Measure the texts of base, fine-tuned model and reference: copying, repetition, lengths and style.

    Args:
        judged: texts from elsewhere, of which copying and style are measured.
        window_tokens: tokens per window of training text, as in a sample.
        read: returns the reader's features of texts.
    """
    train, (book, is_whole) = data.ids("train"), sample_book(data, tokenizer)
    joined = {name: "\n".join(column.texts) for name, column in columns.items()} | {"book": book}
    book_words = stylometry.split_words(book)
    unspaced = stylometry.is_unspaced(book_words)
    shortest = COVERED_LETTERS if unspaced else COVERED_WORDS
    other_language = stylometry.is_other_language(stylometry.split_words(control), book_words)
    control = "" if other_language else control
    # Longer text has fewer new words: equal amounts are compared.
    fewest = min((len(column.ids) for column in columns.values() if column.ids), default=0)
    fields = {
        "unspaced": unspaced,
        "other_language": other_language,
        "copy_rate": {name: ngrams.ngram_overlap(column.ids, train) for name, column in columns.items()},
        "longest_copy": {name: describe_longest(column.ids, data, tokenizer) for name, column in columns.items()},
        "coverage": {name: measure_coverage(column.words, book_words, shortest) for name, column in columns.items()},
        "repetition": {
            name: ngrams.measure_repetition([row.tolist() for row in pick_evenly(column.ids, fewest)])
            for name, column in columns.items()
        },
        "by_quarter": {name: ngrams.measure_quarters(column.ids, train) for name, column in columns.items()},
        "lengths": {name: stylometry.measure_lengths(text) for name, text in joined.items()},
        "counts": {
            "texts": {name: len(column.texts) for name, column in columns.items()},
            "dropped": {name: column.n_dropped for name, column in columns.items()},
            "tokens": {name: sum(map(len, column.ids)) for name, column in columns.items()} | {"book": len(train)},
            "words": {name: column.n_words for name, column in columns.items()} | {"book": len(book_words)},
        },
        "judged": {
            name: {"n_texts": len(column.texts), "n_words": column.n_words, "n_dropped": column.n_dropped,
                   "copy_rate": ngrams.ngram_overlap(column.ids, train)[str(SHOWN_NGRAM)]}
            for name, column in judged.items()
        },
    }  # fmt: skip
    lacks = [f"{name}: {lack}" for name, column in columns.items() if (lack := describe_lack(column, window_tokens))]
    n_windows = len(data.window_starts("train", window_tokens, MIN_WINDOWS))
    if n_windows < MIN_WINDOWS:
        lacks.append(f"{MIN_WINDOWS} windows of training as long as a sample are needed, there are {n_windows}")
    if not lacks:
        measures = BookMeasures(data, tokenizer, book, is_whole, control, window_tokens, read, seed)
        lacks = [] if measures.profile.words else ["no frequent word of the book varies in its rate"]
    missing = [f"words, spelling and sense: {'; '.join(lacks)}"] if lacks else []
    for name, column in judged.items():
        lack = describe_lack(column, window_tokens) or "".join(missing)
        fields["judged"][name] |= {"missing": lack} if lack else judge_style(measures, column, columns)
    if other_language:
        missing.append(OTHER_LANGUAGE)
        fields["style_gain"] = None  # a general text that the model loses with its language would count as gain
    return fields if lacks else fields | compare_style(measures, columns), missing


def describe_longest(texts: list[np.ndarray], data: Blocks, tokenizer) -> dict[str, Any]:
    """Return the longest span shared with training: its tokens, its text, its position in the book."""
    tokens, position = ngrams.longest_overlap(texts, data.ids("train"))
    return data.locate(position, tokens, tokenizer) if tokens else {"tokens": 0, "text": ""}


def arrange_texts(
    prompts: list[dict], samples: list[dict], data: Blocks | None, tokenizer
) -> tuple[list[dict], list[dict]]:
    """Arrange the texts by prompt in columns, with copied spans marked; return them and the spans' sources.

    A column is a list of texts, a text a list of pieces, a piece {text, source}: an index of the sources or None.
    """
    train, spans, rows = data.ids("train") if data else None, {}, []

    def cut_pieces(ids):
        cuts, sources = [0], [None]
        for start, end, position in ngrams.trace_spans(np.array(ids, np.int64), train, SHOWN_NGRAM) if data else []:
            cuts += [max(start, cuts[-1]), end]
            sources += [spans.setdefault((position, end - start), len(spans)), None]
        texts = decode_cuts(tokenizer, ids, [*cuts, len(ids)])
        return [{"text": text, "source": source} for text, source in zip(texts, sources, strict=True) if text]

    for prompt in prompts[:SHOWN_PROMPTS]:
        columns = {}
        for name in MODELS:
            shown = [s["generated_ids"] for s in samples if (s["model"], s["prompt"]) == (name, prompt["prompt"])]
            columns[name] = [cut_pieces(ids) for ids in shown][:SHOWN_SAMPLES]
        if prompt["next_ids"]:
            columns["reference"] = [cut_pieces(prompt["next_ids"])]
        rows.append({"prompt": prompt["prompt"], "has_reference": bool(prompt["next_ids"]), "columns": columns})
    return rows, [data.locate(position, tokens, tokenizer) for position, tokens in spans]


def list_training_books(data: Blocks | None, is_other_book: bool) -> list[dict]:
    """Return the manifest's entries of the books that the model was trained on; of another model's data, none."""
    if data is None or is_other_book:
        return []
    trained = {span["book"] for span in data.manifest["spans"] if span["split"] == "train"}
    return [book for number, book in enumerate(data.manifest["books"]) if number in trained]


def make_quiz(samples: list[dict], data: Blocks, tokenizer, seed: int) -> dict[str, list]:
    """Choose snippets of equal token length for the blind test, whose cut first and last words are left out.

    Pairs of author and model come first, then single snippets of other texts where there are enough; {} without pairs.
    """
    rng = np.random.default_rng(seed)
    length = min(SNIPPET_TOKENS, max((len(s["generated_ids"]) for s in samples), default=1))
    real = tokenizer.batch_decode(data.windows("validation", length, 3 * QUESTIONS)) if length > 1 else []
    own = [s for s in samples if s["model"] == "finetuned" and len(s["generated_ids"]) >= length]
    made = [s["text"] if len(s["generated_ids"]) == length else tokenizer.decode(s["generated_ids"][:length])
            for s in own]  # fmt: skip
    made, real = (
        rng.permutation(sorted({CUT_WORD.sub("", text) for text in texts} - {""})).tolist() for texts in (made, real)
    )
    available = min(len(made), len(real))
    if available < QUESTIONS:
        return {}
    pairs = [
        {"texts": [made[i], real[i]] if author else [real[i], made[i]], "author": author}
        for i, author in enumerate(rng.integers(2, size=QUESTIONS).tolist())
    ]
    kinds = (rng.random(QUESTIONS) < 0.5).tolist() if available >= 2 * QUESTIONS else []
    singles = [{"text": (real if kind else made)[i], "is_real": kind} for i, kind in enumerate(kinds, QUESTIONS)]
    intervals = [binomtest(right, QUESTIONS).proportion_ci() for right in range(QUESTIONS + 1)]
    return {"quiz": singles, "quiz_pairs": pairs, "quiz_intervals": [[float(i.low), float(i.high)] for i in intervals]}


def find_copy_limit(trained: dict, data: Blocks, model, tokenizer) -> float | None:
    """Return the highest share of copied tokens that a training allowed; None if it was on other data.

    Args:
        trained: settings of the run.
    """
    if trained.get("max_copy_rate") is not None:
        return trained["max_copy_rate"]
    if trained.get("data_sha256") != data.sha256 or not len(data.validation):
        return None
    return measure_copy_limit(data, data.view("train")[:MONITOR_TRAIN], monitor_lengths(model, tokenizer)[1])


def arrange_curves(rows: list[dict], best_step: int | None, max_copy_rate: float | None) -> dict[str, Any]:
    """Arrange the rows of metrics.jsonl as curves, thinned for a picture; {} without rows."""
    if not rows:
        return {}
    train = [[row["step"], row["train/loss"]] for row in rows if "train/loss" in row]
    keys = {"loss": "eval/loss", "bits_per_byte": "eval/bits_per_byte", "copy_rate": "eval/copy_rate"}
    evals = [{"step": row["step"], **{name: row.get(key) for name, key in keys.items()}}
             for row in rows if "eval/loss" in row]  # fmt: skip
    return {"train": train[:: 1 + len(train) // CURVE_POINTS], "eval": evals, "best_step": best_step,
            "max_copy_rate": max_copy_rate}  # fmt: skip
