"""Batches, seeds, and the comparison as a command."""

import json

import pytest
import torch

from utils.generation import Decoding, SeededSampling, encode_prompt, generate_ids
from utils.model import autocast, load_pair


def fp32():
    return autocast(torch.device("cpu"), "fp32")


@pytest.fixture(scope="module")
def pair(tiny_model):
    return load_pair(tiny_model)


@pytest.fixture
def prompts(pair):
    texts = ["Day 12. Hal went to", "", "Ada", "It was 3 steps away.\n\nDay 5. Ines went to the old quay and"]
    return [encode_prompt(pair[1], text) for text in texts]


def test_batched_greedy_equals_single(pair, prompts):
    model, tokenizer = pair
    greedy = Decoding(max_new_tokens=20, do_sample=False)
    batch = generate_ids(model, tokenizer.eos_token_id, prompts, [0] * 4, greedy, fp32)
    single = [generate_ids(model, tokenizer.eos_token_id, [ids], [0], greedy, fp32)[0] for ids in prompts]
    assert batch == single
    assert len(set(map(tuple, batch))) == len(batch)


def test_greedy_equals_transformers_generate(pair, prompts):
    model, tokenizer = pair
    greedy = Decoding(max_new_tokens=20, do_sample=False)
    for ids in prompts:
        expected = model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=20, do_sample=False
        )
        new = expected[0, len(ids) :].tolist()
        new = new[: new.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in new else new
        assert generate_ids(model, tokenizer.eos_token_id, [ids], [0], greedy, fp32) == [new]


def test_a_sample_depends_on_its_seed_alone(pair, prompts):
    model, tokenizer = pair
    decoding = Decoding(max_new_tokens=12, temperature=1.0)
    batch = generate_ids(model, tokenizer.eos_token_id, prompts, [5, 6, 7, 8], decoding, fp32)
    alone = generate_ids(model, tokenizer.eos_token_id, prompts[2:3], [7], decoding, fp32)
    other = generate_ids(model, tokenizer.eos_token_id, prompts[2:3], [9], decoding, fp32)
    assert batch[2] == alone[0] != other[0]


def test_sampling_leaves_the_global_generator_alone(pair, prompts):
    model, tokenizer = pair
    before = torch.get_rng_state()
    generate_ids(model, tokenizer.eos_token_id, prompts, [1, 2, 3, 4], Decoding(max_new_tokens=5), fp32)
    assert torch.equal(before, torch.get_rng_state())


def test_draws_follow_the_softmax():
    """4,000 draws from known probabilities, within four standard errors."""
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    n = 4000
    scores = probabilities.log().expand(n, 4)
    drawn = SeededSampling(list(range(n)))(None, scores).argmax(-1)
    shares = torch.bincount(drawn, minlength=4) / n
    errors = (probabilities * (1 - probabilities) / n).sqrt()
    assert ((shares - probabilities).abs() < 4 * errors).all(), shares


def test_top_k_one_is_greedy(pair, prompts):
    model, _ = pair
    greedy = generate_ids(model, 0, prompts, [0] * 4, Decoding(max_new_tokens=8, do_sample=False), fp32)
    assert generate_ids(model, 0, prompts, [3] * 4, Decoding(max_new_tokens=8, top_k=1), fp32) == greedy
    assert generate_ids(model, 0, prompts, [3] * 4, Decoding(max_new_tokens=8, temperature=0), fp32) == greedy


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory, prepared, script_once):
    """A fine-tuned folder of a few steps."""
    out = tmp_path_factory.mktemp("run") / "out"
    flags = ["--max-steps", 6, "--learning-rate", "1e-2", "--sample-tokens", 0, "--dtype", "fp32"]
    script_once("finetune_generative", "--data-dir", prepared, "--output-dir", out, *flags)
    return out


def test_samples_are_paired_and_complete(finetuned, script):
    flags = ["--max-new-tokens", 6, "--num-samples", 3, "--seed", 7]
    ran = script("generate_text", "--finetuned-model", finetuned, *flags)
    assert ran.code == 0, ran.err
    rows = [json.loads(line) for line in (finetuned / "samples.jsonl").read_text().splitlines()]
    keys = {"prompt", "model", "sample_index", "seed", "prompt_ids", "generated_ids", "text"}
    assert all(set(row) == keys for row in rows)
    assert len(rows) == 2 * 3 * 5  # models x samples x (three prompts and two openings)
    luck = {
        name: [(row["prompt"], row["sample_index"], row["seed"]) for row in rows if row["model"] == name]
        for name in ("base", "finetuned")
    }
    assert luck["base"] == luck["finetuned"]
    assert len({seed for _, _, seed in luck["base"]}) == 15
    page = (finetuned / "comparison.md").read_text()
    assert page.count("the author really wrote") == 2
    assert "| max_new_tokens | 6 |" in page
    first = (finetuned / "samples.jsonl").read_text()
    script("generate_text", "--finetuned-model", finetuned, *flags, "--batch-size", 2)
    assert (finetuned / "samples.jsonl").read_text() == first


def test_prompts_from_flags_and_file(finetuned, script, tmp_path):
    (tmp_path / "prompts.txt").write_text("Day 1.\n\nJory went\n")
    twice = ["--prompt", "Ada ", "--prompt", "Ada "]  # asked once
    ran = script("generate_text", "--finetuned-model", finetuned, *twice, "--prompts-file", tmp_path / "prompts.txt",
                 "--max-new-tokens", 4)  # fmt: skip
    assert ran.code == 0
    assert "prompt 'Ada ' ends in a space" in ran.err
    rows = [json.loads(line) for line in (finetuned / "samples.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows if row["model"] == "base"] == ["Ada ", "Day 1.", "Jory went"]


def test_authors_continuation_is_the_books(finetuned, script, book):
    script("generate_text", "--finetuned-model", finetuned, "--max-new-tokens", 6)
    rows = [json.loads(line) for line in (finetuned / "samples.jsonl").read_text().splitlines()]
    page = (finetuned / "comparison.md").read_text()
    openings = [row["prompt"] for row in rows if row["model"] == "base"][3:]
    text = book.read_text()
    assert len(openings) == 2
    for opening in openings:
        after = text[text.index(opening) + len(opening) :]
        author = page.split("**the author really wrote**")[1 + openings.index(opening)].split("##")[0]
        written = author.replace(">", "").replace("\\", "").split()
        assert written == after.split()[: len(written)] or " ".join(written) in " ".join(after.split())[:80]


def test_without_held_out_text_the_samples_still_come(finetuned, script, tmp_path, tiny_model):
    import shutil

    alone = tmp_path / "alone"
    shutil.copytree(finetuned, alone, ignore=shutil.ignore_patterns("run_config.json"))
    ran = script("generate_text", "--finetuned-model", alone, "--base-model", tiny_model, "--max-new-tokens", 4)
    assert ran.code == 0, ran.err
    assert "samples only" in ran.err
    assert "held-out loss" not in ran.out


def test_narrow_terminal_puts_texts_below_each_other(finetuned, script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    ran = script("generate_text", "--finetuned-model", finetuned, "--max-new-tokens", 4)
    assert "[fine-tuned model]" in ran.out
    assert max(map(len, ran.out.split("=====\n", 1)[1].split("written:")[0].splitlines())) <= 40
