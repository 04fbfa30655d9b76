"""Pages for people, from report.json alone: verdict, terminal, Markdown, HTML, model card, quiz.

Measures nothing. The thresholds of the verdict stand here, in one place. The pages are in utils/evaluation/pages.
"""

import itertools
import math
import shutil
import textwrap
from pathlib import Path

FORGETS_A_LITTLE, FORGETS = 1, 20  # percent more bits for general text
RECITES = 0.1  # of the training segments continued word for word
LOOPS = 0.1  # of the samples
NAMES = {"base": "base model", "finetuned": "fine-tuned model", "reference": "the author really wrote"}
PAGES = Path(__file__).parent / "pages"


def judge(report: dict) -> tuple[list[str], dict[str, bool | None]]:
    """Put the figures into sentences.

    Returns:
        The verdict, most important first, and its flags learned_the_book, copies, recites and forgot; None where it
        was not measured.
    """
    flags = {"learned_the_book": None, "copies": None, "recites": None, "forgot": None}
    sentences = [_judge_gain(report, flags)] if "book_gain" in report else []
    if report.get("other_book"):
        sentences.insert(0, "A control: the held-out pages are of another book than the model was trained on.")
    if "copy_rate" in report:
        sentences.append(_judge_copying(report, flags))
    if "extraction" in report:
        train, validation = (report["extraction"]["finetuned"][split] for split in ("train", "reference"))
        flags["recites"] = train["exact_match"] >= RECITES and train["exact_match"] > validation["exact_match"]
        case = (f"given the beginnings of {train['prefixes']} segments it was trained on, it goes on word for word, "
                f"{train['tokens']} tokens long, in {train['exact_match']:.0%} of cases")  # fmt: skip
        sentences.append(
            f"It recites: {case}. Do not share it." if flags["recites"] else f"It does not recite: {case}."
        )
    if "forgetting_percent" in report:
        percent = report["forgetting_percent"]
        flags["forgot"] = percent >= FORGETS
        amount = "much" if percent >= FORGETS else "little" if percent >= FORGETS_A_LITTLE else "nothing"
        change = f"{abs(percent):.1f}% {'more' if percent >= 0 else 'fewer'} bits than before"
        sentences.append(f"It forgot {amount}: general text costs {change}.")
    loops = report.get("repetition", {}).get("finetuned", {}).get("loops") or 0
    if loops >= LOOPS:
        sentences.append(f"{loops:.0%} of its samples end in a loop; a higher --temperature helps.")
    if "max_copy" in report:
        limit = report["max_copy"]
        sentences.append(f"--max-copy {limit['tokens']} forbade something before {limit['acted']:,} of the "
                         f"{limit['generated']:,} tokens of both models.")  # fmt: skip
    return sentences, flags


def _judge_gain(report: dict, flags: dict) -> str:
    """Say what the likelihood of unseen pages supports, and no more."""
    book, style = report["book_gain"], report.get("style_gain")
    cost = f"unseen pages cost {abs(book['value']):.2f} bits per byte {'less' if book['value'] > 0 else 'more'}"
    cost += " than for the base model"
    flags["learned_the_book"] = book["low"] > 0 and (style is None or style["low"] > 0)
    if flags["learned_the_book"]:
        return f"It learned the book: {cost}."
    if book["low"] > 0:
        general = report["control_gain"]["value"]
        return (f"It learned nothing of this book alone: {cost}, and general text "
                f"{abs(general):.2f} {'less' if general > 0 else 'more'}.")  # fmt: skip
    return f"It did not learn the book: {cost} (interval of the gain {book['low']:.2f} to {book['high']:.2f})."


def _judge_copying(report: dict, flags: dict) -> str:
    from utils.evaluation.loss import default_copy_rate

    rates, longest = report["copy_rate"], report["longest_copy"]["finetuned"]["tokens"]
    own, rate = rates.get("reference", {}).get("8"), rates["finetuned"]["8"] or 0.0
    flags["copies"] = rate > default_copy_rate(own or 0.0)
    author = f"; the author's own unseen pages share {own:.1%}" if own is not None else ""
    return (f"It copies {'much' if flags['copies'] else 'little'}: {rate:.1%} of its tokens stand in runs of 8 or more "
            f"of the book, the longest {longest} tokens{author}.")  # fmt: skip


def list_scores(report: dict) -> list[dict]:
    """Return the scores as rows of label, hint and a text for base, finetuned and reference."""
    rows = []

    def add(label, hint, values, form, intervals=None):
        cells = {}
        for name in ("base", "finetuned", "reference"):
            value = (values or {}).get(name)
            cells[name] = "" if value is None else form.format(value)
            if value is not None and intervals:
                cells[name] += " [" + ", ".join(form.format(end) for end in intervals[name]) + "]"
        if any(cells.values()):
            rows.append({"label": label, "hint": hint, **cells})

    for text, what in (("book", "held-out pages"), ("control", "general text")):
        for key, label, form in (("loss", "loss, nats a token", "{:.4f}"), ("perplexity", "perplexity", "{:.2f}"),
                                 ("bits_per_byte", "bits per byte", "{:.4f}")):  # fmt: skip
            scores = report.get("scores", {}).get(text, {})
            if text == "book" or key == "bits_per_byte":
                values = {name: score[f"eval/{key}"] for name, score in scores.items()}
                add(f"{what}: {label}", "lower is better", values, form)
    for key, label, hint in (("delta", "Burrows' Delta", "words; nearer the author is better"),
                             ("cosine_delta", "cosine Delta", "words; nearer the author is better"),
                             ("auc", "told from the book, AUC", "characters; 0.5 cannot be told apart")):  # fmt: skip
        add(label, hint, report.get(key), "{:.3f}", report.get("intervals", {}).get(key))
    for length in ("8", "16", "32"):
        rates = {name: rates[length] for name, rates in report.get("copy_rate", {}).items()}
        add(f"copied in runs of {length}+", "share of tokens", rates, "{:.2%}")
    longest = {name: run["tokens"] for name, run in report.get("longest_copy", {}).items()}
    add("longest copied run", "tokens", longest, "{:,}")
    for split, what in (("train", "trained"), ("reference", "unseen")):
        found = {name: figures[split] for name, figures in report.get("extraction", {}).items()}
        exact, matched = ({name: f[key] for name, f in found.items()} for key in ("exact_match", "mean_matched"))
        add(f"continued word for word, {what}", "share of segments", exact, "{:.0%}")
        add(f"tokens before it differs, {what}", "mean", matched, "{:.2f}")
    for key, label in (("repeated_4grams", "repeated 4-grams"), ("distinct_1", "distinct tokens"),
                       ("distinct_2", "distinct pairs"), ("loops", "ends in a loop")):  # fmt: skip
        shares = {name: figures[key] for name, figures in report.get("repetition", {}).items()}
        add(label, "share, in the samples", shares, "{:.1%}")
    for key, label in (("sentence_words", "words a sentence"), ("paragraph_words", "words a paragraph")):
        lengths = {name: figures[key] for name, figures in report.get("lengths", {}).items()}
        book = lengths.get("book")
        add(label, f"the book has {book:.1f}" if book else "", lengths, "{:.1f}")
    return rows


def render_terminal(report: dict, width: int | None = None) -> str:
    """Lay out verdict, scores and the first texts, side by side or below each other in a narrow terminal."""
    width = width or min(shutil.get_terminal_size((100, 24)).columns, 150)
    lines = [f"{'':<34}{'base':>14}{'fine-tuned':>14}{'author':>14}"] if report["scores"] else []
    for row in list_scores(report):
        cells = [row[name].split(" [")[0] for name in ("base", "finetuned", "reference")]
        lines.append(f"{row['label']:<34}" + "".join(f"{cell:>14}" for cell in cells))
    shown = [row for row in report["texts"] if not row["has_reference"]]
    shown += [row for row in report["texts"] if row["has_reference"]][:2]
    for row in shown:
        lines += ["", "=" * width, *_wrap(f"prompt: {row['prompt'] or '(none)'}", width), "=" * width]
        for texts in itertools.zip_longest(*row["columns"].values()):
            named = zip(row["columns"], texts, strict=True)
            lines += _columns({NAMES[name]: join(text) for name, text in named if text is not None}, width)
    lines += ["", *(line for sentence in report["verdict"] for line in textwrap.wrap(sentence, width))]
    lines += [line for reason in report["missing"] for line in textwrap.wrap(f"not measured: {reason}", width)]
    return "\n".join(lines)


def join(pieces: list[dict]) -> str:
    """Return a text from its pieces."""
    return "".join(piece["text"] for piece in pieces)


def _columns(texts: dict[str, str], width: int) -> list[str]:
    column = (width - 3 * (len(texts) - 1)) // len(texts)
    if column < 28:
        return [line for name, text in texts.items() for line in (f"[{name}]", *_wrap(text, width), "")]
    cells = [[name, "-" * len(name), *_wrap(text, column)] for name, text in texts.items()]
    rows = itertools.zip_longest(*cells, fillvalue="")
    return [" | ".join(cell.ljust(column) for cell in row).rstrip() for row in rows]


def _wrap(text: str, width: int) -> list[str]:
    printable = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text.strip("\n"))
    return [line for part in printable.split("\n") for line in textwrap.wrap(part, width) or [""]]


def render_page(name: str, report: dict) -> str:
    """Fill one of the templates in utils/evaluation/pages: report.html, report.md, quiz.html or card.md."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(PAGES), autoescape=name.endswith(".html"), undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {
        "quote": quote,
        "cell": lambda text: escape(str(text)).replace("\n", " "),
        "join_text": join,
    }
    return environment.get_template(name).render(
        report=report, scores=list_scores(report), names=NAMES, plots=draw_plots(report)
    )


def escape(text: str) -> str:
    """Take their meaning from the characters that are markup in Markdown."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>#|~" else c for c in text)


def quote(text: str) -> str:
    """Quote a text so that Markdown shows it as it is, line by line."""
    return "\n".join(f"> {line}  " if line else ">" for line in escape(text.strip("\n")).split("\n"))


def draw_plots(report: dict) -> list[dict]:
    """Turn the training's curves into coordinates: the loss by step, and style against copying."""
    training, plots = report.get("training") or {}, []
    evals, best = training.get("eval", []), training.get("best_step")
    if len(evals) > 1:
        validation = [(row["step"], row["loss"], f"step {row['step']}: {row['loss']:.3f}") for row in evals]
        train = [(step, loss, "") for step, loss in training["train"]]
        plots.append(_plot("Loss (nats a token) by step", "step", "loss", {"training": train, "held-out": validation},
                           {"base model": evals[0]["loss"]}, None, best))  # fmt: skip
    copied = [(100 * row["copy_rate"], row["bits_per_byte"], f"step {row['step']}") for row in evals
              if row["copy_rate"] is not None]  # fmt: skip
    if len(copied) > 1:
        limit = {"allowed": 100 * training["max_copy_rate"]} if training.get("max_copy_rate") else {}
        plots.append(_plot("Style against copying, from the base model on", "% of a small sample copied",
                           "bits per byte, held-out", {"held-out": copied}, {}, limit, best))  # fmt: skip
    return plots


def _plot(title, x_label, y_label, curves, levels, limits, best) -> dict:
    """Scale curves of (x, y, name) to a picture of 640 x 300, levels across and limits up."""
    xs = [x for curve in curves.values() for x, _, _ in curve] + list((limits or {}).values())
    ys = [y for curve in curves.values() for _, y, _ in curve] + list(levels.values())
    left, right, top, bottom = 52, 628, 12, 258
    x_low, x_high, y_low, y_high = min(xs), max(xs), min(ys), max(ys)

    def place_x(x):
        return round(left + (right - left) * (x - x_low) / ((x_high - x_low) or 1), 1)

    def place_y(y):
        return round(bottom - (bottom - top) * (y - y_low) / ((y_high - y_low) or 1), 1)

    def ticks(low, high, place):
        step = 10 ** math.floor(math.log10((high - low) or 1))
        step *= next(factor for factor in (0.2, 0.5, 1, 2) if (high - low) / (step * factor) <= 7)
        first = math.ceil(low / step - 1e-9)
        return [(place(i * step), f"{i * step:g}") for i in range(first, math.floor(high / step + 1e-9) + 1)]

    drawn = {name: [{"x": place_x(x), "y": place_y(y), "name": label, "best": label.split(":")[0] == f"step {best}"}
                    for x, y, label in curve] for name, curve in curves.items()}  # fmt: skip
    return {"title": title, "x_label": x_label, "y_label": y_label, "curves": drawn,
            "levels": {name: place_y(y) for name, y in levels.items()},
            "limits": {name: place_x(x) for name, x in (limits or {}).items()},
            "x_ticks": ticks(x_low, x_high, place_x), "y_ticks": ticks(y_low, y_high, place_y)}  # fmt: skip
