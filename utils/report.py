"""Pages for people: the comparison of base and fine-tuned model as text columns and as Markdown.

Renders what it is given; measures nothing.
"""

import itertools
import shutil
import textwrap

METRICS = [
    ("eval/loss", "held-out loss (nats a token)", "{:.4f}"),
    ("eval/perplexity", "perplexity", "{:.2f}"),
    ("eval/bits_per_byte", "bits per byte", "{:.4f}"),
]
NAMES = {"base": "base model", "finetuned": "fine-tuned model", "author": "the author really wrote"}


def group_samples(prompts: list[dict], samples: list[dict]) -> list[tuple[dict, list[dict[str, str]]]]:
    """Pair the samples: for each prompt, one dict of texts by model for each sample index.

    Args:
        prompts: dicts with prompt and author (None, or the true continuation).
        samples: rows of samples.jsonl.
    """
    grouped = []
    for prompt in prompts:
        mine = [s for s in samples if s["prompt"] == prompt["prompt"]]
        pairs: dict[int, dict[str, str]] = {}
        for sample in mine:
            pairs.setdefault(sample["sample_index"], {})[sample["model"]] = sample["text"]
        if prompt["author"] is not None:
            pairs[0]["author"] = prompt["author"]
        grouped.append((prompt, [pairs[index] for index in sorted(pairs)]))
    return grouped


def render_terminal(prompts: list[dict], samples: list[dict], scores: dict, width: int | None = None) -> str:
    """Lay the texts out in columns side by side, or below each other in a narrow terminal."""
    width = width or min(shutil.get_terminal_size((100, 24)).columns, 150)
    lines = []
    if scores:
        lines += [f"{'':<30}{'base':>12}{'fine-tuned':>12}"]
        for key, label, form in METRICS:
            values = (form.format(scores[name][key]) for name in ("base", "finetuned"))
            lines.append(f"{label:<30}" + "".join(f"{value:>12}" for value in values))
        lines.append("")
    for prompt, pairs in group_samples(prompts, samples):
        lines += ["=" * width, *_wrap(f"prompt: {prompt['prompt'] or '(none)'}", width), "=" * width]
        for texts in pairs:
            lines += [*_columns({NAMES[name]: text for name, text in texts.items()}, width), ""]
    return "\n".join(lines)


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


def render_comparison(prompts: list[dict], samples: list[dict], scores: dict, settings: dict) -> str:
    """Render the comparison as Markdown: scores, samples in pairs, settings."""
    lines = ["# Base and fine-tuned model on the same prompts", ""]
    if scores:
        lines += ["| on held-out passages of the book | base | fine-tuned |", "|---|---:|---:|"]
        for key, label, form in METRICS:
            values = (form.format(scores[name][key]) for name in ("base", "finetuned"))
            lines.append(f"| {label} | " + " | ".join(values) + " |")
        lines.append("")
    for number, (prompt, pairs) in enumerate(group_samples(prompts, samples), 1):
        kind = "opening of a held-out passage" if prompt["author"] is not None else "prompt"
        lines += [f"## {number}. {kind}", "", _quote(prompt["prompt"] or "(none)"), ""]
        for texts in pairs:
            for name, text in texts.items():
                lines += [f"**{NAMES[name]}**", "", _quote(text), ""]
    lines += ["## Settings", "", "| setting | value |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in settings.items()]
    return "\n".join(lines) + "\n"


def _quote(text: str) -> str:
    """Quote a text so that Markdown shows it as it is: line by line, nothing in it is markup."""
    escaped = "".join(f"\\{c}" if c in "\\`*_{}[]<>#|~" else c for c in text.strip("\n"))
    return "\n".join(f"> {line}  " if line else ">" for line in escaped.split("\n"))
