"""The classic mistakes: each is one line of this project, run beside the right one; what is reported beside the truth.

python -m benchmarks.mistakes                all of them; writes mistakes.json here and the table of notes/06
python -m benchmarks.mistakes labels decay   those whose titles hold a word; the others' figures stay as they are

An experiment returns two figures of the same quantity: the one that the program reports and the one that an independent
measure finds. They agree with the right line and differ with the wrong one.
"""

import argparse
import contextlib
import functools
import inspect
import io
import json
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

import finetune_generative
import prepare_data
from benchmarks.pages import fill_pages, name_marker
from tests.impostors import make_impostors
from tests.scorer import independent_loss
from utils.data import text as texts
from utils.data import tokenizer as tokens
from utils.data.blocks import BatchOrder, Blocks, open_blocks
from utils.evaluation import generation, loss, style
from utils.evaluation.columns import build_column
from utils.evaluation.generation import Decoding
from utils.evaluation.reader import read_texts
from utils.model import layers, loading
from utils.training import optim

ROOT = Path(__file__).parent.parent
NOTE, RESULTS = ROOT / "notes/06_classic_mistakes.md", Path(__file__).with_suffix(".json")


class Lab:
    """Runs the scripts in this process, on a part of a book and a base model, in a folder of its own.

    `plain` holds the blocks of that part; they and `straight` are made before a mistake is planted.
    """

    def __init__(self, folder: Path, base: Path, book: str, control: str, block_size: int, steps: int) -> None:
        self.folder, self.base, self.book, self.control = folder, base, book, control
        self.block_size, self.steps, self.count = block_size, steps, 0
        self.part, self.unseen = book[:24_000], book[24_000:32_000]
        self.model, self.tokenizer = loading.load_pair(base)
        self.plain = self.prepare(self.part)

    @functools.cached_property
    def straight(self) -> Path:
        """The folder of a run of 2 * steps steps."""
        return self.finetune(self.plain, 2 * self.steps, "--save-every", self.steps)

    def prepare(self, text: str, *flags) -> Blocks:
        """Run prepare_data.py on a text and return the blocks."""
        self.count += 1
        path, out = self.folder / f"{self.count}.txt", self.folder / f"blocks_{self.count}"
        path.write_text(text, encoding="utf-8")
        common = ["--input-path", path, "--output-dir", out, "--block-size", self.block_size]
        self._run(prepare_data, *common, *(flags or ["--model-name", self.base]))
        return open_blocks(out)

    def finetune(self, data: Blocks, steps: int, *flags, out: Path | None = None) -> Path:
        """Run finetune_generative.py and return its folder. The last batch of an evaluation has one block."""
        self.count += 1
        out = out or self.folder / f"run_{self.count}"
        flags = ["--max-steps", steps, "--eval-every", steps, "--eval-batch-size", max(1, len(data.validation) - 1),
                 "--device", "cpu", "--dtype", "fp32", "--learning-rate", "1e-3", "--dropout", "0.1",
                 "--batch-size", 4, "--copy-samples", 0, "--sample-tokens", 0, *flags]  # fmt: skip
        self._run(finetune_generative, "--data-dir", data.folder, "--output-dir", out, *flags)
        return out

    def train(self, data: Blocks, steps: int) -> tuple[float, Any]:
        """Return the validation loss that the loop reports at its end, and the model."""
        run = self.finetune(data, steps)
        return last(run, "eval/loss"), loading.load_model(run / f"checkpoint-{steps}")

    @staticmethod
    def _run(script: ModuleType, *flags) -> None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            script.main(script.parse_args(list(map(str, flags))))

    @functools.cached_property
    def shares(self) -> dict[str, dict]:
        """The gap closed by words of the book in random order; general text stands for the base model."""
        data = self.prepare(self.book)
        made, length = make_impostors(data, self.tokenizer, self.control, 40, 75), 75
        read = functools.partial(read_texts, self.model, self.tokenizer, batch_size=16, autocast=contextlib.nullcontext)
        book, control = self.tokenizer.decode(data.ids("train")), self.control
        measures = style.BookMeasures(data, self.tokenizer, book, True, control, length, read, seed=0)
        names = {"base": "other_author", "reference": "author", "judged": "shuffled_words"}
        columns = {name: build_column(made[kind], [np.array(self.tokenizer(text)["input_ids"]) for text in made[kind]],
                                      list(range(len(made[kind]))), name) for name, kind in names.items()}  # fmt: skip
        judged = columns.pop("judged")
        return measures.compare(judged, columns)[1]


def last(folder: Path, key: str) -> float:
    """Return the last value that a run reports in metrics.jsonl."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [row[key] for row in rows if key in row][-1]


def all_rows(blocks) -> torch.Tensor:
    return blocks[:]["input_ids"]


def validation_loss(lab: Lab) -> tuple[float, float]:
    """Validation loss at the end of a run: the loop's; the scorer's on the unchanged validation text."""
    reported, model = lab.train(lab.prepare(lab.part), lab.steps)
    return reported, independent_loss(model, all_rows(lab.plain.validation))


def loss_on_a_repeated_page(lab: Lab) -> tuple[float, float]:
    """Validation loss after training on one page, repeated 30 times: the loop's; the scorer's."""
    data = lab.prepare(lab.part[:600] * 30)
    reported, model = lab.train(data, 4 * lab.steps)
    return reported, independent_loss(model, all_rows(data.validation))


def loss_of_new_pages(lab: Lab) -> tuple[float, float]:
    """Validation loss after several epochs on few pages: the loop's; the scorer's on pages that no split has seen."""
    data = lab.prepare(lab.part[:8000], "--model-name", lab.base, "--val-split", 0.2)
    reported, model = lab.train(data, 5 * lab.steps)
    unseen, _ = loss.cut_blocks(lab.unseen, lab.tokenizer, lab.block_size)
    return reported, independent_loss(model, all_rows(unseen))


def loss_of_the_whole_book(lab: Lab) -> tuple[float, float]:
    """The base model's loss on a book with an afterword in another style: of its validation text; of all blocks."""
    data = lab.prepare(lab.part[:18_000] + "\n\n" + lab.control[:2000])
    loss_sums, n_targets = loss.score_blocks(lab.model, data.validation, 8, contextlib.nullcontext)
    rows = torch.cat([all_rows(data.train), all_rows(data.validation)])
    return sum(loss_sums) / n_targets, independent_loss(lab.model, rows)


def loss_of_a_step(lab: Lab) -> tuple[float, float]:
    """Training loss of a step of two batches, the second of one block: the loop's; the scorer's on all its blocks."""
    data = lab.prepare(lab.part[-3000:], "--model-name", lab.base, "--val-split", 0)
    batch = len(data.train) - 1
    run = lab.finetune(data, 1, "--batch-size", batch, "--grad-accum-steps", 2, "--dropout", 0)
    blocks = [i for some in BatchOrder(len(data.train), batch, 2, 42).step_batches(0) for i in some]
    return last(run, "train/loss"), independent_loss(lab.model, data.train[blocks]["input_ids"])


def moved_weights(lab: Lab) -> tuple[float, float]:
    """Percent of the weights that a step at a small learning rate moves: those with a gradient; those that differ."""
    model = loading.load_model(lab.base)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    finetune_generative.forward_backward(model, all_rows(lab.plain.validation)[:4], 1.0)
    optim.build_optimizer(model, 1e-5, 0.0, (0.9, 0.999), 1e-8).step()
    pairs = list(zip(before, model.parameters(), strict=True))
    counts = [(p.grad.count_nonzero().item(), (p != old).sum().item(), p.numel()) for old, p in pairs]
    with_gradient, moved, n_weights = map(sum, zip(*counts, strict=True))
    return 100 * with_gradient / n_weights, 100 * moved / n_weights


def gain_of_norms(lab: Lab) -> tuple[float, float]:
    """Mean gain of the norms, before and after 100 steps at 1e-2 with decay 0.1 in which every gradient is zero."""
    model = loading.load_model(lab.base)
    gains = [p for name, p in model.named_parameters() if "ln_" in name and name.endswith("weight")]
    before = torch.cat(gains).mean().item()
    optimizer = optim.build_optimizer(model, 1e-2, 0.1, (0.9, 0.999), 1e-8)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(100):
        optimizer.step()
    return before, torch.cat(gains).mean().item()


def loss_after_resuming(lab: Lab) -> tuple[float, float]:
    """Validation loss of a run that was resumed halfway; that of the run that was never stopped."""
    lab.count += 1
    run = shutil.copytree(lab.straight, lab.folder / f"resumed_{lab.count}")
    shutil.rmtree(run / f"checkpoint-{2 * lab.steps}")
    lab.finetune(lab.plain, 2 * lab.steps, "--save-every", lab.steps, out=run)
    return last(run, "eval/loss"), last(lab.straight, "eval/loss")


def different_samples(lab: Lab) -> tuple[float, float]:
    """Samples of one prompt: asked for, each with its own seed; different ones among them."""
    prompt = lab.plain.ids("train")[:8].tolist()
    samples = generation.generate_ids(lab.model, lab.tokenizer.eos_token_id, [prompt] * 8, list(range(8)),
                                      Decoding(max_new_tokens=20), contextlib.nullcontext)  # fmt: skip
    return 8, len(set(map(tuple, samples)))


def tokens_beside_a_longer_prompt(lab: Lab) -> tuple[float, float]:
    """Greedy tokens of a short prompt: written beside a longer one; equal to those written alone."""
    ids = lab.plain.ids("train").tolist()
    short, long, greedy = ids[:6], ids[6 : lab.block_size // 2], Decoding(max_new_tokens=20, do_sample=False)
    write = functools.partial(generation.generate_ids, lab.model, lab.tokenizer.eos_token_id, decoding=greedy,
                              autocast=contextlib.nullcontext)  # fmt: skip
    alone, beside = write(prompts=[short], seeds=[0])[0], write(prompts=[short, long], seeds=[0, 0])[0]
    return len(beside), next((i for i, pair in enumerate(zip(alone, beside, strict=True)) if len(set(pair)) > 1), 20)


def gap_between_tokenizers(lab: Lab) -> tuple[float, float]:
    """Bits per byte of a model with a tokenizer of 300 tokens less those of one with 2,000: the loop's; by hand."""
    config = lab.folder / "config.json"
    config.write_text('{"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64}')
    reported, true = [], []
    for size in (300, 2000):
        data = lab.prepare(lab.part, "--train-tokenizer", size)
        run = lab.finetune(data, 3 * lab.steps, "--from-scratch", config)
        model, tokenizer = loading.load_pair(run / f"checkpoint-{3 * lab.steps}")
        text = "".join(tokenizer.batch_decode(data.segments("validation")))
        n_bytes = len(text.encode()) / len(tokenizer(text)["input_ids"])  # per token
        reported.append(last(run, "eval/bits_per_byte"))
        true.append(independent_loss(model, all_rows(data.validation)) / np.log(2) / n_bytes)
    return reported[0] - reported[1], true[0] - true[1]


def verdict_on_shuffled_words(lab: Lab) -> tuple[float, float]:
    """Gap closed by words of the book in random order: the verdict's; by a reader of the sense."""
    return style.weakest(lab.shares)["value"], lab.shares["sense"]["value"]


@dataclass(frozen=True)
class Mistake:
    """A line of the project, its wrong form, an experiment that shows the difference, and the guard against it.

    `tolerance`: by how much reported and true figure may differ with the right line; `guard`: the test that fails with
    the wrong one.
    """

    title: str
    owner: Any
    function: str
    right: str
    wrong: str
    experiment: Callable[[Lab], tuple[float, float]]
    guard: str
    tolerance: float = 2e-3

    @property
    def path(self) -> str:
        """The file that has the line."""
        return str(Path(inspect.getfile(self.owner)).relative_to(ROOT))

    @contextlib.contextmanager
    def planted(self) -> Iterator[None]:
        """Replace the function, with its line in the wrong form, in every module that has imported it."""
        old = getattr(self.owner, self.function)
        source, scope = textwrap.dedent(inspect.getsource(old)), {}
        exec(source.replace(self.right, self.wrong), inspect.unwrap(old).__globals__, scope)
        owners = [self.owner] if inspect.isclass(self.owner) else list(sys.modules.values())
        holders = [owner for owner in owners if getattr(owner, "__dict__", {}).get(self.function) is old]
        try:
            for holder in holders:
                setattr(holder, self.function, scope[self.function])
            yield
        finally:
            for holder in holders:
                setattr(holder, self.function, old)


GROUPS = ("groups = (encode_text(self.tokenizer, pieces[first : first + GROUP]) "
          "for first in range(0, len(pieces), GROUP))")  # fmt: skip
STRAIGHT = "tests/test_finetune_generative.py::test_stopped_and_continued_equals_never_stopped"
MISTAKES = [
    Mistake(
        "labels shifted twice", layers, "next_token_loss",
        "pad(labels, (0, 1), value=-1)[:, 1:]",
        "pad(labels, (0, 2), value=-1)[:, 2:]",
        loss_on_a_repeated_page, "tests/evaluation/test_loss.py::test_loss_equals_independent_scorer",
    ),
    Mistake(
        "overlapping windows, split at random", texts, "split_book",
        'for split, start, end in [*pieces, ("train", position, len(text))]:',
        'for split, start, end in [(random.Random(at).choices(("train", "validation"), (4, 1))[0], at, at + 1000) '
        "for at in range(0, len(text) - 1000, 250)]:",
        loss_of_new_pages, "tests/data/test_text.py::test_every_character_stands_in_exactly_one_segment", tolerance=0.4,
    ),
    Mistake(
        "the last tenth as validation", texts, "choose_validation_spans",
        "return [(int(start), int(start + length)) for start in starts]",
        "return [(int(n_chars - size), n_chars)]",
        loss_of_the_whole_book,
        "tests/data/test_text.py::test_validation_of_the_sample_book_stands_for_the_whole_book", tolerance=0.1,
    ),
    Mistake(
        "an end-of-text token after every line", tokens.TokenWriter, "encode", GROUPS,
        "groups = (encode_text(self.tokenizer, [line]) + [self.tokenizer.eos_token_id] "
        "for line in segment.text.splitlines(keepends=True))",
        validation_loss, "tests/data/test_blocks.py::test_end_of_text_stands_exactly_between_books",
    ),
    Mistake(
        "a padding token learned", tokens.TokenWriter, "encode", GROUPS,
        "groups = (ids + -len(ids) % 64 * [self.tokenizer.eos_token_id] "
        'for ids in self.tokenizer(segment.text.split("\\n\\n"))["input_ids"])',
        validation_loss, "tests/data/test_blocks.py::test_end_of_text_stands_exactly_between_books",
    ),
    Mistake(
        "mean of batch means", finetune_generative, "evaluate",
        "result = summarize_loss(sum(losses), len(losses) * (data.block_size - 1), data.bytes_per_token)",
        "batches = [losses[i : i + setup.eval_batch_size] for i in range(0, len(losses), setup.eval_batch_size)]; "
        "means = [sum(batch) / len(batch) for batch in batches]; "
        "result = summarize_loss(sum(means), len(means) * (data.block_size - 1), data.bytes_per_token)",
        validation_loss, "tests/evaluation/test_loss.py::test_reported_figures_of_a_run_are_the_scorers",
    ),
    Mistake(
        "model.eval() forgotten", loss, "score_blocks",
        "model.eval()  # no dropout, so no random number is drawn", "pass",
        validation_loss, "tests/evaluation/test_loss.py::test_scoring_leaves_mode_and_random_state",
    ),
    Mistake(
        "the last micro-batch logged", finetune_generative, "train",
        "mean_loss += forward_backward(model, input_ids, count / n_blocks)",
        "mean_loss = forward_backward(model, input_ids, count / n_blocks) * n_blocks / count",
        loss_of_a_step, "tests/test_finetune_generative.py::test_logged_loss_is_the_mean_over_the_update",
    ),
    Mistake(
        "accumulation not weighted", finetune_generative, "train",
        "forward_backward(model, input_ids, count / n_blocks)",
        "forward_backward(model, input_ids, 1 / len(step_batches))",
        loss_of_a_step, "tests/test_finetune_generative.py::test_uneven_last_batch_is_weighted_by_its_blocks",
    ),
    Mistake(
        "weights kept in bf16", loading, "load_model",
        "folder, config=config, dtype=torch.float32,", "folder, config=config, dtype=torch.bfloat16,",
        moved_weights, "tests/test_finetune_generative.py::test_output_opens_with_transformers_alone", tolerance=5,
    ),
    Mistake(
        "decay on norms and biases", optim, "decay_groups",
        '{"params": vectors, "weight_decay": 0.0}', '{"params": vectors, "weight_decay": weight_decay}',
        gain_of_norms, "tests/training/test_optim.py::test_decay_pulls_matrices_alone",
    ),
    Mistake(
        "resumed without the optimizer", finetune_generative, "resume_run",
        'checkpoints.restore_optimizer(model, optimizer, checkpoint / "optimizer.safetensors")', "pass",
        loss_after_resuming, STRAIGHT, tolerance=0,
    ),
    Mistake(
        "resumed without the RNG state", finetune_generative, "resume_run",
        'restore_random_state(checkpoint / "rng_state.safetensors", setup.device)', "pass",
        loss_after_resuming, STRAIGHT, tolerance=0,
    ),
    Mistake(
        "resumed with the first batches again", finetune_generative, "train",
        "setup.order.batches(state.step, setup.max_steps)", "setup.order.batches(0, setup.max_steps)",
        loss_after_resuming, STRAIGHT, tolerance=0,
    ),
    Mistake(
        "greedy decoding called sampling", generation.TokenChooser, "__init__",
        "is_random = decoding.do_sample and decoding.temperature > 0", "is_random = False",
        different_samples, "tests/test_generate_text.py::test_a_sample_depends_on_its_seed_alone",
    ),
    Mistake(
        "left padding without position ids", generation, "generate_ids",
        "attention_mask=pad(",
        "position_ids=torch.arange(max(map(len, windows))).expand(len(windows), -1).to(model.device), "
        "attention_mask=pad(",
        tokens_beside_a_longer_prompt, "tests/test_generate_text.py::test_batched_greedy_equals_single",
    ),
    Mistake(
        "perplexities of two tokenizers compared", loss, "summarize_loss",
        "loss / (math.log(2) * bytes_per_token)", "loss / math.log(2)",
        gap_between_tokenizers, "tests/evaluation/test_loss.py::test_perplexity_and_bits_per_byte", tolerance=0.05,
    ),
    Mistake(
        "the verdict by Delta alone", style, "weakest",
        'return min(shares.values(), key=lambda share: share["value"], default=None)', 'return shares["words"]',
        verdict_on_shuffled_words, "tests/evaluation/test_verdict.py::test_the_weakest_part_decides",
    ),
]  # fmt: skip


def measure(lab: Lab, mistakes: list[Mistake]) -> Iterator[tuple[Mistake, dict]]:
    """Yield each mistake with its figures, reported and true: with the right line, then with the wrong one."""
    right = functools.cache(lambda experiment: experiment(lab))  # several mistakes share an experiment
    for mistake in mistakes:
        figures = {"right": right(mistake.experiment)}
        with mistake.planted():
            figures["wrong"] = mistake.experiment(lab)
        yield mistake, {form: [float(figure) for figure in both] for form, both in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="mistakes whose titles hold one of these words; all if none is given")
    words = parser.parse_args().words
    chosen = [mistake for mistake in MISTAKES if not words or any(word in mistake.title for word in words)]
    book, control = (ROOT / f"results/data/{name}.txt" for name in ("book", "control"))
    rows = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder), ROOT / "results/base_model", book.read_text(encoding="utf-8"),
                  control.read_text(encoding="utf-8"), block_size=64, steps=12)  # fmt: skip
        for mistake, figures in measure(lab, chosen):
            quantity = inspect.getdoc(mistake.experiment)
            print(f"{mistake.title}, in {mistake.path}\n  {quantity}")
            for form, sign, line in (("right", "-", mistake.right), ("wrong", "+", mistake.wrong)):
                reported, true = figures[form]
                print(f"  {sign} {line}\n    reported {reported:.4f}, true {true:.4f}")
            print(f"  guard: {mistake.guard}\n", flush=True)
            rows[mistake.title] = {"quantity": quantity, "guard": mistake.guard, **figures}
            rows = {m.title: rows[m.title] for m in MISTAKES if m.title in rows}
            RESULTS.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")  # kept, whatever comes after
    fill_pages(render())


def render() -> dict[str, str]:
    """Return the stored figures as README and notes show them: the table of note 6, and each figure of it."""
    lines = ["", "| mistake | reported | true | with the right line: reported | true | guard |",
             "|---|---:|---:|---:|---:|---|"]  # fmt: skip
    shown = {}
    for title, row in json.loads(RESULTS.read_text(encoding="utf-8")).items():
        figures = [f"{x:.0f}" if x.is_integer() else f"{x:.3f}" for x in (*row["wrong"], *row["right"])]
        path, name = row["guard"].split("::")
        lines.append(f"| {title} | {' | '.join(figures)} | `{name}` in `{path}` |")
        ends = ("reported", "true", "right.reported", "right.true")
        shown |= {f"mistakes.{name_marker(title)}.{end}": text for end, text in zip(ends, figures, strict=True)}
    return shown | {"mistakes": "\n".join(lines) + "\n"}


if __name__ == "__main__":
    main()
