"""The curves of a training and the parts of the style as matplotlib figures, and figures as SVG inside a page.

matplotlib is imported inside the functions because it is heavy and needed at the end of a script only.
"""

import io
import itertools
import re
import warnings
from typing import Any

TRAINING, VALIDATION = "#7596b8", "#c8553d"  # readable on white and on black
LEVEL = {"color": "black", "linestyle": "--", "linewidth": 1}
BEST = {"color": VALIDATION, "linestyle": "none", "marker": "o", "markersize": 10, "fillstyle": "none"}
ENDS = {"base": "s", "author": "D"}
END = {"color": "black", "linestyle": "none", "markersize": 9, "fillstyle": "none"}  # a point inside is still seen
POINTS = [("o", VALIDATION), ("^", TRAINING), ("v", "#8a8a3c"), ("P", "#9673a6")]  # fine-tuned model, judged files
ROW, MOST_LABEL = 0.15, 18  # inches per point; characters of a file's name


def draw_loss(train: list, validation: list, best_step: int | None) -> Any:
    """Draw (step, loss) pairs of training and validation; the loss at step 0 and the best model are marked."""
    figure, axes = _start_figure("Loss on the book", "step", "loss (nats per token)")
    if train:
        axes.plot(*zip(*train, strict=True), color=TRAINING, linewidth=1, label="training")
    if validation:
        axes.plot(*zip(*validation, strict=True), color=VALIDATION, marker="o", markersize=4, label="validation")
        if validation[0][0] == 0:
            axes.axhline(validation[0][1], label="base model", **LEVEL)
    for step, loss in validation:
        if step == best_step and step > 0:
            axes.plot([step], [loss], label=f"best: {loss:.3f} at step {step}", **BEST)
    if axes.lines:
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def draw_copying(evaluations: list[dict], best_step: int | None, max_copy_rate: float | None) -> Any:
    """Draw bits_per_byte of evaluations against copy_rate (share of tokens); the best and the limit are marked."""
    figure, axes = _start_figure("Style against copying", "% of sampled tokens copied", "validation bits per byte")
    points = [(100 * row["copy_rate"], row["bits_per_byte"]) for row in evaluations]
    axes.plot(*zip(*points, strict=True), color=VALIDATION, marker="o", markersize=4, label="from the base model on")
    for row, (x, y) in zip(evaluations, points, strict=True):
        if row["step"] == best_step:
            axes.plot([x], [y], label=f"best: step {best_step}", **BEST)
    if max_copy_rate is not None:
        axes.axvline(100 * max_copy_rate, label="limit", **LEVEL)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def draw_parts(finetuned: dict[str, dict], judged: dict[str, dict]) -> Any:
    """Draw the share of the gap closed by each part, with its interval; of the judged files, the first three.

    Args:
        finetuned: intervals by part.
        judged: the same, by file.
    """
    columns = [("fine-tuned", finetuned), *itertools.islice(judged.items(), len(POINTS) - 1)]
    step = 1 / (len(columns) + 1)  # the points of a part lie below each other
    size = (3.8, 1.3 + ROW * len(finetuned) / step)
    figure, axes = _start_figure("Share of the gap closed", "0: base, 1: author; lines: 95 % interval", "", size)
    for value, (label, marker) in enumerate(ENDS.items()):
        axes.plot([value] * len(finetuned), range(len(finetuned)), label=label, marker=marker, **END)
    for number, ((label, shares), (marker, color)) in enumerate(zip(columns, POINTS, strict=False)):
        known = {y + number * step: shares[part] for y, part in enumerate(finetuned) if part in shares}
        values, lows, highs = ([share[key] for share in known.values()] for key in ("value", "low", "high"))
        axes.hlines(list(known), lows, highs, color=color, linewidth=2)
        axes.plot(values, list(known), label=label, marker=marker, color=color, linestyle="none")
    axes.set(xlim=(-0.06, 1.06), ylim=(len(finetuned) - 1.1 * step, -0.9 * step))
    axes.set_yticks(range(len(finetuned)), list(finetuned))
    labels = [line.get_label() for line in axes.lines]
    labels = [label if len(label) <= MOST_LABEL else f"{label[: MOST_LABEL - 1]}\u2026" for label in labels]
    legend = figure.legend(axes.lines, labels, loc="outside lower center", ncols=2 if judged else 3, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a file's name may have a $
    return figure


def _start_figure(title: str, x_label: str, y_label: str, size: tuple = (5.4, 3.6)) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # pyplot would keep the figure, and look for a screen

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.25)
    return figure, axes


def render_svg(figure: Any, name: str) -> str:
    """Return a figure as an <svg> element in the page's text color; `name` keeps its ids apart from other figures'."""
    from matplotlib import rc_context

    file = io.StringIO()
    # The same ids every time; text as text, also in letters that matplotlib's own font does not have.
    with rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}), warnings.catch_warnings(action="ignore"):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text, title = file.getvalue(), figure.axes[0].get_title()
    box, body = re.search(r'viewBox="[^"]*"', text)[0], text[text.index('<g id="figure_1">') :]
    body = re.sub(r' clip-path="[^"]*"| font-family:[^;]*;', "", body)  # nothing lies outside the axes
    body = re.sub(r'(?<= id=")|(?<=xlink:href="#)', f"{name}-", body)
    body = body.replace("#000000", "currentColor").replace("xlink:href", "href")
    return f'<svg {box} role="img" aria-label="{title}">\n{body}'
