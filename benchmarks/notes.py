"""Run what README and notes quote, and put its figures there; notes/figures.json keeps them.

python -m benchmarks.notes                              the demo, two to five minutes on two cores
python -m benchmarks.notes rates books --books FOLDER   experiments by name
python -m benchmarks.notes --fill                       fill the pages from the stored figures, after an edit
"""

import argparse
import json
import os
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

from benchmarks import experiments, mistakes, pictures, run
from benchmarks.figures import (
    collect_run,
    list_excerpts,
    read_figures,
    show_lines,
    show_origin,
    show_run,
    store,
)
from benchmarks.guarantees import read_stored, render_soak
from benchmarks.pages import ROOT, fill_pages
from utils.evaluation.render import escape

# Name: what runs it, and what shows its figures. The demo is run otherwise, as a user runs it.
EXPERIMENTS = experiments.EXPERIMENTS | {"step": (lambda _folder, _inputs: pictures.measure_step(), pictures.show_step)}
COMMANDS = ["prepare_data.py --model-name results/base_model",
            "finetune_generative.py --learning-rate 3e-4",
            "generate_text.py"]  # fmt: skip
FINETUNED, BLOCKS = "results/checkpoints/finetuned_model", "results/data/blocks"
WIDTH = 100  # of the printed lines, where there is no terminal
BROWSERS = ["chromium", "chromium-browser", "google-chrome"]
WORDS = 5  # characteristic words that note 4 shows

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


def collect(folder: Path, printed: str, seconds: float) -> dict[str, Any]:
    """Return the demo's figures by name: numbers, intervals, and texts as lists of lines."""
    data, model = folder / BLOCKS, folder / FINETUNED
    parameters = sum(weight.numel() for weight in load_file(folder / "results/base_model/model.safetensors").values())
    figures = collect_run(data, model, seconds=seconds, parameters=parameters / 1e6)
    report = json.loads((model / "report.json").read_text(encoding="utf-8"))
    return figures | {
        "printed": select_printed(printed, report["verdict"], figures["best_step"]),
        "verdict": "\n>\n".join(f"> {escape(sentence)}" for sentence in report["verdict"]).split("\n"),
        "excerpts": list_excerpts(report["texts"]),
        "characteristic": list_words(report.get("words") or []),
    }


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


def list_words(rows: list[dict]) -> list[str]:
    """Return a table of the most characteristic words, in occurrences per 1,000 words."""
    columns = ["book", "control", "base", "finetuned", "reference"]
    lines = ["| per 1,000 words | book | general text | base | fine-tuned | author (reference) |",
             "|---|---:|---:|---:|---:|---:|"]  # fmt: skip
    return lines + [f"| *{row['word']}* | {' | '.join(f'{row[name]:.1f}' for name in columns)} |"
                    for row in rows[:WORDS]]  # fmt: skip


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


def show_demo(figures: dict[str, Any]) -> dict[str, str]:
    """Return the demo's figures, tables and texts as the pages show them."""
    return show_run(figures) | {name: show_lines(value) for name, value in figures.items() if isinstance(value, list)}


def render() -> dict[str, str]:
    """Return what stands between all markers, by name."""
    contents = run.render() | mistakes.render() | pictures.render() | render_soak(read_stored())
    for name, group in read_figures().items():
        show = show_demo if name == "demo" else EXPERIMENTS[name][1]
        shown = show_origin(group) | show(group["figures"])
        contents |= {f"{name}.{marker}": content for marker, content in shown.items()}
    return contents


def run_experiment(name: str, folder: Path, inputs: experiments.Inputs) -> None:
    """Run the demo or an experiment, and store its figures."""
    commit = run.describe_commit("*.py", "results")  # before the run changes a page
    if name == "demo":
        printed, seconds = run_demo(folder / name)
        figures = collect(folder / name, printed, seconds)
        take_pictures(folder / name)
    else:
        figures = EXPERIMENTS[name][0](folder, inputs)
    store(name, commit, figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names, books = ["demo", *EXPERIMENTS], [f"{name}.txt" for name in experiments.TITLES if name != "book"]
    parser.add_argument("names", nargs="*", choices=[*names, []], metavar="NAME", help=", ".join(names))
    parser.add_argument("--books", type=Path, metavar="FOLDER", help=f"holds {' and '.join(books)}")
    parser.add_argument("--corpus", type=Path, metavar="FOLDER", help="many books, .txt, for base and faults")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a pre-trained model of GPT-2's size, for larger")
    parser.add_argument("--fill", action="store_true", help="run nothing; fill the pages from the stored figures")
    args = parser.parse_args()
    chosen = [] if args.fill else args.names or ["demo", "step"]
    for name in chosen:
        for needed in experiments.NEEDS.get(name, []):
            if not getattr(args, needed):
                parser.error(f"{name} needs --{needed} FOLDER")
    inputs = experiments.Inputs([args.books / book for book in books] if args.books else [], args.corpus, args.model)
    if missing := [path for path in inputs.books if not path.is_file()]:
        parser.error(f"--books: {missing[0]}: no such file")
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen:
            run_experiment(name, Path(folder), inputs)
    fill_pages(render())
    pictures.draw_verdicts()


if __name__ == "__main__":
    main()
