"""The report and its pages for people: report.json, terminal, Markdown, HTML, model card, quiz. Measures nothing.

The templates are in utils/evaluation/pages.
"""

import io
import itertools
import re
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich import box
from rich.console import Console
from rich.table import Table

from utils.evaluation.plots import draw_copying, draw_loss, render_svg
from utils.storage import write_json, write_text

FORMAT = 1
NAMES = {"base": "base model", "finetuned": "fine-tuned model", "reference": "author (reference)"}
PAGES = Path(__file__).parent / "pages"
MIN_COLUMN, MAX_WIDTH = 28, 150  # characters of a column of text, of a terminal's line
MIN_TABLE_WIDTH = 40
SHOWN_REFERENCES = 2  # validation prompts that the terminal shows


@dataclass(frozen=True)
class Report:
    """Content of report.json; a field that is None was not measured, and is absent there.

    A column is base, finetuned or reference (the author's own text). An interval is {value, low, high}.
    """

    verdict: list[str] = field(default_factory=list)
    flags: dict[str, bool | None] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)  # a sentence for each measure that was not possible
    other_book: bool = False  # the data is of another book than the model
    settings: dict[str, Any] = field(default_factory=dict)
    books: list[dict] = field(default_factory=list)
    n_samples: int = 0
    shown_ngram: int = 0  # tokens of the shortest copied span that is marked
    scores: dict[str, dict] = field(default_factory=dict)  # by "book" or "control", then column
    book_gain: dict[str, float] | None = None  # intervals, bits per byte
    control_gain: dict[str, float] | None = None
    style_gain: dict[str, float] | None = None
    forgetting: dict[str, float] | None = None  # interval, percent
    forgetting_percent: float | None = None
    extraction: dict[str, dict] | None = None  # by column, then split
    copy_rate: dict[str, dict] | None = None  # by column, then n-gram length
    longest_copy: dict[str, dict] | None = None
    repetition: dict[str, dict] | None = None
    lengths: dict[str, dict] | None = None
    counts: dict[str, dict] | None = None
    delta: dict[str, float] | None = None
    cosine_delta: dict[str, float] | None = None
    auc: dict[str, float] | None = None
    intervals: dict[str, dict] | None = None  # of delta, cosine_delta and auc, by column: [low, high]
    words: list[dict] | None = None
    words_compared: int | None = None
    max_copy: dict[str, int] | None = None
    training: dict[str, Any] = field(default_factory=dict)
    texts: list[dict] = field(default_factory=list)
    sources: list[dict] = field(default_factory=list)
    quiz: list[dict] = field(default_factory=list)
    quiz_intervals: list[list[float]] = field(default_factory=list)
    card_metadata: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the content of report.json."""
        return {"format": FORMAT} | {name: value for name, value in vars(self).items() if value is not None}


def write_report(folder: Path, samples: str, report: Report) -> None:
    """Write samples.jsonl, report.json and the pages into a folder.

    The model card is written only into a run's folder: the README.md of another project stays.
    """
    report = replace(report, card_metadata=describe_card(report))
    write_text(folder / "samples.jsonl", samples)
    write_json(folder / "report.json", report.to_dict())
    pages = {"report.html": "report.html", "report.md": "report.md"}
    if report.quiz:
        pages["quiz.html"] = "quiz.html"
    else:
        (folder / "quiz.html").unlink(missing_ok=True)  # of an earlier report
    if (folder / "run_config.json").is_file():
        pages["card.md"] = "README.md"
    for template, name in pages.items():
        write_text(folder / name, render_page(template, report))


def describe_card(report: Report) -> str:
    """Return the metadata at the head of a model card, as YAML for the hub."""
    base, scores = report.settings["base_model"], report.scores.get("book", {}).get("finetuned", {})
    results = [
        EvalResult("text-generation", "text", "validation text of the book", key.removeprefix("eval/"), round(value, 6))
        for key, value in scores.items()
    ]
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base):  # the hub refuses a path as a name
        base = Path(base).name
    return ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=["gpt2", "fine-tuned-on-a-book"],
        base_model=base, model_name=Path(report.settings["finetuned_model"]).name, eval_results=results or None,
    ).to_yaml()  # fmt: skip


def list_scores(report: Report) -> list[dict[str, str]]:
    """Return the scores as rows of label, hint and one text per column."""

    def pick(figures: dict | None, key: str) -> dict:
        return {name: column[key] for name, column in (figures or {}).items()}

    def add_interval(measure: str) -> dict[str, str]:
        values, bounds = getattr(report, measure) or {}, (report.intervals or {}).get(measure)
        return {name: "{:.3f} [{:.3f}, {:.3f}]".format(value, *bounds[name]) for name, value in values.items()}

    book, control = report.scores.get("book"), report.scores.get("control")
    train, validation = pick(report.extraction, "train"), pick(report.extraction, "validation")
    own = {key: f"the book has {value:.1f}" for key, value in (report.lengths or {}).get("book", {}).items() if value}
    lower, nearer = "lower is better", "words; nearer to the author is better"
    table = [
        ("validation text: loss, nats per token", lower, "{:.4f}", pick(book, "eval/loss")),
        ("validation text: perplexity", lower, "{:.2f}", pick(book, "eval/perplexity")),
        ("validation text: bits per byte", lower, "{:.4f}", pick(book, "eval/bits_per_byte")),
        ("general text: bits per byte", lower, "{:.4f}", pick(control, "eval/bits_per_byte")),
        ("Burrows' Delta", nearer, "{}", add_interval("delta")),
        ("cosine Delta", nearer, "{}", add_interval("cosine_delta")),
        ("AUC against the book", "characters; 0.5: cannot be told apart", "{}", add_interval("auc")),
        ("tokens in n-grams of 8+", "share, found in the training text", "{:.2%}", pick(report.copy_rate, "8")),
        ("tokens in n-grams of 16+", "share, found in the training text", "{:.2%}", pick(report.copy_rate, "16")),
        ("tokens in n-grams of 32+", "share, found in the training text", "{:.2%}", pick(report.copy_rate, "32")),
        ("longest copied span", "tokens", "{:,}", pick(report.longest_copy, "tokens")),
        ("continued verbatim, training", "share of blocks", "{:.0%}", pick(train, "exact_match")),
        ("tokens before a difference, training", "mean", "{:.2f}", pick(train, "mean_matched")),
        ("continued verbatim, validation", "share of blocks", "{:.0%}", pick(validation, "exact_match")),
        ("tokens before a difference, validation", "mean", "{:.2f}", pick(validation, "mean_matched")),
        ("repeated 4-grams", "share", "{:.1%}", pick(report.repetition, "repeated_4grams")),
        ("distinct tokens", "share", "{:.1%}", pick(report.repetition, "distinct_1")),
        ("distinct pairs", "share", "{:.1%}", pick(report.repetition, "distinct_2")),
        ("samples that end in a loop", "share", "{:.1%}", pick(report.repetition, "loops")),
        ("words per sentence", own.get("sentence_words", ""), "{:.1f}", pick(report.lengths, "sentence_words")),
        ("words per paragraph", own.get("paragraph_words", ""), "{:.1f}", pick(report.lengths, "paragraph_words")),
    ]
    rows = []
    for label, hint, form, values in table:
        cells = {name: "" if values.get(name) is None else form.format(values[name]) for name in NAMES}
        if any(cells.values()):
            rows.append({"label": label, "hint": hint, **cells})
    return rows


def render_terminal(report: Report, width: int | None = None) -> str:
    """Return scores, the first texts and the verdict as plain text of lines no wider than the terminal."""
    width = width or min(shutil.get_terminal_size((100, 24)).columns, MAX_WIDTH)
    # No terminal and no colors, whatever the environment says: the same text in a file, a pipe and a terminal.
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, markup=False,
                      emoji=False, highlight=False)  # fmt: skip
    if report.scores:  # figures are never cut off: a very narrow terminal wraps the lines
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
        table.add_column("", overflow="fold")
        for name in ("base", "fine-tuned", "author"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in list_scores(report):
            table.add_row(row["label"], *(row[name].split(" [")[0] for name in NAMES))
        console.width = max(width, MIN_TABLE_WIDTH)
        console.print(table)
        console.width = width
    shown = [row for row in report.texts if not row["has_reference"]]
    shown += [row for row in report.texts if row["has_reference"]][:SHOWN_REFERENCES]
    for row in shown:
        prompt = make_printable(row["prompt"]) or "(none)"
        console.print("", "=" * width, f"prompt: {prompt}", "=" * width, sep="\n")
        for texts in itertools.zip_longest(*row["columns"].values()):
            named = zip(row["columns"], texts, strict=True)
            plain = {name: "".join(piece["text"] for piece in text) for name, text in named if text is not None}
            _print_texts(console, {NAMES[name]: make_printable(text) for name, text in plain.items()})
    sentences = [*report.verdict, *(f"not measured: {reason}" for reason in report.missing)]
    console.print("", *map(make_printable, sentences), sep="\n")
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def _print_texts(console: Console, texts: dict[str, str]) -> None:
    """Print texts side by side, or below each other in a narrow terminal."""
    column = (console.width - 3 * (len(texts) - 1)) // len(texts)
    if column < MIN_COLUMN:
        console.print(*(f"[{name}]\n{text}\n" for name, text in texts.items()), sep="\n")
        return
    table = Table(box=box.ASCII, show_edge=False, pad_edge=False)
    for name in texts:
        table.add_column(name, width=column, overflow="fold")
    table.add_row(*texts.values())
    console.print(table)


def make_printable(text: str) -> str:
    """Replace control characters, which could command a terminal, and drop line feeds at both ends."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text.strip("\n"))


def render_page(name: str, report: Report) -> str:
    """Fill one of the templates: report.html, report.md, quiz.html or card.md."""
    environment = Environment(
        loader=FileSystemLoader(PAGES), autoescape=name.endswith(".html"), undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"quote": quote, "cell": lambda text: escape(str(text)).replace("\n", " ")}
    plots = draw_plots(report) if name == "report.html" else []
    return environment.get_template(name).render(report=report, scores=list_scores(report), names=NAMES, plots=plots)


def draw_plots(report: Report) -> list[str]:
    """Return the curves of the training as SVG: the loss by step, and style against copying."""
    evals, plots, best = report.training.get("eval", []), [], report.training.get("best_step")
    if len(evals) > 1:
        validation = [(row["step"], row["loss"]) for row in evals]
        plots.append(render_svg(draw_loss(report.training["train"], validation, best), "loss"))
    copied = [row for row in evals if row["copy_rate"] is not None]
    if len(copied) > 1:
        plots.append(render_svg(draw_copying(copied, best, report.training["max_copy_rate"]), "copying"))
    return plots


def escape(text: str) -> str:
    """Escape the characters that are markup in Markdown."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>#|~" else c for c in text)


def quote(text: str) -> str:
    """Quote a text for Markdown, line by line: "a\\nb" -> "> a  \\n> b  "."""
    return "\n".join(f"> {line}  " if line else ">" for line in escape(text.strip("\n")).split("\n"))
