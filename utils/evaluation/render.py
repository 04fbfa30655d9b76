"""The report for people: terminal, Markdown, HTML, model card, quiz. Measures nothing.

The templates are in utils/evaluation/pages.
"""

import io
import itertools
import re
import shutil
import unicodedata
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData, metadata_load
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich import box
from rich.console import Console
from rich.table import Table

from utils.data.text import make_printable
from utils.errors import UserError
from utils.evaluation.plots import draw_copying, draw_loss, draw_parts, render_svg
from utils.evaluation.report import NAMES, Report, list_columns, list_quarters, list_scores
from utils.storage import read_json, write_json, write_text

PAGES = Path(__file__).parent / "pages"
MIN_COLUMN, MAX_WIDTH = 28, 150  # characters of a column of text, of a terminal's line
MIN_TABLE_WIDTH = 40
SHOWN_REFERENCES = 2  # validation prompts that the terminal shows
TERMS = ("language", "license", "license_name", "license_link")  # of a model card
# Of a line, what Markdown would read as the start of a list, a heading's underline or a table's.
BLOCK_START = re.compile(r"[-+=:]|\d+(?=[.)])")


def has_measures(folder: Path) -> bool:
    """Say whether the report in a folder has measures."""
    with suppress(UserError):  # none, or damaged
        return bool(read_json(folder / "report.json").get("settings", {}).get("measure"))
    return False


def write_report(folder: Path, report: Report) -> None:
    """Write report.json and the pages into a folder.

    The model card is written only into a run's folder: the README.md of another project stays.
    """
    report = replace(report, card_metadata=describe_card(report, read_json(folder / "config.json")["model_type"]))
    write_json(folder / "report.json", report.to_dict())
    pages = {"report.html": "report.html", "report.md": "report.md"}
    if report.quiz_pairs:
        pages["quiz.html"] = "quiz.html"
    else:
        (folder / "quiz.html").unlink(missing_ok=True)  # of an earlier report
    if (folder / "run_config.json").is_file():
        pages["card.md"] = "README.md"
    for template, name in pages.items():
        write_text(folder / name, render_page(template, report))


def describe_terms(base: Path, language: str | None, license_name: str | None) -> dict[str, Any]:
    """Return language and license of a model: those given, else those that the model card in its base's folder names.

    A license called other also has a license_name and a license_link. What is not known is left out.
    """
    known = {}
    with suppress(Exception):  # no card, or not a card: YAML fails in many ways
        known = metadata_load(base / "README.md") or {}
    if license_name:
        known = {"language": known.get("language"), "license": license_name}
    known["language"] = language or known.get("language")
    return {name: known[name] for name in TERMS if _is_text(known.get(name))}


def _is_text(value: Any) -> bool:
    """Say whether a value of a card is a text or a list of texts; YAML reads the code of Norwegian as false."""
    return bool(value) and (isinstance(value, str) or (isinstance(value, list) and all(map(_is_text, value))))


def describe_card(report: Report, model_type: str) -> str:
    """Return the metadata at the head of a model card, as YAML for the hub; a local folder is no base_model there."""
    settings, scores = report.settings, report.scores.get("book", {}).get("finetuned", {})
    results = [
        EvalResult("text-generation", "text", "validation text of the book", key.removeprefix("eval/"), round(value, 6))
        for key, value in scores.items()
    ]
    base = settings["base_model"]
    return ModelCardData(
        **{name: settings.get(name) for name in TERMS}, library_name="transformers", pipeline_tag="text-generation",
        tags=[model_type, "fine-tuned-on-a-book"], base_model=None if Path(base).is_dir() else base,
        model_name=Path(settings["finetuned_model"]).resolve().name, eval_results=results or None,
    ).to_yaml()  # fmt: skip


def render_terminal(report: Report, width: int | None = None) -> str:
    """Return scores, the first texts and the verdict as plain text of lines no wider than the terminal."""
    width = width or min(shutil.get_terminal_size((100, 24)).columns, MAX_WIDTH)
    # No terminal and no colors, whatever the environment says: the same text in a file, a pipe and a terminal.
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, markup=False,
                      emoji=False, highlight=False)  # fmt: skip
    usual = {"base": "base", "finetuned": "fine-tuned", "reference": "author"}
    judged = list(list_columns(report).items())[len(NAMES) :]
    groups = [dict(judged[start : start + len(usual)]) for start in range(0, len(judged), len(usual))]
    console.width = max(width, MIN_TABLE_WIDTH)  # figures are never cut off: a very narrow terminal wraps the lines
    for columns in [usual, *groups] if report.scores else []:
        _print_scores(console, list_scores(report), columns)
    console.width = width
    shown = [row for row in report.texts if not row["has_reference"]]
    shown += [row for row in report.texts if row["has_reference"]][:SHOWN_REFERENCES]
    for row in shown:
        prompt = make_printable(row["prompt"].strip("\n")) or "(none)"
        console.print("", "=" * width, f"prompt: {prompt}", "=" * width, sep="\n")
        for texts in itertools.zip_longest(*row["columns"].values()):
            named = zip(row["columns"], texts, strict=True)
            plain = {name: "".join(piece["text"] for piece in text) for name, text in named if text is not None}
            _print_texts(console, {NAMES[name]: make_printable(text.strip("\n")) for name, text in plain.items()})
    sentences = [*report.verdict, *(f"not measured: {reason}" for reason in report.missing)]
    console.print("", *map(make_printable, sentences), sep="\n")
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def _print_scores(console: Console, scores: list[dict[str, str]], columns: dict[str, str]) -> None:
    """Print the rows of the score table that have a figure in one of the columns."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("", overflow="fold")
    for name in columns.values():
        table.add_column(make_printable(name), justify="right", overflow="fold", min_width=8)
    for row in scores:
        cells = [row[name].split(" [")[0] for name in columns]
        if any(cells):
            table.add_row(row["label"], *cells)
    console.print(table)


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


def render_page(name: str, report: Report) -> str:
    """Fill one of the templates: report.html, report.md, quiz.html or card.md."""
    environment = Environment(
        loader=FileSystemLoader(PAGES), autoescape=name.endswith(".html"), undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"quote": quote, "cell": lambda text: escape(str(text)).replace("\n", " ")}
    drawn = {"gap": draw_gap(report), "plots": draw_plots(report)} if name == "report.html" else {}
    return environment.get_template(name).render(
        report=report, scores=list_scores(report), quarters=list_quarters(report), names=NAMES,
        headings=list_columns(report), **drawn,
    )  # fmt: skip


def draw_gap(report: Report) -> str:
    """Return the share of the gap closed by each part as SVG, "" if none was measured."""
    parts = (report.parts or {}).get("finetuned")
    judged = {name: figures["parts"] for name, figures in report.judged.items() if figures.get("parts")}
    return render_svg(draw_parts(parts, judged), "gap") if parts else ""


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
    """Escape the characters that are markup in Markdown, or in GitHub's dialect of it."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>#|~&$" else c for c in text)


def quote(text: str) -> str:
    """Quote a text for Markdown, line by line: "a\\n1. b" -> "> a  \\n> 1\\. b  ".

    Every line is read as the text that it is, white space at its ends included. A control character becomes U+FFFD.
    Source: parsed again by a CommonMark parser; tests/evaluation/test_report.py.
    """
    text = "".join("\ufffd" if unicodedata.category(c) == "Cc" and c not in "\t\n" else c for c in text.strip("\n"))
    return "\n".join(f"> {_quote_line(line)}  " if line else ">" for line in text.split("\n"))


def _quote_line(line: str) -> str:
    inside = line.strip()
    if not inside:
        return "".join(f"&#{ord(c)};" for c in line)
    start, escaped = line.index(inside), escape(inside)
    if found := BLOCK_START.match(escaped):
        escaped = f"{found[0]}\\{escaped[found.end() :]}" if found[0][0].isdigit() else f"\\{escaped}"
    before, after = line[:start], line[start + len(inside) :]
    return "".join(f"&#{ord(c)};" for c in before) + escaped + "".join(f"&#{ord(c)};" for c in after)
