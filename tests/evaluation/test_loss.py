"""The reported loss against a scorer that shares no code with the project."""

import json

import pytest
import torch
from scorer import independent_loss

from utils.data.blocks import open_blocks
from utils.evaluation.loss import score_blocks, summarize_loss
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
    passes = rows.split(4)
    assert len(loss_sums) == len(passes) > 1
    for loss_sum, part in zip(loss_sums, passes, strict=True):
        assert loss_sum / part[:, 1:].numel() == pytest.approx(independent_loss(model, part), abs=1e-5)


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
    assert (len(one[0]), len(many[0])) == (len(data.validation), -(-len(data.validation) // 64))
    assert sum(one[0]) == pytest.approx(sum(many[0]), rel=1e-6)


def test_scoring_leaves_mode_and_random_state(scored):
    model, _, data = scored
    model.train()
    before = torch.get_rng_state()
    score_blocks(model, data.validation, 4, fp32)
    assert model.training
    assert torch.equal(before, torch.get_rng_state())
    model.eval()


def test_perplexity_and_bits_per_byte():
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
