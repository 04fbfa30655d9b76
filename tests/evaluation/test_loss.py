"""The reported loss against a scorer that shares no code with the project; how often intervals of the gain hold."""

import functools
import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import t
from scorer import independent_loss

from utils.data.blocks import open_blocks
from utils.evaluation import loss
from utils.evaluation.bootstrap import resample
from utils.evaluation.loss import blocks_per_pass, measure_gain, score_blocks, summarize_loss
from utils.model.loading import autocast, load_model

CPU = torch.device("cpu")


def fp32():
    return autocast(CPU, "fp32")


@pytest.fixture(scope="module")
def scored(tiny_model, prepared):
    model, data = load_model(tiny_model), open_blocks(prepared)
    return model, data.validation[:]["input_ids"], data


def test_loss_equals_independent_scorer(scored):
    model, rows, data = scored
    loss_sums, n_targets = score_blocks(model, data.validation, 4, fp32)
    assert n_targets == rows[:, 1:].numel()
    assert sum(loss_sums) / n_targets == pytest.approx(independent_loss(model, rows), abs=1e-5)
    assert len(loss_sums) == len(rows) > 4
    for loss_sum, row in zip(loss_sums, rows.split(1), strict=True):
        assert loss_sum / row[:, 1:].numel() == pytest.approx(independent_loss(model, row), abs=1e-5)


def test_double_shifted_labels_give_another_loss(scored):
    """The ancestor's mistake: targets shifted in the data, then again inside the model."""
    model, rows, _ = scored
    true = independent_loss(model, rows)
    shifted = model(input_ids=rows[:, :-1], labels=rows[:, 1:]).loss.item()
    assert abs(shifted - true) > 1e-3


def test_batch_size_does_not_change_the_loss(scored):
    model, _, data = scored
    one, many = score_blocks(model, data.validation, 1, fp32), score_blocks(model, data.validation, 64, fp32)
    assert one[1] == many[1]
    assert one[0] == pytest.approx(many[0], rel=1e-4)
    assert sum(one[0]) == pytest.approx(sum(many[0]), rel=1e-6)


def test_scoring_leaves_mode_and_random_state(scored):
    model, _, data = scored
    model.train()
    before = torch.get_rng_state()
    score_blocks(model, data.validation, 4, fp32)
    assert model.training
    assert torch.equal(before, torch.get_rng_state())
    model.eval()


def test_blocks_are_scored_by_batches_of_1024_tokens():
    assert [blocks_per_pass(size) for size in (32, 128, 300, 1024, 4096)] == [32, 8, 3, 1, 1]


@pytest.mark.parametrize("count", [8, 12, 27])
def test_intervals_of_the_gain_hold_the_true_gain(count, monkeypatch):
    """Blocks whose gains are skewed; without the widening for few blocks, intervals hold it too rarely."""
    monkeypatch.setattr(loss, "resample", functools.partial(resample, rounds=400))
    rng, n_books, held, held_plain = np.random.default_rng(count), 600, 0, 0
    for seed in range(n_books):
        gains = rng.gamma(2, 0.5, count)  # bits per block, 1 on average
        finetuned = rng.normal(20, 2, count)
        nats = {"base": (finetuned + gains) * math.log(2), "finetuned": finetuned * math.log(2), "bytes": 1}
        found = measure_gain({"book": nats}, seed)["book_gain"]
        assert found["value"] == pytest.approx(gains.mean())
        held += found["low"] <= 1 <= found["high"]
        low, high = np.percentile(resample(count, seed, rounds=400) @ gains / count, [2.5, 97.5])
        held_plain += low <= 1 <= high
    assert held >= 0.92 * n_books
    assert held_plain < held
    assert count == 27 or held_plain < 0.92 * n_books


def test_style_gain_and_forgetting_are_centred_on_their_values():
    """Each text's draws spread by its own number of blocks; the difference has the variance of both."""
    rng, few, many = np.random.default_rng(0), 8, 40
    book = {"base": rng.normal(50, 3, few), "finetuned": rng.normal(40, 3, few), "bytes": 9.0}
    control = {"base": rng.normal(30, 1, many), "finetuned": rng.normal(33, 1, many), "bytes": 7.0}
    gains = measure_gain({"book": book, "control": control}, seed=3)
    per_block = {}
    for name, text in (("book", book), ("control", control)):
        per_block[name] = (text["base"] - text["finetuned"]) / text["bytes"] / math.log(2)
        width = 2 * t.ppf(0.975, len(per_block[name]) - 1) * per_block[name].std(ddof=1) / len(per_block[name]) ** 0.5
        assert gains[f"{name}_gain"]["high"] - gains[f"{name}_gain"]["low"] == pytest.approx(width, rel=0.1)
    style = gains["style_gain"]
    assert style["value"] == pytest.approx(per_block["book"].mean() - per_block["control"].mean())
    assert (style["low"] + style["high"]) / 2 == pytest.approx(style["value"], abs=0.1)
    widths = [gains[name]["high"] - gains[name]["low"] for name in ("book_gain", "control_gain")]
    assert style["high"] - style["low"] == pytest.approx(math.hypot(*widths), rel=0.1)
    percent = 100 * (control["finetuned"].sum() / control["base"].sum() - 1)
    assert gains["forgetting"]["value"] == pytest.approx(percent)
    assert gains["forgetting"]["low"] < percent < gains["forgetting"]["high"]


def test_perplexity_and_bits_per_byte():
    diverged = summarize_loss(loss_sum=600.0, n_targets=10, bytes_per_token=4.0)
    assert diverged["eval/perplexity"] < 2**63  # read_state takes no larger number
    summary = summarize_loss(loss_sum=20.0, n_targets=10, bytes_per_token=4.0)
    assert summary["eval/loss"] == 2.0
    assert summary["eval/perplexity"] == pytest.approx(7.389056, abs=1e-6)
    assert summary["eval/bits_per_byte"] == pytest.approx(2.0 / 0.6931471806 / 4.0)


def test_reported_figures_of_a_run_are_the_scorers(scored, prepared, script, tmp_path):
    """all_results.json, the model on disk and generate_text.py agree with the outside scorer."""
    out = tmp_path / "run"
    ran = script(
        "finetune_generative", "--data-dir", prepared, "--output-dir", out, "--max-steps", 8, "--dtype", "fp32",
        "--learning-rate", "1e-3", "--sample-tokens", 0, "--copy-samples", 0,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    results = json.loads((out / "all_results.json").read_text())
    base, rows, _ = scored
    assert results["base_eval_loss"] == pytest.approx(independent_loss(base, rows), abs=1e-5)
    assert results["eval_loss"] == pytest.approx(independent_loss(load_model(out), rows), abs=1e-5)
    control = tmp_path / "control.txt"
    control.write_text("General text is another's. " * 60)
    flags = ["--max-new-tokens", 4, "--num-validation-prompts", 0, "--control-path", control]
    compared = script("generate_text", "--finetuned-model", out, *flags)
    assert compared.code == 0, compared.err
    assert f"{results['base_eval_loss']:.4f}" in compared.out
    assert f"{results['eval_loss']:.4f}" in compared.out
