"""Growth: time a token as block size, batch, model and text grow, and as a micro-batch takes more tokens."""

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.timing import interleave, main
from finetune_generative import forward_backward
from utils.model.layers import use_fast_layers
from utils.model.loading import autocast, pick_dtype
from utils.storage import hash_file
from utils.training.setup import keep_freed_memory

TOKENS = 1024
PICTURE = Path("benchmarks/growth.png")
MEDIUM = {"n_layer": 6, "n_embd": 256, "n_head": 4, "vocab_size": 8192}


def train_call(blocks: int, block: int, **shape):
    """Return a function that does a forward and a backward pass over so many blocks of a GPT-2 of this shape."""

    device = torch.device("cpu")
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**shape)).train()
    use_fast_layers(model, device)
    input_ids = torch.randint(0, model.config.vocab_size, (blocks, block))

    def call() -> None:
        with autocast(device, pick_dtype("auto", device)):
            forward_backward(model, input_ids, 1.0)
        model.zero_grad(set_to_none=True)

    return call


def prepare_call(folder: Path, megabytes: float):
    """Return a function that prepares so much text, the start-up left in."""

    book = Path("results/data/book.txt").read_text(encoding="utf-8")
    words = book.split(" ")
    path = folder / f"{megabytes}.txt"
    chosen = torch.randint(0, len(words), (int(megabytes * 1e6 / 5.2),), generator=torch.Generator().manual_seed(0))
    path.write_text(" ".join(words[i] for i in chosen.tolist()), encoding="utf-8")
    flags = ["--input-path", path, "--model-name", "results/base_model", "--output-dir", folder / hash_file(path)[:8]]
    command = [sys.executable, "prepare_data.py", *flags, "--overwrite"]
    return lambda: subprocess.run(command, check=True, capture_output=True)


def measure(quick: bool) -> dict:
    """Time each point of five series in turn; microseconds per token."""

    keep_freed_memory()
    small = {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 1000}
    medium, tokens = (small if quick else MEDIUM), TOKENS
    series: dict[str, dict[str, tuple]] = {"block size, tokens": {}, "blocks at once": {}, "parameters, M": {}}
    for block in (64, 128, 256, 512, 1024):
        series["block size, tokens"][str(block)] = (train_call(tokens // block, block, **medium), tokens)
    for blocks in (1, 2, 4, 8, 16, 32):
        series["blocks at once"][str(blocks)] = (train_call(blocks, 128, **medium), blocks * 128)
    for layers, width in ((4, 128), (6, 256), (8, 512), (12, 768))[: 2 if quick else None]:
        shape = {"n_layer": layers, "n_embd": width, "n_head": width // 64, "vocab_size": 8192}
        n_parameters = 12 * layers * width**2 + 8192 * width
        call = train_call(8, 128, **shape)
        series["parameters, M"][f"{n_parameters / 1e6:.0f}M"] = (call, 8 * 128)
    with tempfile.TemporaryDirectory() as name:
        sizes = (0.1, 0.2) if quick else (1, 2, 4, 8, 16)
        series["text to prepare, MB"] = {str(size): (prepare_call(Path(name), size), size * 1e6) for size in sizes}
        values, table = {}, {}
        for title, points in series.items():
            seconds = interleave({point: call for point, (call, _) in points.items()}, 2 if quick else 3)
            table[title] = {p: 1e6 * statistics.median(times) / points[p][1] for p, times in seconds.items()}
            values |= {f"{title}: {p}": [1e6 * s / points[p][1] for s in times] for p, times in seconds.items()}
    draw(table, PICTURE if not quick else Path(tempfile.gettempdir()) / PICTURE.name)
    sizes = list(table["parameters, M"].items())
    first, last = (time_a_token / float(point[:-1]) for point, time_a_token in (sizes[0], sizes[-1]))
    texts, blocks = list(table["text to prepare, MB"].values()), list(table["block size, tokens"].values())
    targets = [
        {"what": "time per token and parameter, largest model / smallest", "value": last / first, "wanted": "<= 1.2"},
        {
            "what": "time per byte to prepare, most text / half of it",
            "value": texts[-1] / texts[-2],
            "wanted": "<= 1.1",
        },
        {"what": "time per token, block 1024 / block 128", "value": blocks[-1] / blocks[1], "wanted": "<= 2"},
    ]
    return {"title": "Growth", "unit": "us per token or byte", "values": values, "ours": "", "targets": targets,
            "facts": {"table": table}}  # fmt: skip


def draw(table: dict[str, dict[str, float]], path: Path) -> None:
    """Draw each series into a panel of its own."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(table), figsize=(13, 3.2), layout="constrained")
    for panel, (title, points) in zip(panels, table.items(), strict=True):
        sizes = [float(point.rstrip("M")) for point in points]
        panel.plot(sizes, list(points.values()), marker="o", color="#b5482b")
        panel.set(xlabel=title, xlim=(0, None), ylim=(0, None))
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("microseconds per token")
    panels[-1].set_ylabel("microseconds per byte")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main(measure)
