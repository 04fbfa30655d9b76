"""The figures of report.json: base, fine-tuned model and author, measured on the same things.

Each function returns a part of the report. What cannot be measured is left out, and why is added to
`missing`. How a figure is calculated is stylometry.py's, ngrams.py's and evaluation.py's to know.
"""

import hashlib
import json
import re
from pathlib import Path

import numpy as np

from utils.data.blocks import pick_evenly
from utils.evaluation import ngrams, stylometry
from utils.evaluation.loss import (
    PREFIX_TOKENS,
    cut_blocks,
    default_copy_rate,
    measure_extraction,
    measure_gain,
    score_blocks,
    summarize_loss,
)
from utils.evaluation.report import judge, render_page
from utils.model.hub import position_limit
from utils.storage import read_json, write_json, write_text
from utils.training.metrics import read_metrics

MODELS = ("base", "finetuned")
N_WINDOWS = 200  # of training and of held-out text, as long as a sample, are compared with the samples
MIN_TEXTS = 10  # a classifier needs of each kind
BOOK_TOKENS = 2_000_000  # of a larger training text, windows of so many tokens in all show its words
MIN_BLOCKS = 5
EXTRACTIONS = 50
SHOWN_NGRAM = ngrams.NGRAM_LENGTHS[0]  # tokens: the shortest copied run that the page marks
SHOWN_PROMPTS, SHOWN_SAMPLES, CURVE_POINTS = 24, 3, 300
QUESTIONS = 10


def score_models(models: dict, tokenizer, data, control: str, args, autocast, missing: list, progress) -> dict:
    """Measure what needs the models: held-out loss, style gain, forgetting, extraction.

    Args:
        models: base and finetuned on their device, by name.
        tokenizer: of both.
        data: the Blocks, or None.
        control: general text, or "".
        args: the flags batch_size and seed.
        autocast: function that gives the context to compute in.
        missing: receives sentences.
        progress: called with a number of blocks just scored.
    """
    limit = min(position_limit(model.config.to_dict()) or 1 << 30 for model in models.values())
    blocks = {"control": cut_blocks(control, tokenizer, min(data.block_size if data else 128, limit))}
    if data:
        blocks["book"] = data.validation, data.bytes_per_token
    part, scored = {"scores": {}}, {}
    for text, (rows, bytes_per_token) in blocks.items():
        if not len(rows):
            continue
        nats, part["scores"][text] = {"bytes": bytes_per_token * (rows[0]["input_ids"].numel() - 1)}, {}
        for name, model in models.items():
            # One block a forward pass: each has a loss of its own, and the bootstrap draws blocks.
            nats[name], n_targets = score_blocks(model, rows, 1, autocast, progress)
            part["scores"][text][name] = summarize_loss(sum(nats[name]), n_targets, bytes_per_token)
        if len(rows) >= MIN_BLOCKS:
            scored[text] = nats
    for text, what in (("book", "held-out segments of the book"), ("control", "general text")):
        if text not in scored:
            missing.append(f"the gain on {what}: there are {len(blocks.get(text, [[]])[0])} blocks of it, "
                           f"{MIN_BLOCKS} are needed")  # fmt: skip
    part |= measure_gain(scored, args.seed)
    if "forgetting" in part:
        part["forgetting_percent"] = part["forgetting"]["value"]
    if data and len(data.validation):
        part["extraction"] = extract(models, tokenizer, data, limit, args.batch_size, autocast)
    return part


def extract(models: dict, tokenizer, data, limit: int, batch_size: int, autocast) -> dict:
    """Let both models continue the beginnings of blocks that were, and that were not, trained on."""
    length, result = min(2 * PREFIX_TOKENS, data.block_size // 2 * 2, limit // 2 * 2), {}
    for name, model in models.items():
        result[name] = {}
        for split, blocks in (("train", data.train), ("reference", data.validation)):
            # Beginnings of blocks: a model that learned by heart saw these tokens at these very positions.
            rows = blocks[pick_evenly(range(len(blocks)), EXTRACTIONS)]["input_ids"][:, :length].tolist()
            result[name][split] = measure_extraction(model, tokenizer.eos_token_id, rows, batch_size, autocast)
    return result


def compare_texts(samples: list[dict], data, tokenizer, control: str, args, missing: list) -> dict:
    """Measure what needs the samples alone: copying, repetition, lengths, words and characters.

    Args:
        samples: rows of samples.jsonl.
        data: the Blocks.
        tokenizer: turns the author's ids into text.
        control: general text, or "".
        args: the flags max_new_tokens (what the author wrote is cut into windows of as many) and seed.
        missing: receives sentences.
    """
    ids = {name: [np.array(s["generated_ids"], np.int64) for s in samples if s["model"] == name] for name in MODELS}
    texts = {name: [s["text"] for s in samples if s["model"] == name] for name in MODELS}
    sources, train = dict(ids), data.ids("train")
    if len(data.validation):
        sources["reference"] = data.segments("validation")
        ids["reference"] = data.windows("validation", args.max_new_tokens, N_WINDOWS)
        texts["reference"] = [tokenizer.decode(row) for row in ids["reference"]]
    # The more text, the fewer new words in it: equal amounts are compared.
    fewest = min(len(rows) for rows in ids.values() if rows)
    part = {
        "copy_rate": {name: ngrams.ngram_overlap(source, train) for name, source in sources.items()},
        "longest_copy": {name: describe_longest(source, data, tokenizer) for name, source in sources.items()},
        "repetition": {
            name: ngrams.measure_repetition([row.tolist() for row in pick_evenly(rows, fewest)])
            for name, rows in ids.items()
        },
        "lengths": {name: stylometry.measure_lengths("\n".join(texts[name])) for name in texts},
    }
    is_book = len(train) <= BOOK_TOKENS
    book = tokenizer.decode(train if is_book else np.concatenate(data.windows("train", 1000, BOOK_TOKENS // 1000)))
    part["lengths"]["book"] = stylometry.measure_lengths(book)
    part["counts"] = {
        "texts": {name: len(rows) for name, rows in texts.items()},
        "tokens": {name: sum(map(len, rows)) for name, rows in sources.items()} | {"book": len(train)},
        "words": {name: len(stylometry.split_words("\n".join(rows))) for name, rows in texts.items()}
        | {"book": len(stylometry.split_words(book))},
    }
    return part | compare_style(texts, book, data, tokenizer, control, args, part["counts"]["words"], missing)


def compare_style(texts, book, data, tokenizer, control, args, n_words, missing) -> dict:
    """Measure Delta, AUC and the word table, if there is enough text for figures that mean something."""
    floor = dict.fromkeys(texts, stylometry.MIN_WORDS) | {"book": 2 * stylometry.WINDOW_WORDS}
    short = [f"{name} has {n_words[name]:,}" for name in floor if n_words[name] < floor[name]]
    if short:
        missing.append(f"Delta, AUC and the word table need about {stylometry.MIN_WORDS:,} words: {', '.join(short)}")
        return {}
    profile, least = stylometry.build_word_profile(book, control), min(n_words[name] for name in texts)
    words = {name: [stylometry.split_words(text) for text in texts[name]] for name in texts}
    windows = tokenizer.batch_decode(data.windows("train", args.max_new_tokens, N_WINDOWS))
    measured = {name: stylometry.measure_delta(rows, profile, least, args.seed) for name, rows in words.items()}
    if min(len(windows), *map(len, texts.values())) < MIN_TEXTS:
        missing.append(f"AUC needs {MIN_TEXTS} texts of each kind; give a smaller --max-new-tokens")
    else:
        fewest = min(map(len, texts.values()))
        for name, rows in texts.items():
            measured[name]["auc"] = stylometry.measure_auc(windows, rows, fewest, args.seed)
    part = {"words": stylometry.tabulate_words(profile, words), "words_compared": least, "intervals": {}}
    for measure in measured["base"]:
        part[measure] = {name: figures[measure]["value"] for name, figures in measured.items()}
        part["intervals"][measure] = {
            name: [figures[measure]["low"], figures[measure]["high"]] for name, figures in measured.items()
        }
    return part


def describe_longest(texts: list[np.ndarray], data, tokenizer) -> dict:
    """Return the longest run shared with training: its tokens, its text, its place in the book."""
    tokens, _, _, place = ngrams.longest_overlap(texts, data.ids("train"))
    return data.locate(place, tokens, tokenizer) if tokens else {"tokens": 0, "text": ""}


def lay_out(prompts: list[dict], samples: list[dict], data, tokenizer) -> dict:
    """Arrange the texts for people: by prompt in columns, what is copied marked with its place in the book.

    Returns:
        texts: a list of prompt, has_reference and columns (base, finetuned, and reference: what the author wrote), each
        a list of texts, each a list of pieces with text and place (a number in places, or None);
        places: what was copied from where, with the words around it.
    """
    train, places, rows = data.ids("train") if data else None, {}, []

    def cut(ids):
        ids, pieces, done = np.array(ids, np.int64), [], 0
        for start, end, place in ngrams.trace_spans(ids, train, SHOWN_NGRAM) if data else []:
            pieces.append({"text": tokenizer.decode(ids[done:start]), "place": None})
            number = places.setdefault((place, end - start), len(places))
            pieces.append({"text": tokenizer.decode(ids[max(start, done) : end]), "place": number})
            done = end
        return [piece for piece in [*pieces, {"text": tokenizer.decode(ids[done:]), "place": None}] if piece["text"]]

    for prompt in prompts[:SHOWN_PROMPTS]:
        columns = {
            name: [cut(s["generated_ids"]) for s in samples if (s["model"], s["prompt"]) == (name, prompt["prompt"])]
            for name in MODELS
        }
        columns = {name: texts[:SHOWN_SAMPLES] for name, texts in columns.items()}
        if prompt["next_ids"]:
            columns["reference"] = [cut(prompt["next_ids"])]
        rows.append({"prompt": prompt["prompt"], "has_reference": bool(prompt["next_ids"]), "columns": columns})
    described = [data.locate(place, tokens, tokenizer) for place, tokens in places]
    return {"texts": rows, "places": described}


def make_quiz(samples: list[dict], data, tokenizer, seed: int) -> list[dict]:
    """Choose snippets for the blind test: text and is_real; [] when there are too few.

    A snippet begins after the first white space and ends with a word, so that no cut word gives it away.
    """
    draw = np.random.default_rng(seed)
    length = max((len(s["generated_ids"]) for s in samples), default=1)
    real = tokenizer.batch_decode(data.windows("validation", length, 3 * QUESTIONS)) if length > 1 else []
    made = [s["text"] for s in samples if s["model"] == "finetuned" and len(s["generated_ids"]) == length]
    kinds = draw.random(QUESTIONS) < 0.5
    if len(real) < QUESTIONS or len(made) < QUESTIONS:
        return []
    chosen = {True: iter(draw.permutation(len(real))), False: iter(draw.permutation(len(made)))}
    quiz = []
    for is_real in kinds.tolist():
        text = (real if is_real else made)[next(chosen[is_real])]
        quiz.append({"text": re.sub(r"^\S*\s+|\s+\S*$", "", text), "is_real": is_real})
    return quiz


def read_training(folder: Path, copy_rate: dict) -> dict:
    """Return the curves of a run's metrics.jsonl, thinned to what a picture shows; {} without one.

    Returns:
        train: [step, loss] pairs; eval: rows of step, loss, bits_per_byte and copy_rate (None where not measured);
        best_step; max_copy_rate, which the run allowed.
    """
    rows = read_metrics(folder)
    if not rows:
        return {}
    train = [[row["step"], row["train/loss"]] for row in rows if "train/loss" in row]
    keys = {"loss": "eval/loss", "bits_per_byte": "eval/bits_per_byte", "copy_rate": "eval/copy_rate"}
    evals = [{"step": row["step"], **{name: row.get(key) for name, key in keys.items()}}
             for row in rows if "eval/loss" in row]  # fmt: skip
    results, config = ((folder / name) for name in ("all_results.json", "run_config.json"))
    best = read_json(results).get("best_step") if results.is_file() else None
    limit = read_json(config).get("settings", {}).get("max_copy_rate") if config.is_file() else None
    if limit is None and "reference" in copy_rate:
        limit = default_copy_rate(copy_rate["reference"]["8"])
    return {"train": train[:: 1 + len(train) // CURVE_POINTS], "eval": evals, "best_step": best, "max_copy_rate": limit}


def write_report(folder: Path, samples: list[dict], report: dict) -> dict:
    """Judge the figures, and write samples.jsonl, report.json and the pages into a folder.

    The model card is written only where finetune_generative.py has been: another's README.md stays.

    Returns:
        The report, complete.
    """
    from scipy.stats import binomtest

    lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    report["settings"]["samples_sha256"] = hashlib.sha256(lines.encode()).hexdigest()
    report["verdict"], report["flags"] = judge(report)
    n_questions = len(report["quiz"])
    intervals = [binomtest(right, n_questions).proportion_ci() for right in range(n_questions + 1) if n_questions]
    report["quiz_intervals"] = [[float(bounds.low), float(bounds.high)] for bounds in intervals]
    report["card_metadata"] = describe_card(report)
    write_text(folder / "samples.jsonl", lines)
    write_json(folder / "report.json", report)
    pages = {"report.html": "report.html", "report.md": "report.md"}
    if report["quiz"]:
        pages["quiz.html"] = "quiz.html"
    else:
        (folder / "quiz.html").unlink(missing_ok=True)  # of another run: its snippets are not these models'
    pages |= {"card.md": "README.md"} if (folder / "run_config.json").is_file() else {}
    for template, name in pages.items():
        write_text(folder / name, render_page(template, report))
    return report


def describe_card(report: dict) -> str:
    """Return the metadata that the hub reads at the head of a model card, as YAML."""
    from huggingface_hub import EvalResult, ModelCardData

    base, scores = report["settings"]["base_model"], report["scores"].get("book", {}).get("finetuned", {})
    results = [
        EvalResult("text-generation", "text", "held-out pages of the book", key.removeprefix("eval/"), round(value, 6))
        for key, value in scores.items()
    ]
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base):  # the hub refuses what cannot be a name there
        base = Path(base).name
    return ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=["gpt2", "fine-tuned-on-a-book"],
        base_model=base, model_name=Path(report["settings"]["finetuned_model"]).name, eval_results=results or None,
    ).to_yaml()  # fmt: skip
