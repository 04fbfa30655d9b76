"""The longer experiments of README and notes: each trains and measures with the scripts, as a user does.

An experiment is two functions: one runs it in a folder, on the sample book and further ones, and returns its figures;
the other returns them as the pages show them. benchmarks/notes.py runs them by name and stores the figures.
"""

import functools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.figures import (
    COUNT,
    LOSS,
    SHARE,
    collect_run,
    count_steps,
    list_excerpts,
    make_table,
    show,
    show_lines,
    show_run,
)
from benchmarks.ladder import run_ladder, show_ladder
from benchmarks.pages import ROOT, name_marker
from benchmarks.scale import run_scale, show_scale
from benchmarks.scripts import BASE, LEARNING_RATE, SAMPLE, read, run_script

TITLES = {"book": "The Log of Skerrow Light", "a_christmas_carol": "A Christmas Carol",
          "tinyshakespeare": "Tiny Shakespeare"}  # fmt: skip
EPOCHS = {"book": 3, "a_christmas_carol": 3, "tinyshakespeare": 1}
RATES, RANK_RATES = ("1e-4", "3e-4", "1e-3", "3e-3"), ("1e-3", "3e-3", "1e-2")
RANKS, RANK_RATE = (4, 16, 64), "3e-3"
DECODINGS = {  # as note 4 names them: flags
    "temperature 0.8, top-k 50, top-p 0.95": ["--temperature", 0.8, "--top-k", 50, "--top-p", 0.95],
    "temperature 0.8": ["--temperature", 0.8],
    "temperature 0.9, top-p 0.95": ["--temperature", 0.9, "--top-p", 0.95],
    "**temperature 0.9**": [],
    "temperature 1, top-p 0.95": ["--temperature", 1, "--top-p", 0.95],
    "temperature 1": ["--temperature", 1],
}
LONG = 2000  # tokens per sample
HELD_OUT = [
    "arthur_conan_doyle_the_adventure_of_the_missing_three_quarter",
    "edward_bellamy_looking_backward",
    "honor_de_balzac_colonel_chabert",
    "lucy_maud_montgomery_anne_of_avonlea",
    "theodore_dreiser_sister_carrie",
]  # books of the corpus that the embedded base model was not trained on


class Inputs(NamedTuple):
    """What the project does not contain: the further books of TITLES, a corpus of books, a larger pre-trained model."""

    books: list[Path]
    corpus: Path | None = None
    model: Path | None = None


@functools.cache
def prepare(folder: Path, book: Path) -> Path:
    """Prepare a book for the embedded base model; return the data folder."""
    data = folder / book.stem / "blocks"
    run_script("prepare_data", "--input-path", book, "--model-name", BASE, "--output-dir", data)
    return data


@functools.cache
def train(folder: Path, book: Path, *flags: Any, learning_rate: str = LEARNING_RATE) -> Path:
    """Fine-tune the embedded base model on a book, evaluated once per epoch; return the output folder."""
    data = prepare(folder, book)
    model = folder / book.stem / name_marker(f"{learning_rate} {flags}")
    per_epoch = count_steps(read(data / "manifest.json"), 8)
    run_script("finetune_generative", "--data-dir", data, "--output-dir", model, "--learning-rate", learning_rate,
               "--epochs", EPOCHS[book.stem], "--eval-every", per_epoch, *flags)  # fmt: skip
    return model


def compare(folder: Path, book: Path, model: Path, *flags: Any) -> dict[str, Any]:
    """Let generate_text.py measure a model; return the figures of the run."""
    run_script("generate_text", "--finetuned-model", model, *flags)
    return collect_run(prepare(folder, book), model)


def list_losses(model: Path) -> list[float]:
    """Return the validation losses of a run, the base model's first."""
    rows = map(json.loads, (model / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [row["eval/loss"] for row in rows if "eval/loss" in row]


def run_books(folder: Path, inputs: Inputs) -> dict[str, Any]:
    return {book.stem: compare(folder, book, train(folder, book)) for book in inputs.books}


def show_books(figures: dict[str, Any]) -> dict[str, str]:
    return {f"{book}.{name}": text for book, run in figures.items() for name, text in show_run(run).items()}


def run_rates(folder: Path, _inputs: Inputs) -> dict[str, Any]:
    return {rate: list_losses(train(folder, SAMPLE, learning_rate=rate)) for rate in RATES}


def show_rates(figures: dict[str, Any]) -> dict[str, str]:
    rows = [[rate, *(show(LOSS, loss).join(["**"] * 2 if loss == min(losses) else ["", ""]) for loss in losses[1:])]
            for rate, losses in figures.items()]  # fmt: skip
    epochs = " | ".join(f">{n}" for n in range(1, len(rows[0])))
    return {"table": make_table(f"learning rate | {epochs}", rows)}


def run_decodings(folder: Path, inputs: Inputs) -> dict[str, Any]:
    return {book.stem: {decoding: compare(folder, book, train(folder, book), *flags)
                        for decoding, flags in DECODINGS.items()} for book in (SAMPLE, *inputs.books)}  # fmt: skip


def show_decodings(figures: dict[str, Any]) -> dict[str, str]:
    def cell(run: dict[str, str], end: str = "") -> str:
        return f"{run['auc_value' + end]} / {run['unknown' + end]} / {run['delta_value' + end]}"

    runs = {
        book: {decoding: show_run(run) for decoding, run in by_decoding.items()}
        for book, by_decoding in figures.items()
    }
    rows = [[decoding, *(cell(of[decoding]) for of in runs.values())] for decoding in DECODINGS]
    rows.append(["the author", *(cell(next(iter(of.values())), "_author") for of in runs.values())])
    return {"table": make_table(" | ".join(["decoding", *(TITLES[book] for book in runs)]), rows)}


def run_lora(folder: Path, inputs: Inputs) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for book in (SAMPLE, *inputs.books[:1]):
        rank = functools.partial(train, folder, book, "--lora-rank")
        rates = {rate: min(list_losses(rank(16, learning_rate=rate))) for rate in RANK_RATES}
        models = {"all weights": train(folder, book)} | {f"rank {n}": rank(n, learning_rate=RANK_RATE) for n in RANKS}
        found[book.stem] = {"rates": rates, "runs": {
            name: compare(folder, book, model) | {"bytes": count_bytes(model)} for name, model in models.items()
        }}  # fmt: skip
    return found


def count_bytes(model: Path) -> list[int]:
    """Return the sizes of the adapter, or of the model without one, and of a checkpoint."""
    newest = max(model.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    weights = model / "adapter" if (model / "adapter").is_dir() else model
    return [sum(path.stat().st_size for path in place.glob("*.safetensors") if "ngrams" not in path.name)
            for place in (weights, newest)]  # fmt: skip


def show_lora(figures: dict[str, Any]) -> dict[str, str]:
    rates = [[TITLES[book], show(LOSS, of["runs"]["all weights"]["loss"]),
              *(show(LOSS, loss) for loss in of["rates"].values())] for book, of in figures.items()]  # fmt: skip
    rows, lost = [], []
    for book, of in figures.items():
        for name, run in of["runs"].items():
            shown = show_run(run)
            rows.append([TITLES[book], name, *(f"{size / 1e6:.1f}" for size in run["bytes"]),
                         *(shown[key] for key in ("loss", "style_gain", "gap", "auc_value", "copied_8", "unknown",
                                                  "forgetting_value"))])  # fmt: skip
            if name != "all weights":
                lost.append(run["loss"] - of["runs"]["all weights"]["loss"])
    return {
        "rates": make_table(f"book | >all weights, {LEARNING_RATE} | "
                            + " | ".join(f">rank 16, {rate}" for rate in figures["book"]["rates"]), rates),
        "table": make_table("book | trained | >file, MB | >checkpoint, MB | >loss | style gain | gap closed | "
                            ">reader's AUC | >n-gram overlap | >unknown words | >forgetting", rows),
        "least": f"{min(lost):.2f}", "most": f"{max(lost):.2f}",
    }  # fmt: skip


def run_long(folder: Path, _inputs: Inputs) -> dict[str, Any]:
    model = train(folder, SAMPLE)
    run_script("generate_text", "--finetuned-model", model, "--max-new-tokens", LONG)
    report = read(model / "report.json")
    quarters = {name: report["by_quarter"][name] for name in ("finetuned", "reference")}
    return {"samples": report["counts"]["texts"]["finetuned"], **quarters}


def show_long(figures: dict[str, Any]) -> dict[str, str]:
    rows = [[f"{what}: {who}", *(show(SHARE, share) for share in figures[column][key])]
            for key, what in (("copy_rate", "tokens in n-grams of 8 or more"), ("repeated_4grams", "repeated 4-grams"))
            for column, who in (("finetuned", "fine-tuned"), ("reference", "author (reference)"))]  # fmt: skip
    return {"samples": show(COUNT, figures["samples"]),
            "table": make_table(" | ".join(["", *(f">quarter {n}" for n in range(1, 5))]), rows)}  # fmt: skip


def run_base(folder: Path, inputs: Inputs) -> dict[str, Any]:
    """Score the embedded base model on the books that it was not trained on, as an evaluation at step 0."""
    books = [inputs.corpus / f"{name}.txt" for name in HELD_OUT]
    data, model = folder / "base/blocks", folder / "base/run"
    run_script("prepare_data", "--input-path", SAMPLE, "--val-path", *books, "--model-name", BASE, "--block-size", 512,
               "--output-dir", data)  # fmt: skip
    run_script("finetune_generative", "--data-dir", data, "--output-dir", model, "--max-steps", 1, "--dtype", "fp32",
               "--copy-samples", 0, "--sample-tokens", 0)  # fmt: skip
    return json.loads((model / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])


def show_base(figures: dict[str, Any]) -> dict[str, str]:
    return {name: show(LOSS, figures[f"eval/{key}"])
            for name, key in (("loss", "loss"), ("perplexity", "perplexity"), ("bits", "bits_per_byte"))}  # fmt: skip


def run_faults(_folder: Path, inputs: Inputs) -> dict[str, Any]:
    return read_tables("tests/data/test_doctor.py", "--books", inputs.corpus)


def read_tables(*flags: Any) -> dict[str, list[str]]:
    """Run a slow test that prints tables; return them as find_tables does."""
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-m", "slow", *map(str, flags)]
    printed = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    return find_tables(printed)


def find_tables(printed: str) -> dict[str, list[str]]:
    """Return the lines of the tables in a text, each by the first word of the line above it and a blank one."""
    found = re.findall(r"^(\w+).*\n\n((?:\|.*\n)+)", printed, re.MULTILINE)
    return {name: table.splitlines() for name, table in found}


def show_tables(figures: dict[str, list[str]]) -> dict[str, str]:
    return {name: re.sub(r"(?<=\d)%", " %", show_lines(lines)) for name, lines in figures.items()}


def run_larger(folder: Path, inputs: Inputs) -> dict[str, Any]:
    """With all flags at their defaults; the excerpt is of the first prompt that the author continues."""
    book, data, model = inputs.books[0], folder / "larger/blocks", folder / "larger/model"
    run_script("prepare_data", "--input-path", book, "--model-name", inputs.model, "--output-dir", data)
    run_script("finetune_generative", "--data-dir", data, "--output-dir", model)
    run_script("generate_text", "--finetuned-model", model)
    lines = list_excerpts(read(model / "report.json")["texts"])
    return {"run": collect_run(data, model), "excerpt": [*lines[:2], lines[3]]}


def show_larger(figures: dict[str, Any]) -> dict[str, str]:
    shown = show_run(figures["run"])
    rows = [[title, shown[f"{name}_base"], shown[name], ""]
            for title, name in (("validation loss, nats per token", "loss"), ("perplexity", "perplexity"),
                                ("bits per byte", "bits"))]  # fmt: skip
    rows.append(
        ["tokens in n-grams of 8 or more shared with training", "", shown["copied_8"], shown["copied_8_author"]]
    )
    return shown | {
        "table": make_table(" | >base | >fine-tuned | >author", rows),
        "excerpt": show_lines(figures["excerpt"]),
    }


EXPERIMENTS = {
    "books": (run_books, show_books),
    "rates": (run_rates, show_rates),
    "decodings": (run_decodings, show_decodings),
    "lora": (run_lora, show_lora),
    "long": (run_long, show_long),
    "ladder": (run_ladder, show_ladder),
    "base": (run_base, show_base),
    "faults": (run_faults, show_tables),
    "larger": (run_larger, show_larger),
    "scale": (run_scale, show_scale),
}
# Name: the inputs that it cannot do without.
NEEDS = {"books": ["books"], "decodings": ["books"], "lora": ["books"], "ladder": ["books"], "base": ["corpus"],
         "faults": ["corpus"], "larger": ["books", "model"]}  # fmt: skip
