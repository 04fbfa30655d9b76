"""Pictures of the notes, from the book, the script, a measured step and the ladder; the answer of note 6.

python -m benchmarks.pictures    print how the book is divided, and what a step costs on this machine
"""

import argparse
import ast
import functools
import itertools
import json
import re
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import finetune_generative
import prepare_data
from benchmarks.figures import read_figures
from benchmarks.mistakes import RESULTS
from benchmarks.pages import ROOT
from utils.data.corpus import read_segments
from utils.data.text import count_words, read_book
from utils.evaluation.style import PARTS
from utils.model import loading
from utils.model.layers import use_fast_layers
from utils.training.forecast import count_activations, read_clock
from utils.training.optim import build_optimizer, clip_gradients
from utils.training.setup import keep_freed_memory

COLUMNS = 100  # of a strip
BAR = 50  # characters of the longest bar
TICK = 5000  # words
BATCHES = 11, 1  # blocks of the batches of mistakes.loss_of_a_step
WARM_UP, REPEATS = 3, 20  # steps
PICTURE = ROOT / "notes/verdict.png"
DRAWN = "figures"  # name under which a picture holds the figures that it was drawn from
# The share of the way that the report printed at commit 353fa4b: mean of Delta and a classifier of character n-grams.
FIRST_VERDICT = {"character_chain_5": 1.04, "finetuned": 0.96, "unseen": 0.72}
# Characters that the next one depends on: four in the first verdict's chain, five in the ladder's.
LABELS = ["Markov chain of characters", "fine-tuned model", "the author, unseen pages"]


def split_words(path: Path) -> list[tuple[str, int, int]]:
    """Return (split, first word, last word + 1) of each segment of a book, as prepare_data.py takes them by default."""
    args, book = prepare_data.parse_args([]), read_book(path)[1]
    segments = list(read_segments([book], args.encoding, args.val_split, args.seed))
    ends = [0, *itertools.accumulate(count_words(segment.text) for segment in segments)]
    return [(part.split, *span) for part, span in zip(segments, itertools.pairwise(ends), strict=True)]


def draw_strip(spans: list[tuple[str, int, int]]) -> str:
    """Return a line of COLUMNS characters for a book: dark where the middle of a column is validation text."""
    middles = [(column + 0.5) * spans[-1][2] / COLUMNS for column in range(COLUMNS)]
    found = [next(split for split, start, end in spans if start <= middle < end) for middle in middles]
    return "".join("█" if split == "validation" else "░" for split in found)


def draw_split() -> str:
    """Return the split of the sample book, below it the last tenth, as text."""
    spans = split_words(ROOT / prepare_data.parse_args([]).input_path[0])
    n_words, parts = spans[-1][2], [(start, end) for split, start, end in spans if split == "validation"]
    n_chosen = sum(end - start for start, end in parts)
    last = [("train", 0, n_words - n_chosen), ("validation", n_words - n_chosen, n_words)]
    marks, labels = [" "] * COLUMNS, ""
    for word in range(0, n_words, TICK):
        column = word * COLUMNS // n_words
        marks[column] = "|"
        labels = f"{labels:{column}}{word:,}"
    lines = [f"prepare_data.py: {len(parts)} segments (█), {n_chosen:,} of {n_words:,} words", draw_strip(spans), "",
             "the last tenth: as many words, all from the end", draw_strip(last), "".join(marks).rstrip(),
             f"{labels} words"]  # fmt: skip
    return "\n".join(lines)


def cut_loop(source: str) -> dict[str, str]:
    """Cut the loop of train() after each statement whose comment has a number; return the parts by number."""
    loop = next(node for node in ast.walk(find_function(source, "train")) if isinstance(node, ast.While))
    lines, parts, start = source.splitlines(), {}, loop.lineno
    for statement in loop.body:
        own = "\n".join(lines[start - 1 : statement.end_lineno])
        if numbers := re.findall(r"# (\d) [a-z]", own):
            parts[numbers[0]], start = own, statement.end_lineno + 1
    last = max(parts)
    parts[last] += "\n" + "\n".join(lines[start - 1 : loop.end_lineno])
    return {number: re.sub(rf"^ {{{loop.col_offset}}}", "", part, flags=re.MULTILINE) for number, part in parts.items()}


def find_function(source: str, name: str) -> ast.FunctionDef:
    """Return the function of a module's source that has a name."""
    found = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == name)
    return next(found)


def measure_step() -> dict[str, Any]:
    """Measure a step of the demo: seconds of its parts, the fastest of REPEATS, and bytes of what it keeps."""
    keep_freed_memory()
    device, args = loading.pick_device("auto"), finetune_generative.parse_args([])
    dtype, block_size = loading.pick_dtype("auto", device), prepare_data.parse_args([]).block_size
    model, tokenizer = loading.load_pair(ROOT / "results/base_model")
    use_fast_layers(model.train().to(device), device, False)
    optimizer = build_optimizer(model, args.learning_rate, args.weight_decay, (args.adam_beta1, args.adam_beta2),
                                args.adam_epsilon)  # fmt: skip
    text = read_book(ROOT / prepare_data.parse_args([]).input_path[0])[0]
    ids = tokenizer(text)["input_ids"][: args.batch_size * block_size]
    blocks = torch.tensor(ids, device=device).view(-1, block_size)
    autocast = functools.partial(loading.autocast, device, dtype)
    one, two, kept = (count_activations(model, blocks[:n], autocast) for n in (1, 2, len(blocks)))
    copies = 2 * one - two if dtype == "bf16" else 0  # of the weights, which are kept once for any number of blocks
    rows = []
    for _ in range(WARM_UP + REPEATS):
        clock = [read_clock(device)]
        with autocast():
            loss = model(input_ids=blocks, labels=blocks, use_cache=False).loss
            clock.append(read_clock(device))
            loss.backward()
        clock.append(read_clock(device))
        clip_gradients(model, args.max_grad_norm)
        clock.append(read_clock(device))
        gradients = sum(p.grad.nbytes for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.append(read_clock(device))
        rows.append([end - start for start, end in itertools.pairwise(clock)])
    seconds = [min(part) for part in zip(*rows[WARM_UP:], strict=True)]  # other load slows some of them
    averages = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.dim())
    return {
        "blocks": len(blocks), "block_size": block_size, "dtype": dtype,
        "weights": sum(p.numel() for p in model.parameters()),
        "seconds": dict(zip(["forward", "backward", "clipping", "AdamW"], seconds, strict=True)),
        "bytes": {"weights": sum(p.nbytes for p in model.parameters()), "gradients": gradients,
                  "two averages": averages, "weights in bf16": copies, "activations": kept - copies},
    }  # fmt: skip


def show_step(figures: dict[str, Any]) -> dict[str, str]:
    """Return the picture of a measured step, as it stands between the markers."""
    seconds, sizes, n_weights = figures["seconds"], figures["bytes"], figures["weights"]
    total, unit = sum(seconds.values()), figures["blocks"] * figures["block_size"]
    lines = [f"time of a step of {unit:,} tokens, in {figures['dtype']}: {total:.2f} s"]
    lines += draw_bars({name: (part, f"{part / total:4.0%}".replace("%", " %")) for name, part in seconds.items()})
    lines += ["", f"memory, for {n_weights / 1e6:.1f} million weights: {sum(sizes.values()) / 1e6:.0f} MB"]
    per_weight = {name: f"{size / n_weights:.0f} bytes per weight" for name, size in sizes.items()}
    per_weight["activations"] = f"{sizes['activations'] / unit / 1e3:.0f} kB per token"
    lines += draw_bars({name: (size, f"{size / 1e6:4.0f} MB, {per_weight[name]:18}")
                        for name, size in sizes.items() if size})  # fmt: skip
    return {"picture": fence("\n".join(lines))}


def draw_bars(rows: dict[str, tuple[float, str]]) -> list[str]:
    """Return a line for each name with its text and a bar as long as its value."""
    longest = max(value for value, _ in rows.values())
    return [f"  {name:15} {text}  {'█' * max(1, round(BAR * value / longest))}" for name, (value, text) in rows.items()]


def fence(text: str, language: str = "") -> str:
    """Return a text as a code block on lines of its own."""
    return f"\n```{language}\n{text}\n```\n"


def render() -> dict[str, str]:
    """Return the pictures that need no run, by the names of their markers."""
    source = (ROOT / "finetune_generative.py").read_text(encoding="utf-8")
    function = ast.get_source_segment(source, find_function(source, "forward_backward"))
    code = cut_loop(source) | {"forward_backward": function}
    shown = {f"loop.{name}": fence(part, "python") for name, part in code.items()}
    return shown | {"split": fence(draw_split())} | show_accumulation()


def show_accumulation() -> dict[str, str]:
    """Return the figures of note 6's answer: what a step reports that weights its two batches alike."""
    last, mean = json.loads(RESULTS.read_text(encoding="utf-8"))["the last micro-batch logged"]["wrong"]
    first = ((BATCHES[0] + BATCHES[1]) * mean - BATCHES[1] * last) / BATCHES[0]
    figures = {"last": last, "mean": mean, "first": first, "reported": (first + last) / 2}
    return {f"accumulation.{name}": f"{value:.3f}" for name, value in figures.items()}


def read_ladder() -> dict[str, dict[str, Any]]:
    """Return words, spelling and sense of the texts of FIRST_VERDICT, on the sample book."""
    rows = read_figures()["ladder"]["figures"]["book"]
    return {name: {part: rows[name][part] for part in PARTS} for name in FIRST_VERDICT}


def read_drawn() -> dict | None:
    """Return the figures that the picture of the verdicts was drawn from."""
    return json.loads(Image.open(PICTURE).text[DRAWN]) if PICTURE.is_file() else None


def draw_verdicts() -> None:
    """Draw the first verdict beside the present one, if the figures of the ladder have changed."""
    drawn = {"first": FIRST_VERDICT, "present": read_ladder()}
    if drawn == read_drawn():
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    figure.get_layout_engine().set(wspace=0.05)
    left, right = figure.subplots(1, 2, width_ratios=[2, 3])
    for axes in (left, right):
        axes.set(xlim=(0, 1.2), ylim=(len(FIRST_VERDICT) - 0.4, -0.6), xticks=[0, 0.5, 1],
                 xticklabels=["base model", "half", "the author"])  # fmt: skip
        axes.axvline(1, color="0.8", zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_title("first verdict: mean of two measures", loc="left", fontsize=10)
    left.barh(range(len(FIRST_VERDICT)), FIRST_VERDICT.values(), 0.5, color="#8a8f98")
    left.set_yticks(range(len(LABELS)), LABELS)
    for row, value in enumerate(FIRST_VERDICT.values()):
        left.text(value - 0.03, row, f"{value * 100:.0f} %", ha="right", va="center", color="white", weight="bold")
    right.set_title("present verdict: the weakest of three parts", loc="left", fontsize=10)
    right.set_yticks([])
    for row, shares in enumerate(drawn["present"].values()):
        weakest = min(PARTS, key=lambda part: shares[part]["value"])
        for n, part in enumerate(PARTS):
            y, (low, value, high) = row + 0.26 * (n - 1), (shares[part][end] for end in ("low", "value", "high"))
            color = "#c2410c" if part == weakest else "#c9ccd1"
            right.barh(y, value, 0.22, color=color)
            right.plot([low, high], [y, y], color="0.25", linewidth=1)
            right.text(max(value, high) + 0.02, y, f"{part} {value:.2f}", va="center", fontsize=8,
                       weight="bold" if part == weakest else None)  # fmt: skip
    partial = PICTURE.with_suffix(".partial.png")
    figure.savefig(partial, dpi=110)
    info = PngInfo()
    info.add_text(DRAWN, json.dumps(drawn))
    Image.open(partial).convert("RGB").quantize(64).save(PICTURE, optimize=True, pnginfo=info)
    partial.unlink()


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(draw_split() + show_step(measure_step())["picture"].replace("```", ""))


if __name__ == "__main__":
    main()
