"""The figures of a report: base, fine-tuned model and author, measured on the same things.

Functions return fields of report.Report, and `missing`: a sentence for each measure that was not possible.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.stats import binomtest

from utils.data.blocks import Blocks, pick_evenly
from utils.evaluation import ngrams, stylometry
from utils.evaluation.loss import cut_blocks, measure_gain, score_blocks, summarize_loss
from utils.evaluation.memorization import default_copy_rate, measure_extraction

MODELS = ("base", "finetuned")
PREFIX_TOKENS, N_EXTRACTIONS = 32, 50
N_WINDOWS = 200  # of training and of validation text, as long as a sample, are compared with the samples
MIN_TEXTS = 10  # of each kind, for a classifier
MIN_BLOCKS = 5  # for an interval
CONTROL_BLOCK = 128  # tokens per block of general text if there is no data folder
BOOK_TOKENS, BOOK_WINDOW = 2_000_000, 1000  # of a longer training text, windows of this many tokens in all are read
SHOWN_NGRAM = ngrams.NGRAM_LENGTHS[0]  # tokens: the shortest copied span that the page marks
SHOWN_PROMPTS, SHOWN_SAMPLES, CURVE_POINTS = 24, 3, 300
QUESTIONS = 10


def measure_losses(
    models: dict, tokenizer, data: Blocks | None, control: str, limit: int, seed: int, autocast: Callable, progress
) -> tuple[dict[str, Any], list[str]]:
    """Measure the losses on validation and general text, style gain and forgetting.

    Args:
        control: general text, or "".
        limit: tokens of the models' context.
        progress: called with the number of blocks just scored.
    """
    book = ("validation text", data.validation, data.bytes_per_token) if data else ("validation text", [], 0.0)
    general = cut_blocks(control, tokenizer, min(data.block_size if data else CONTROL_BLOCK, limit))
    scores, nats, missing = {}, {}, []
    for text, (what, blocks, bytes_per_token) in {"book": book, "control": ("general text", *general)}.items():
        sums = {}
        for name, model in models.items() if len(blocks) else ():
            # One block per forward pass: each has its own loss, and the bootstrap draws blocks.
            sums[name], n_targets = score_blocks(model, blocks, 1, autocast, progress)
            scores.setdefault(text, {})[name] = summarize_loss(sum(sums[name]), n_targets, bytes_per_token)
        if len(blocks) < MIN_BLOCKS:
            missing.append(f"the gain on {what}: there are {len(blocks)} blocks of it, {MIN_BLOCKS} are needed")
        else:
            nats[text] = sums | {"bytes": bytes_per_token * (n_targets // len(blocks))}
    gains = measure_gain(nats, seed)
    percent = {"forgetting_percent": gains["forgetting"]["value"]} if "forgetting" in gains else {}
    return {"scores": scores, **gains, **percent}, missing


def extract_blocks(models: dict, tokenizer, data: Blocks, limit: int, batch_size: int, autocast: Callable) -> dict:
    """Measure extraction of training and of validation blocks, by model and split."""
    length = min(2 * PREFIX_TOKENS, data.block_size // 2 * 2, limit // 2 * 2)
    result = {name: {} for name in models}
    for split, blocks in (("train", data.train), ("validation", data.validation)):
        # Beginnings of blocks: training had these tokens at these very positions.
        rows = blocks[pick_evenly(range(len(blocks)), N_EXTRACTIONS)]["input_ids"][:, :length].tolist()
        for name, model in models.items():
            result[name][split] = measure_extraction(model, tokenizer.eos_token_id, rows, batch_size, autocast)
    return result


def compare_texts(
    samples: list[dict], data: Blocks, tokenizer, control: str, window_tokens: int, seed: int
) -> tuple[dict[str, Any], list[str]]:
    """Measure the samples and the author's text: copying, repetition, lengths, words and characters.

    Args:
        samples: rows of samples.jsonl.
        window_tokens: tokens per window of the author's text, as in a sample.
    """
    ids = {name: [np.array(s["generated_ids"], np.int64) for s in samples if s["model"] == name] for name in MODELS}
    texts = {name: [s["text"] for s in samples if s["model"] == name] for name in MODELS}
    whole, train = dict(ids), data.ids("train")
    if len(data.validation):
        whole["reference"] = data.segments("validation")
        ids["reference"] = data.windows("validation", window_tokens, N_WINDOWS)
        texts["reference"] = [tokenizer.decode(row) for row in ids["reference"]]
    book = train
    if len(train) > BOOK_TOKENS:
        book = np.concatenate(data.windows("train", BOOK_WINDOW, BOOK_TOKENS // BOOK_WINDOW))
    joined = {name: "\n".join(rows) for name, rows in texts.items()} | {"book": tokenizer.decode(book)}
    n_words = {name: len(stylometry.split_words(text)) for name, text in joined.items()}
    # Longer text has fewer new words: equal amounts are compared.
    fewest = min(len(rows) for rows in ids.values() if rows)
    fields = {
        "copy_rate": {name: ngrams.ngram_overlap(rows, train) for name, rows in whole.items()},
        "longest_copy": {name: describe_longest(rows, data, tokenizer) for name, rows in whole.items()},
        "repetition": {
            name: ngrams.measure_repetition([row.tolist() for row in pick_evenly(rows, fewest)])
            for name, rows in ids.items()
        },
        "lengths": {name: stylometry.measure_lengths(text) for name, text in joined.items()},
        "counts": {
            "texts": {name: len(rows) for name, rows in texts.items()},
            "tokens": {name: sum(map(len, rows)) for name, rows in whole.items()} | {"book": len(train)},
            "words": n_words,
        },
    }
    floors = dict.fromkeys(texts, stylometry.MIN_WORDS) | {"book": 2 * stylometry.WINDOW_WORDS}
    short = [f"{name} has {n_words[name]:,}" for name, floor in floors.items() if n_words[name] < floor]
    if short:
        need = f"Delta, AUC and the word table need about {stylometry.MIN_WORDS:,} words"
        return fields, [f"{need}: {', '.join(short)}"]
    windows = tokenizer.batch_decode(data.windows("train", window_tokens, N_WINDOWS))
    profile = stylometry.build_word_profile(joined["book"], control)
    if not profile.words:
        return fields, ["Delta, AUC and the word table: no frequent word of the book varies in its rate"]
    style, missing = compare_style(texts, profile, windows, min(n_words[name] for name in texts), seed)
    return fields | style, missing


def compare_style(
    texts: dict[str, list[str]], profile: stylometry.WordProfile, windows: list[str], n_words: int, seed: int
) -> tuple[dict[str, Any], list[str]]:
    """Measure Delta (of n_words words), AUC and the word table of texts, by column, against the book's."""
    words = {name: [stylometry.split_words(text) for text in rows] for name, rows in texts.items()}
    measured = {name: stylometry.measure_delta(rows, profile, n_words, seed) for name, rows in words.items()}
    n_texts, missing = min(map(len, texts.values())), []
    if min(len(windows), n_texts) < MIN_TEXTS:
        missing.append(f"AUC needs {MIN_TEXTS} texts of each kind; give a smaller --max-new-tokens")
    else:
        for name, rows in texts.items():
            measured[name]["auc"] = stylometry.measure_auc(windows, rows, n_texts, seed)
    fields = {"words": stylometry.tabulate_words(profile, words), "words_compared": n_words, "intervals": {}}
    for measure in measured["base"]:
        figures = {name: figures[measure] for name, figures in measured.items()}
        fields[measure] = {name: figure["value"] for name, figure in figures.items()}
        fields["intervals"][measure] = {name: [figure["low"], figure["high"]] for name, figure in figures.items()}
    return fields, missing


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
        ids, pieces, done = np.array(ids, np.int64), [], 0
        for start, end, position in ngrams.trace_spans(ids, train, SHOWN_NGRAM) if data else []:
            pieces.append({"text": tokenizer.decode(ids[done:start]), "source": None})
            source = spans.setdefault((position, end - start), len(spans))
            pieces.append({"text": tokenizer.decode(ids[max(start, done) : end]), "source": source})
            done = end
        pieces.append({"text": tokenizer.decode(ids[done:]), "source": None})
        return [piece for piece in pieces if piece["text"]]

    for prompt in prompts[:SHOWN_PROMPTS]:
        columns = {}
        for name in MODELS:
            shown = [s["generated_ids"] for s in samples if (s["model"], s["prompt"]) == (name, prompt["prompt"])]
            columns[name] = [cut_pieces(ids) for ids in shown][:SHOWN_SAMPLES]
        if prompt["next_ids"]:
            columns["reference"] = [cut_pieces(prompt["next_ids"])]
        rows.append({"prompt": prompt["prompt"], "has_reference": bool(prompt["next_ids"]), "columns": columns})
    return rows, [data.locate(position, tokens, tokenizer) for position, tokens in spans]


def make_quiz(samples: list[dict], data: Blocks, tokenizer, seed: int) -> dict[str, list]:
    """Choose snippets for the blind test, whose cut first and last words are left out; {} if there are too few."""
    rng = np.random.default_rng(seed)
    length = max((len(s["generated_ids"]) for s in samples), default=1)
    real = tokenizer.batch_decode(data.windows("validation", length, 3 * QUESTIONS)) if length > 1 else []
    made = [s["text"] for s in samples if s["model"] == "finetuned" and len(s["generated_ids"]) == length]
    kinds = rng.random(QUESTIONS) < 0.5
    if len(real) < QUESTIONS or len(made) < QUESTIONS:
        return {}
    chosen = {True: iter(rng.permutation(len(real))), False: iter(rng.permutation(len(made)))}
    quiz = []
    for is_real in kinds.tolist():
        text = (real if is_real else made)[next(chosen[is_real])]
        quiz.append({"text": re.sub(r"^\S*\s+|\s+\S*$", "", text), "is_real": is_real})
    intervals = [binomtest(right, QUESTIONS).proportion_ci() for right in range(QUESTIONS + 1)]
    return {"quiz": quiz, "quiz_intervals": [[float(bounds.low), float(bounds.high)] for bounds in intervals]}


def arrange_curves(
    rows: list[dict], best_step: int | None, max_copy_rate: float | None, copy_rate: dict
) -> dict[str, Any]:
    """Arrange the rows of metrics.jsonl as curves, thinned for a picture; {} without rows.

    A max_copy_rate of None becomes the default by the report's copy_rate.
    """
    if not rows:
        return {}
    train = [[row["step"], row["train/loss"]] for row in rows if "train/loss" in row]
    keys = {"loss": "eval/loss", "bits_per_byte": "eval/bits_per_byte", "copy_rate": "eval/copy_rate"}
    evals = [{"step": row["step"], **{name: row.get(key) for name, key in keys.items()}}
             for row in rows if "eval/loss" in row]  # fmt: skip
    if max_copy_rate is None and "reference" in copy_rate:
        max_copy_rate = default_copy_rate(copy_rate["reference"]["8"])
    return {"train": train[:: 1 + len(train) // CURVE_POINTS], "eval": evals, "best_step": best_step,
            "max_copy_rate": max_copy_rate}  # fmt: skip
