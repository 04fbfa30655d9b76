"""Run the demo's three commands and put what they give into README and notes; write notes/figures.json.

python -m benchmarks.notes           run, about four minutes on two cores
python -m benchmarks.notes --fill    only fill the pages again from figures.json, after an edit
"""

import argparse
import datetime
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import load_file

from benchmarks.guarantees import read_stored, render_soak
from benchmarks.pages import ROOT, fill_pages
from benchmarks.run import describe_machine
from utils.evaluation.render import escape

FIGURES = ROOT / "notes/figures.json"
COMMANDS = ["prepare_data.py --model-name results/base_model",
            "finetune_generative.py --learning-rate 3e-4 --epochs 6",
            "generate_text.py"]  # fmt: skip
FINETUNED, BLOCKS = "results/checkpoints/finetuned_model", "results/data/blocks"
WIDTH = 100  # of the printed lines, where there is no terminal
BROWSERS = ["chromium", "chromium-browser", "google-chrome"]
WORDS = 5  # characteristic words that note 4 shows
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
# Tables of these figures.
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
# Beginnings of the printed lines that the README shows.
PRINTED = ["prepared ", "text  ", "tokens  ", "training  ", "step 0:", "step {best_step}:", "validation loss ",
           "base  fine-tuned", "validation text: ", "general text: ", "unknown words", "reader's AUC", "gap closed  ",
           "tokens in n-grams of 8+"]  # fmt: skip


def run_demo(folder: Path) -> tuple[str, float]:
    """Run the demo's commands in a folder as a user runs them in the project's; return what they print, and seconds."""
    shutil.copytree(ROOT / "results", folder / "results", ignore=shutil.ignore_patterns("blocks", "checkpoints"))
    printed, started = "", time.perf_counter()
    for command in COMMANDS:
        script, *flags = command.split()
        print(f"$ python {command}", flush=True)
        ended = subprocess.run([sys.executable, ROOT / script, *flags], cwd=folder, check=True, text=True,
                               stdout=subprocess.PIPE, env=os.environ | {"COLUMNS": str(WIDTH)})  # fmt: skip
        printed += ended.stdout
    return printed, time.perf_counter() - started


def look_up(tree: Any, path: str) -> Any:
    """Return the value at a path of keys joined by dots, None where the run did not measure it."""
    for key in path.split("."):
        tree = tree[int(key)] if isinstance(tree, list) else (tree or {}).get(key)
    return tree


def collect(folder: Path, printed: str, seconds: float) -> dict[str, Any]:
    """Return the demo's figures by name: numbers, intervals, and texts as lists of lines."""
    files = {"manifest": f"{BLOCKS}/manifest.json", "results": f"{FINETUNED}/all_results.json",
             "report": f"{FINETUNED}/report.json", "config": f"{FINETUNED}/run_config.json"}  # fmt: skip
    run = {name: json.loads((folder / path).read_text(encoding="utf-8")) for name, path in files.items()}
    report = run["report"]
    for column, (low, high) in report.get("intervals", {}).get("delta", {}).items():
        report["delta"][column] = {"value": report["delta"][column], "low": low, "high": high}
    per_epoch = math.ceil(run["manifest"]["splits"]["train"]["blocks"] / run["config"]["settings"]["batch_size"])
    parameters = sum(weight.numel() for weight in load_file(folder / "results/base_model/model.safetensors").values())
    run["run"] = {"seconds": seconds, "parameters": parameters / 1e6, "steps_per_epoch": per_epoch}
    figures = {name: look_up(run, path) for name, (_, path) in NAMED.items()}
    texts = {
        "printed": select_printed(printed, report["verdict"], figures["best_step"]),
        "verdict": "\n>\n".join(f"> {escape(sentence)}" for sentence in report["verdict"]).split("\n"),
        "excerpts": list_excerpts(report["texts"]),
        "characteristic": list_words(report.get("words") or []),
    }
    return {f"demo.{name}": value for name, value in {**figures, **texts}.items()}


def select_printed(printed: str, verdict: list[str], best_step: int) -> list[str]:
    """Return the lines that the README shows, and the verdict's first two sentences; "..." for what is left out."""
    lines = printed.splitlines()
    kept = {n for n, line in enumerate(lines)
            if line.strip().startswith(tuple(form.format(best_step=best_step) for form in PRINTED))}  # fmt: skip
    for sentence in verdict[:2]:
        wrapped = textwrap.wrap(sentence, WIDTH, break_on_hyphens=False)
        starts = [n for n in range(len(lines)) if lines[n : n + len(wrapped)] == wrapped]
        kept |= set(range(starts[-1], starts[-1] + len(wrapped)))
    shown, last = ["```"], -1
    for n in sorted(kept):
        shown += ["..."] * (any(lines[last + 1 : n])) + [lines[n]]
        last = n
    return [*shown, "```"]


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


def list_words(rows: list[dict]) -> list[str]:
    """Return a table of the most characteristic words, in occurrences per 1,000 words."""
    columns = ["book", "control", "base", "finetuned", "reference"]
    lines = ["| per 1,000 words | book | general text | base | fine-tuned | author (reference) |",
             "|---|---:|---:|---:|---:|---:|"]  # fmt: skip
    return lines + [f"| *{row['word']}* | {' | '.join(f'{row[name]:.1f}' for name in columns)} |"
                    for row in rows[:WORDS]]  # fmt: skip


def show(form: str, value: Any) -> str:
    """Return a figure as the pages show it."""
    if value is None:
        return "not measured"
    text = form.format(**value) if isinstance(value, dict) else form.format(value)
    return re.sub(r"(?<=\d)%", " %", text)


def render(stored: dict) -> dict[str, str]:
    """Return what stands between the markers, by name, from the content of figures.json."""
    machine, date = stored["machine"], datetime.date.fromisoformat(stored["date"])
    shown = {"commit": stored["commit"], "date": f"{date.day} {date:%B %Y}",
             "machine": f"{machine['processor']}, {machine['cores']} cores"}  # fmt: skip
    figures = stored["figures"]
    shown |= {f"demo.{name}": show(form, figures[f"demo.{name}"]) for name, (form, _) in NAMED.items()}
    shown |= {name: "\n" + "\n".join(value) + "\n" for name, value in figures.items() if isinstance(value, list)}
    for name, table in TABLES.items():
        shown[f"demo.{name}"] = re.sub(r"\{(\w+)\}", lambda found: shown[f"demo.{found[1]}"], table)
    return shown


def take_pictures(folder: Path) -> None:
    """Put the loss curve into the notes, and the first screen of the report where there is a browser."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    pictures = [folder / FINETUNED / "loss_curve.png", folder / "report.png"]
    if browser is None:
        print("no browser: notes/report.png stays as it is")
        del pictures[1]
    else:
        subprocess.run([browser, "--headless", "--no-sandbox", "--hide-scrollbars", "--window-size=1200,900",
                        f"--screenshot={pictures[1]}", (folder / FINETUNED / "report.html").as_uri()],
                       check=True, stderr=subprocess.DEVNULL)  # fmt: skip
    for picture in pictures:  # a picture of few colors is a fourth of the size
        Image.open(picture).convert("RGB").quantize(128).save(ROOT / "notes" / picture.name, optimize=True)


def describe_commit() -> str:
    """Return the commit whose code ran, marked if the working tree differs from it."""
    told = subprocess.run(["git", "describe", "--always", "--abbrev=10", "--dirty", "--exclude=*"], cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    return told.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fill", action="store_true", help="run nothing; fill the pages from figures.json")
    if not parser.parse_args().fill:
        commit, machine = describe_commit(), describe_machine()
        with tempfile.TemporaryDirectory() as name:
            printed, seconds = run_demo(Path(name))
            figures = collect(Path(name), printed, seconds)
            take_pictures(Path(name))
        stored = {"commit": commit, "date": datetime.date.today().isoformat(), "machine": machine,
                  "versions": machine.pop("versions"), "figures": figures}  # fmt: skip
        FIGURES.write_text(json.dumps(stored, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    fill_pages(render(json.loads(FIGURES.read_text(encoding="utf-8"))) | render_soak(read_stored()))


if __name__ == "__main__":
    main()
