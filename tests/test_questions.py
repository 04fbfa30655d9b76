"""Each note has a command, a picture that fits code and figures, and a question whose answer is right."""

import ast
import json
import re
import statistics
import textwrap

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import mistakes, pictures, scale
from benchmarks.pages import MARKED, PAGES, ROOT
from utils.data.blocks import BatchOrder, open_blocks, save_blocks
from utils.data.text import count_words
from utils.evaluation import style, verdict
from utils.model import loading
from utils.training import parallel
from utils.training.forecast import count_activations
from utils.training.metrics import read_metrics
from utils.training.optim import build_optimizer

NOTES = [page.name for page in PAGES if re.match(r"0\d_", page.name)]
PICTURES = {
    "01_dataset_prep.md": "<!-- =split -->",
    "02_finetuning_setup.md": "<!-- =step.picture -->",
    "03_training_loop.md": "<!-- =loop.1 -->",
    "04_evaluation.md": "](verdict.png)",
    "05_scale.md": "process 0    blocks",
    "06_classic_mistakes.md": "<!-- =mistakes -->",
}
SOURCE = (ROOT / "finetune_generative.py").read_text(encoding="utf-8")


def read(name):
    return (ROOT / "notes" / name).read_text(encoding="utf-8")


def ask(number):
    """Return the question of a note and its answer, each on one line and without markers."""
    page = MARKED.sub(r"\2", read(NOTES[number - 1]))
    question, answer = page.split("\n## Question\n")[1].split("<details><summary>Answer</summary>\n")
    return " ".join(question.split()), " ".join(answer.removesuffix("\n</details>\n").split())


def find_numbers(text):
    """Return the numbers of a text, without those that a letter or a hyphen precedes."""
    return [float(number.replace(",", "")) for number in re.findall(r"(?<![\w-])\d(?:[\d,.]*\d)?", text)]


@pytest.mark.parametrize("name", NOTES)
def test_every_note_has_a_command_a_picture_and_a_question(name):
    page = read(name)
    assert re.search(r"^ {4}(python|torchrun|make) ", page, re.MULTILINE)
    assert PICTURES[name] in page
    assert re.findall(r"^#+ .+$", page, re.MULTILINE)[-1] == "## Question"
    question, answer = page.split("\n## Question\n")[1].split("\n<details><summary>Answer</summary>\n\n")
    assert question.strip()
    assert re.fullmatch(r".+\n\n</details>\n", answer, re.DOTALL)


def test_answer_1_blocks_and_tail(tmp_path):
    question, answer = ask(1)
    n_tokens, block_size = map(int, find_numbers(question))
    found = []
    for start in ([], [0]):
        save_blocks({"train": np.arange(n_tokens, dtype=np.uint16)}, block_size, tmp_path / f"{len(start)}", start)
        n_blocks = len(load_from_disk(str(tmp_path / f"{len(start)}"))["train"])
        found.append((n_blocks, n_tokens - n_blocks * (block_size - len(start))))
    (blocks, tail), (blocks_with_start, none) = found
    assert find_numbers(answer) == [blocks, tail, block_size - 1, blocks_with_start]
    assert none == 0
    assert answer.endswith("no token is left out.")


def measure_pass(model, n_blocks):
    """Return what a step of n_blocks costs, by the names of note 2's bars: operations and bytes."""
    optimizer = build_optimizer(model, 1e-3, 0.0, (0.9, 0.999), 1e-8)
    blocks = torch.zeros(n_blocks, 32, dtype=torch.long)
    kept = count_activations(model, blocks, lambda: loading.autocast(torch.device("cpu"), "fp32"))
    with FlopCounterMode(display=False) as forward:
        loss = model(input_ids=blocks, labels=blocks).loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    gradients = sum(p.grad.nbytes for p in model.parameters())
    optimizer.step()
    return {"forward": forward.get_total_flops(), "backward": backward.get_total_flops(), "activations": kept,
            "weights": sum(p.nbytes for p in model.parameters()), "gradients": gradients,
            "averages": sum(t.nbytes for state in optimizer.state.values() for t in state.values())}  # fmt: skip


def test_answer_2_a_batch_of_twice_as_many_blocks(tiny_model):
    question, answer = ask(2)
    n_blocks, steps, batch, _ = map(int, find_numbers(question.replace("--batch-size ", "")))
    assert BatchOrder(n_blocks, batch // 2, 1, 42).steps_per_epoch == steps
    assert find_numbers(answer) == [BatchOrder(n_blocks, batch, 1, 42).steps_per_epoch]
    model = loading.load_model(tiny_model, 0.0).train()
    once, twice = measure_pass(model, batch // 2), measure_pass(model, batch)
    double, same = answer.split(".")[:2]
    ratios = {name: twice[name] / once[name] for name in once}
    assert {name for name in ratios if name in double} == {name for name, x in ratios.items() if 1.9 < x < 2.1}
    assert {name for name in ratios if name in same} == {name for name, x in ratios.items() if x == 1}


def test_answer_3_evaluations_and_checkpoints(prepared, tmp_path, script):
    question, answer = ask(3)
    flags = re.search(r"`(--.+?)`", question)[1].split()
    out = tmp_path / "run"
    quick = ["--sample-tokens", 0, "--copy-samples", 0]
    ran = script("finetune_generative", "--data-dir", prepared, "--output-dir", out, *quick, *flags)
    assert ran.code == 0, ran.err
    evaluated = [row["step"] for row in read_metrics(out) if "eval/loss" in row]
    assert find_numbers(re.search(r"at steps (.+?):", answer)[1]) == evaluated
    assert set(re.findall(r"`(checkpoint-\d+)`", answer)) == {path.name for path in out.glob("checkpoint-*")}


def test_answer_4_the_weakest_part():
    question, answer = ask(4)
    values = find_numbers(question)
    mean = statistics.mean(values)

    def judge(values):
        shares = zip(style.PARTS, values, strict=True)
        shares = {part: {"value": value, "low": value, "high": min(1.0, value + 0.25)} for part, value in shares}
        return verdict.describe_gap(shares, [], 0.1, 0.1, "a reader")

    sentence, writes = judge(values)
    assert sentence.startswith(re.search(r'"(.+?)"', answer)[1])
    assert f"({min(values):.2f} [" in sentence
    assert writes is False
    assert find_numbers(answer) == [min(values), round(mean, 2), verdict.SUPPORTS]
    assert judge([mean] * 3)[1] is True


def test_answer_5_twice_as_many_processes():
    _, answer = ask(5)
    small = scale.estimate(scale.PLANS[0])
    large = scale.estimate(scale.PLANS[0]._replace(n_gpus=16, network=scale.INFINIBAND))
    seconds = [of["traffic"] + of["computation"] for of in (large, small)]
    assert find_numbers(answer) == [
        16, small["weights"] / 1e9, large["weights"] / 1e9, (small["weights"] - large["weights"]) / 1e9,
        0, large["tokens_per_step"], *(round(x["received"] / 1e9, 1) for x in (small, large)),
        round(small["traffic"], 2), round(large["traffic"], 1),
        *(round(x, 1) for x in seconds), *(round(x["epoch"] / 60, 1) for x in (large, small)),
    ]  # fmt: skip
    stay = {name for name, value in small.items() if large[name] == value}
    assert stay == {"group", "activations", "all_activations", "weights_bf16", "computation", "checkpoint"}


def test_answer_6_what_the_wrong_weights_report():
    stored, page = json.loads(mistakes.RESULTS.read_text(encoding="utf-8")), read("06_classic_mistakes.md")
    question, answer = ask(6)
    assert tuple(find_numbers(question)) == pictures.BATCHES
    assert find_numbers(answer)[0] == round(stored["the last micro-batch logged"]["wrong"][0], 3)
    told = float(re.search(r"/ 2 = ([\d.]+)\.", answer)[1])
    assert told == pytest.approx(stored["accumulation not weighted"]["wrong"][0], abs=6e-4)
    assert "batches of {} and {} blocks".format(*pictures.BATCHES) in page


def test_the_strip_is_the_split_of_prepare_data(book, prepared):
    text, manifest = book.read_text(encoding="utf-8"), open_blocks(prepared).manifest
    expected = [(span["split"], count_words(text[slice(*span["chars"])])) for span in manifest["spans"]]
    spans = pictures.split_words(book)
    assert [(split, end - start) for split, start, end in spans] == expected
    strip = pictures.draw_strip([("train", 0, 500), ("validation", 500, 700), ("train", 700, 1000)])
    assert strip == "░" * 50 + "█" * 20 + "░" * 30


def test_the_parts_of_the_loop_are_the_loop():
    loop = next(n for n in ast.walk(pictures.find_function(SOURCE, "train")) if isinstance(n, ast.While))
    parts = pictures.cut_loop(SOURCE)
    whole = "\n".join(SOURCE.splitlines()[loop.lineno - 1 : loop.end_lineno])
    assert "\n".join(parts[f"{n}"] for n in range(1, 8)) == textwrap.dedent(whole)
    named = {number: re.search(rf"# {number} (\w+)", part)[1] for number, part in parts.items()}
    section = MARKED.sub("", read("03_training_loop.md").split("\n## ")[0])
    described = re.findall(r"^(\d)\. [^*]*\*\*(\w+)", section, re.MULTILINE)
    assert {number: word.lower() for number, word in described} == named
    changed = pictures.cut_loop(SOURCE.replace("if last:  # 3", "if last or due:  # 3"))
    assert {number for number in parts if parts[number] != changed[number]} == {"3"}


def test_the_verdicts_are_drawn_from_the_ladder():
    present = pictures.read_ladder()
    assert pictures.read_drawn() == {"first": pictures.FIRST_VERDICT, "present": present}
    least = [min(shares[part]["value"] for part in style.PARTS) for shares in present.values()]
    assert least == sorted(least)  # the note says that the order is reversed
    assert list(pictures.FIRST_VERDICT.values()) == sorted(pictures.FIRST_VERDICT.values(), reverse=True)
    assert pictures.PICTURE.stat().st_size < 60_000


def test_the_step_is_shown_with_bars_of_its_figures():
    figures = {"blocks": 2, "block_size": 50, "dtype": "fp32", "weights": 1_000_000,
               "seconds": {"forward": 0.1, "backward": 0.3},
               "bytes": {"weights": 4e6, "weights in bf16": 0, "activations": 2e6}}  # fmt: skip
    lines = pictures.show_step(figures)["picture"].splitlines()
    assert [(line.count("█"), line.split("█")[0].strip()) for line in lines if "█" in line] == [
        (17, "forward          25 %"), (50, "backward         75 %"),
        (50, "weights            4 MB, 4 bytes per weight"), (25, "activations        2 MB, 20 kB per token"),
    ]  # fmt: skip


def test_the_diagram_of_a_step_is_that_of_the_processes(monkeypatch):
    monkeypatch.setattr(parallel, "size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        cells = []
        for part, count in parallel.split_passes(torch.tensor(parallel.share(list(range(8)))), 8, 2):
            blocks = " ".join(map(str, part.tolist()))
            cells.append(f"block{'s' * (count > 1)} {blocks}" if count else f"(block {blocks}, weight 0)")
        assert f"\nprocess {rank}    {cells[0]:13}{cells[1]}\n" in read("05_scale.md")


def test_a_measured_step_has_sixteen_bytes_per_weight(monkeypatch):
    monkeypatch.setattr(pictures, "WARM_UP", 0)
    monkeypatch.setattr(pictures, "REPEATS", 1)
    figures = pictures.measure_step()
    sizes = figures["bytes"]
    assert sizes["weights"] + sizes["gradients"] + sizes["two averages"] == 16 * figures["weights"]
    assert set(figures["seconds"]) == {"forward", "backward", "clipping", "AdamW"}
    assert sizes["activations"] > 0
