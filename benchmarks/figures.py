"""Figures of runs as README and notes show them; notes/figures.json holds them by the experiment that gave them.

Each experiment has a commit, a machine and a date of its own. A figure is a number, an interval or None, a text a list
of lines.
"""

import datetime
import json
import math
import re
from pathlib import Path
from typing import Any

from benchmarks.pages import ROOT
from benchmarks.run import describe_machine
from utils.evaluation.render import escape

FIGURES = ROOT / "notes/figures.json"
EXCERPT = 260  # characters

LOSS, SHARE, COUNT, INTERVAL = "{:.3f}", "{:.1%}", "{:,}", "{value:.2f} [{low:.2f}, {high:.2f}]"
FINE = "{value:.3f} [{low:.3f}, {high:.3f}]"
COLUMNS = {"": "finetuned", "_base": "base", "_author": "reference"}  # by the ends of names


def of_columns(name: str, form: str, path: str) -> dict[str, tuple[str, str]]:
    """Name a figure of the fine-tuned model, the base and the author."""
    return {f"{name}{end}": (form, path.format(column)) for end, column in COLUMNS.items()}


# Name: how it is shown, and where the run has it (a file, then keys).
NAMED = {
    "parameters": ("{:.1f} million", "run.parameters"),
    "seconds": ("{:.0f} s", "run.seconds"),
    "words": (COUNT, "manifest.books.0.words"),
    "blocks": (COUNT, "manifest.splits.train.blocks"),
    "validation_blocks": (COUNT, "manifest.splits.validation.blocks"),
    "validation_ngrams": (COUNT, "manifest.leakage.validation_ngrams"),
    "leaked_ngrams": (COUNT, "manifest.leakage.leaked_ngrams"),
    "steps_per_epoch": (COUNT, "run.steps_per_epoch"),
    "epochs": ("{:g}", "config.settings.epochs"),
    "steps": (COUNT, "results.max_steps"),
    "best_step": (COUNT, "results.best_step"),
    "train_seconds": ("{:.0f} s", "results.train_runtime"),
    "loss": (LOSS, "results.eval_loss"),
    "loss_base": (LOSS, "results.base_eval_loss"),
    "perplexity": ("{:.1f}", "results.perplexity"),
    "perplexity_base": ("{:.1f}", "results.base_perplexity"),
    "bits": (LOSS, "report.scores.book.finetuned.eval/bits_per_byte"),
    "bits_base": (LOSS, "report.scores.book.base.eval/bits_per_byte"),
    "bits_general": (LOSS, "report.scores.control.finetuned.eval/bits_per_byte"),
    "bits_general_base": (LOSS, "report.scores.control.base.eval/bits_per_byte"),
    "gain": (FINE, "report.book_gain"),
    "gain_general": (FINE, "report.control_gain"),
    "style_gain": (FINE, "report.style_gain"),
    "forgetting": ("{value:.1f} % [{low:.1f}, {high:.1f}]", "report.forgetting"),
    "forgetting_value": ("{value:.1f} %", "report.forgetting"),
    **of_columns("delta", FINE, "report.delta.{}"),
    **of_columns("delta_value", "{value:.3f}", "report.delta.{}"),
    **of_columns("unknown", SHARE, "report.unknown_words.{}"),
    **of_columns("auc", INTERVAL, "report.reader_auc.{}"),
    **of_columns("auc_value", "{value:.2f}", "report.reader_auc.{}"),
    "gap_words": (INTERVAL, "report.parts.finetuned.words"),
    "gap_spelling": (INTERVAL, "report.parts.finetuned.spelling"),
    "gap_sense": (INTERVAL, "report.parts.finetuned.sense"),
    "gap": (INTERVAL, "report.gap_closed.finetuned"),
    **of_columns("copied_8", SHARE, "report.copy_rate.{}.8"),
    **of_columns("copied_16", SHARE, "report.copy_rate.{}.16"),
    **of_columns("copied_32", SHARE, "report.copy_rate.{}.32"),
    **of_columns("longest_copy", COUNT, "report.longest_copy.{}.tokens"),
    **of_columns("covered", SHARE, "report.coverage.{}.covered"),
    **of_columns("repeated", SHARE, "report.repetition.{}.repeated_4grams"),
    **of_columns("loops", SHARE, "report.repetition.{}.loops"),
    "extracted": ("{:.0%}", "report.extraction.finetuned.train.exact_match"),
    "extraction_blocks": (COUNT, "report.extraction.finetuned.train.prefixes"),
    "extractable": ("{:.0%}", "report.extraction.finetuned.train.extractable.10000"),
    "log_prob": ("{:.2f}", "report.extraction.finetuned.train.mean_log_prob"),
    "log_prob_base": ("{:.2f}", "report.extraction.base.train.mean_log_prob"),
    "log_prob_validation": ("{:.2f}", "report.extraction.finetuned.validation.mean_log_prob"),
    "log_prob_validation_base": ("{:.2f}", "report.extraction.base.validation.mean_log_prob"),
    "samples": (COUNT, "report.counts.texts.finetuned"),
}
# Tables of one run's figures.
TABLES = {
    "table_likelihood": """
| bits per byte | base | fine-tuned | gain |
|---|---:|---:|---:|
| validation text of the book | {bits_base} | {bits} | {gain} |
| general text | {bits_general_base} | {bits_general} | {gain_general} |
| style gain: the difference of the gains | | | {style_gain} |
| forgetting: more bits for general text | | | {forgetting} |
""",
    "table_parts": """
| part | measure | base | fine-tuned | author (reference) | gap closed |
|---|---|---:|---:|---:|---:|
| words | Burrows' Delta | {delta_base} | {delta} | {delta_author} | {gap_words} |
| spelling | unknown words | {unknown_base} | {unknown} | {unknown_author} | {gap_spelling} |
| sense | reader's AUC | {auc_base} | {auc} | {auc_author} | {gap_sense} |
""",
    "table_copying": """
| | base | fine-tuned | author (reference) |
|---|---:|---:|---:|
| tokens in n-grams of 8 or more shared with training | {copied_8_base} | {copied_8} | {copied_8_author} |
| of 16 or more | {copied_16_base} | {copied_16} | {copied_16_author} |
| of 32 or more | {copied_32_base} | {copied_32} | {copied_32_author} |
| longest copied span, tokens | {longest_copy_base} | {longest_copy} | {longest_copy_author} |
| book covered by all samples, share of its words | {covered_base} | {covered} | {covered_author} |
""",
    "table_extraction": """
| | base | fine-tuned |
|---|---:|---:|
| training blocks continued verbatim, of {extraction_blocks} | | {extracted} |
| extractable with 10,000 samples | | {extractable} |
| mean log probability on training blocks, nats per token | {log_prob_base} | {log_prob} |
| on validation blocks | {log_prob_validation_base} | {log_prob_validation} |
""",
    "table_repetition": """
| | base | fine-tuned | author (reference) |
|---|---:|---:|---:|
| repeated 4-grams within a sample | {repeated_base} | {repeated} | {repeated_author} |
| samples that end in a loop | {loops_base} | {loops} | {loops_author} |
""",
}


def collect_run(data: Path, model: Path, **extra: Any) -> dict[str, Any]:
    """Return the figures of NAMED for a run that generate_text.py has measured; extra ones are found under "run"."""
    files = {"manifest": data / "manifest.json", "results": model / "all_results.json",
             "report": model / "report.json", "config": model / "run_config.json"}  # fmt: skip
    run = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in files.items()}
    report = run["report"]
    for column, (low, high) in report.get("intervals", {}).get("delta", {}).items():
        report["delta"][column] = {"value": report["delta"][column], "low": low, "high": high}
    run["run"] = {"steps_per_epoch": count_steps(run["manifest"], run["config"]["settings"]["batch_size"]), **extra}
    return {name: look_up(run, path) for name, (_, path) in NAMED.items()}


def count_steps(manifest: dict, batch_size: int) -> int:
    """Return the steps per epoch of prepared data."""
    return math.ceil(manifest["splits"]["train"]["blocks"] / batch_size)


def look_up(tree: Any, path: str) -> Any:
    """Return the value at a path of keys joined by dots, None where the run did not measure it."""
    for key in path.split("."):
        tree = tree[int(key)] if isinstance(tree, list) else (tree or {}).get(key)
    return tree


def show(form: str, value: Any) -> str:
    """Return a figure as the pages show it."""
    if value is None:
        return "not measured"
    text = form.format(**value) if isinstance(value, dict) else form.format(value)
    return re.sub(r"(?<=\d)%", " %", text)


def show_run(figures: dict[str, Any]) -> dict[str, str]:
    """Return the figures of a run, and tables of them, as the pages show them."""
    shown = {name: show(form, figures.get(name)) for name, (form, _) in NAMED.items()}
    tables = {name: re.sub(r"\{(\w+)\}", lambda found: shown[found[1]], table) for name, table in TABLES.items()}
    return shown | tables


def show_lines(lines: list[str]) -> str:
    """Return lines as they stand between markers."""
    return "\n" + "\n".join(lines) + "\n"


def make_table(header: str, rows: list[list[str]]) -> str:
    """Return a Markdown table; in the header, a column that starts with ">" is aligned to the right."""
    columns = [name.strip() for name in header.split("|")]
    head = f"| {' | '.join(name.lstrip('>') for name in columns)} |"
    ruler = f"|{'|'.join('---:' if name[:1] == '>' else '---' for name in columns)}|"
    return show_lines(
        [line.replace("|  |", "| |") for line in (head, ruler, *(f"| {' | '.join(row)} |" for row in rows))]
    )


def show_origin(group: dict) -> dict[str, str]:
    """Return commit, date and machine of an experiment as the pages show them."""
    machine, date = group["machine"], datetime.date.fromisoformat(group["date"])
    return {"commit": group["commit"], "date": f"{date.day} {date:%B %Y}",
            "machine": f"{machine['processor']}, {machine['cores']} cores"}  # fmt: skip


def read_figures() -> dict[str, dict]:
    """Return all stored figures by experiment."""
    return json.loads(FIGURES.read_text(encoding="utf-8"))


def store(name: str, commit: str, figures: dict[str, Any]) -> None:
    """Put the figures of an experiment that has run now in the place of its older ones."""
    machine = describe_machine()
    group = {"commit": commit, "date": datetime.date.today().isoformat(), "machine": machine,
             "versions": machine.pop("versions"), "figures": figures}  # fmt: skip
    FIGURES.write_text(
        json.dumps(read_figures() | {name: group}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def list_excerpts(rows: list[dict]) -> list[str]:
    """Return a table of the texts for the first prompt, and for the first that the author continues."""
    chosen = [rows[0], next(row for row in rows if row["has_reference"])]
    lines = ["| prompt | base model | fine-tuned model | author |", "|---|---|---|---|"]
    for row in chosen:
        cells = [row["prompt"]]
        for name in ("base", "finetuned", "reference"):
            pieces = (row["columns"].get(name) or [[]])[0]
            cells.append(shorten("".join(piece["text"] for piece in pieces)))
        cells = [re.sub(r"\s*\n\s*", " / ", escape(cell.strip())) for cell in cells]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def shorten(text: str) -> str:
    """Cut a text after the last sentence, else the last word, that ends within EXCERPT characters."""
    if len(text) <= EXCERPT:
        return text
    ends = [found.end() for found in re.finditer(r"[.!?][\"']?(?=\s)", text[: EXCERPT + 1])]
    return text[: ends[-1] if ends else text.rindex(" ", 0, EXCERPT)]
