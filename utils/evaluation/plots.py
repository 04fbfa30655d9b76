"""The curves of a training as matplotlib figures, and figures as SVG inside a page.

matplotlib is imported inside the functions because it is heavy and needed at the end of a script only.
"""

import io
import re
from typing import Any

TRAINING, VALIDATION = "#7596b8", "#c8553d"  # readable on white and on black
LEVEL = {"color": "black", "linestyle": "--", "linewidth": 1}
BEST = {"color": VALIDATION, "linestyle": "none", "marker": "o", "markersize": 10, "fillstyle": "none"}


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


def _start_figure(title: str, x_label: str, y_label: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # pyplot would keep the figure, and look for a screen

    figure = Figure(figsize=(5.4, 3.6), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.25)
    return figure, axes


def render_svg(figure: Any, name: str) -> str:
    """Return a figure as an <svg> element in the page's text color; `name` keeps its ids apart from other figures'."""
    from matplotlib import rc_context

    file = io.StringIO()
    with rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):  # the same ids every time; text as text
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text, title = file.getvalue(), figure.axes[0].get_title()
    box, body = re.search(r'viewBox="[^"]*"', text)[0], text[text.index('<g id="figure_1">') :]
    body = re.sub(r' clip-path="[^"]*"| font-family:[^;]*;', "", body)  # nothing lies outside the axes
    body = re.sub(r'(?<= id=")|(?<=xlink:href="#)', f"{name}-", body)
    body = body.replace("#000000", "currentColor").replace("xlink:href", "href")
    return f'<svg {box} role="img" aria-label="{title}">\n{body}'
