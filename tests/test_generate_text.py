"""Batches, seeds, and the comparison as a command."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import copy_run, make_book
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from utils.data.blocks import open_blocks
from utils.evaluation import stylometry
from utils.evaluation.generation import Decoding, SeededSampling, encode_prompt, generate_ids
from utils.evaluation.longtext import find_sentence_end
from utils.evaluation.render import quote
from utils.model.loading import autocast, load_pair
from utils.storage import read_json

ROOT = Path(__file__).parent.parent


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
    drawn = SeededSampling(list(range(n)), Decoding(top_p=1.0))(None, scores).argmax(-1)
    shares = torch.bincount(drawn, minlength=4) / n
    errors = (probabilities * (1 - probabilities) / n).sqrt()
    assert ((shares - probabilities).abs() < 4 * errors).all(), shares


@pytest.mark.parametrize(
    "options",
    [{"top_p": 0.9}, {"top_p": 0.3}, {"top_p": 0.01}, {"top_p": 1.0, "top_k": 3},
     {"top_p": 0.7, "top_k": 6, "temperature": 0.6}, {"top_p": 0.95, "temperature": 1.7}],
)  # fmt: skip
def test_draws_follow_transformers_top_k_and_top_p(options):
    """5,000 draws against the probabilities that transformers' own processors leave."""
    decoding = Decoding(**options)
    torch.manual_seed(4)
    scores, n = torch.randn(1, 12) * 1.5, 5000
    expected = TemperatureLogitsWarper(decoding.temperature)(None, scores)
    if decoding.top_k:
        expected = TopKLogitsWarper(decoding.top_k)(None, expected)
    probabilities = TopPLogitsWarper(decoding.top_p)(None, expected).softmax(-1)[0]
    drawn = SeededSampling(list(range(n)), decoding)(None, scores.expand(n, 12)).argmax(-1)
    shares = torch.bincount(drawn, minlength=12) / n
    errors = (probabilities * (1 - probabilities) / n).sqrt()
    assert ((shares - probabilities).abs() <= 4.5 * errors).all(), (shares, probabilities)


def test_a_diverged_models_scores_come_to_an_end():
    scores = torch.full((3, 8), torch.nan)
    assert SeededSampling([1, 2, 3], Decoding())(None, scores).shape == (3, 8)


def test_what_is_forbidden_is_never_drawn():
    scores = torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf]]).expand(500, 4)
    drawn = SeededSampling(list(range(500)), Decoding(top_p=1.0))(None, scores).argmax(-1)
    assert set(drawn.tolist()) == {0, 2}


def test_top_k_one_is_greedy(pair, prompts):
    model, _ = pair
    greedy = generate_ids(model, 0, prompts, [0] * 4, Decoding(max_new_tokens=8, do_sample=False), fp32)
    assert generate_ids(model, 0, prompts, [3] * 4, Decoding(max_new_tokens=8, top_k=1), fp32) == greedy
    assert generate_ids(model, 0, prompts, [3] * 4, Decoding(max_new_tokens=8, temperature=0), fp32) == greedy


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory, prepared, script_once):
    """A fine-tuned folder of a few steps."""
    out = tmp_path_factory.mktemp("run") / "out"
    flags = ["--max-steps", 6, "--learning-rate", "1e-2", "--sample-tokens", 0, "--copy-samples", 0, "--dtype", "fp32"]
    script_once("finetune_generative", "--data-dir", prepared, "--output-dir", out, *flags)
    return out


# Not measured, which is quicker. A measured report would stay, so tests that measure do it in a copy of the folder.
QUICK = ["--num-validation-prompts", 2, "--no-measure"]


def read_samples(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").open(encoding="utf-8")]  # U+0085 ends no line


def test_samples_are_paired_and_complete(finetuned, script):
    # In bf16 a row's rounding may depend on the rows beside it.
    flags = ["--max-new-tokens", 6, "--num-samples", 3, "--seed", 7, "--dtype", "fp32", *QUICK]
    ran = script("generate_text", "--finetuned-model", finetuned, *flags)
    assert ran.code == 0, ran.err
    rows = read_samples(finetuned)
    keys = {"prompt", "model", "sample_index", "seed", "prompt_ids", "generated_ids", "text"}
    assert all(set(row) == keys for row in rows)
    assert len(rows) == 2 * 3 * 4  # models x samples x (two prompts and two validation prompts)
    seeds = {
        name: [(row["prompt"], row["sample_index"], row["seed"]) for row in rows if row["model"] == name]
        for name in ("base", "finetuned")
    }
    assert seeds["base"] == seeds["finetuned"]
    assert len({seed for _, _, seed in seeds["base"]}) == 12
    page = (finetuned / "report.md").read_text()
    assert page.count("**author (reference)**") == 2
    assert page.count("**base model**") == page.count("**fine-tuned model**") == 12
    assert "| max_new_tokens | 6 |" in page
    first = (finetuned / "samples.jsonl").read_bytes()
    report = read_json(finetuned / "report.json")
    assert report["n_samples"] == 24
    assert report["settings"]["samples_sha256"] == hashlib.sha256(first).hexdigest()
    script("generate_text", "--finetuned-model", finetuned, *flags, "--batch-size", 2)
    assert (finetuned / "samples.jsonl").read_bytes() == first


OWN = [word for number in range(10) for word in ("--prompt", f"Day {number}")]


@pytest.mark.parametrize("prompts", [["--num-validation-prompts", 8], [*OWN, "--num-validation-prompts", 0]])
def test_rounds_are_drawn_until_there_is_enough_to_measure(finetuned, script, tmp_path, monkeypatch, prompts):
    monkeypatch.setattr(stylometry, "MIN_WORDS", 120)
    (tmp_path / "control.txt").write_text("General text is another's. " * 60)
    flags = ["--max-new-tokens", 6, "--control-path", tmp_path / "control.txt", *prompts]
    run = copy_run(finetuned, tmp_path / "run")
    ran = script("generate_text", "--finetuned-model", run, *flags)
    assert ran.code == 0, ran.err
    rows, n_words = read_samples(run), {}
    for row in rows:
        key = row["model"], row["sample_index"]
        n_words[key] = n_words.get(key, 0) + len(stylometry.split_words(row["text"]))
    rounds = 1 + max(index for _, index in n_words)
    assert len(rows) == 2 * rounds * 10
    assert len({row["seed"] for row in rows}) == rounds * 10
    written = {name: [n_words[name, index] for index in range(rounds)] for name in ("base", "finetuned")}
    assert min(sum(words[:-1]) for words in written.values()) < 120 <= min(map(sum, written.values()))
    assert rounds > 1
    counted = read_json(run / "report.json")["counts"]["words"]
    assert all(counted[name] >= 120 for name in written)


def test_no_rounds_are_drawn_for_prompts_too_few_to_measure(finetuned, script, tmp_path):
    run = copy_run(finetuned, tmp_path / "run")
    ran = script("generate_text", "--finetuned-model", run, "--max-new-tokens", 6, "--num-validation-prompts", 7)
    assert ran.code == 0, ran.err
    assert len(read_samples(run)) == 2 * 9


@pytest.mark.parametrize("greedy", [["--no-do-sample"], ["--temperature", 0]])
def test_greedy_decoding_draws_one_round_and_each_text_counts_once(finetuned, script, tmp_path, greedy):
    """Every further round would have the same texts: 40 samples, 2 of them different, were measured as 40."""
    flags = ["--max-new-tokens", 6, "--num-validation-prompts", 2, "--num-samples", 3, *greedy]
    run = copy_run(finetuned, tmp_path / "run")
    ran = script("generate_text", "--finetuned-model", run, *flags)
    assert ran.code == 0, ran.err
    rows = read_samples(run)
    assert {row["sample_index"] for row in rows} == {0}
    counts = read_json(run / "report.json")["counts"]
    texts = {row["text"] for row in rows if row["model"] == "finetuned" and row["text"].strip()}
    assert counts["texts"]["finetuned"] == len(texts)


def test_prompts_from_flags_and_file(finetuned, script, tmp_path):
    (tmp_path / "prompts.txt").write_text("Day 1.\n\nJory went\n")
    twice = ["--prompt", "Ada ", "--prompt", "Ada "]  # asked once
    ran = script("generate_text", "--finetuned-model", finetuned, *twice, "--prompts-file", tmp_path / "prompts.txt",
                 "--max-new-tokens", 4, *QUICK)  # fmt: skip
    assert ran.code == 0
    assert "prompt 'Ada ' ends in a space" in ran.err
    texts = read_json(finetuned / "report.json")["texts"]
    asked = [row["prompt"] for row in read_samples(finetuned) if row["model"] == "base"]
    assert asked == [row["prompt"] for row in texts]
    assert asked[:3] == ["Ada ", "Day 1.", "Jory went"]
    assert [row["has_reference"] for row in texts] == [False] * 3 + [True] * 2


def test_authors_continuation_is_the_books(finetuned, script, book):
    assert script("generate_text", "--finetuned-model", finetuned, "--max-new-tokens", 6, *QUICK).code == 0
    validation_prompts = [row for row in read_json(finetuned / "report.json")["texts"] if row["has_reference"]]
    text, page = book.read_text(), (finetuned / "report.md").read_text()
    assert len(validation_prompts) == 2
    for validation_prompt in validation_prompts:
        [pieces] = validation_prompt["columns"]["reference"]
        written = "".join(piece["text"] for piece in pieces)
        assert validation_prompt["prompt"] + written in text
        assert written.strip()
        assert f"**author (reference)**\n\n{quote(written)}\n" in page


LONG = ["--prompt", "Ada went", "--max-new-tokens", 150, "--dtype", "fp32", "--seed", 3]  # beyond the 64 positions


def test_a_sample_ends_before_a_string(finetuned, script):
    """In ids and text, and everything before it is as without the flag."""
    flags = ["--finetuned-model", finetuned, *LONG, "--num-validation-prompts", 0, "--no-measure"]
    assert script("generate_text", *flags).code == 0
    free = {row["model"]: row for row in read_samples(finetuned)}
    string = free["finetuned"]["text"][200:203]
    assert script("generate_text", *flags, "--stop", "never written", "--stop", string).code == 0
    tokenizer = load_pair(finetuned)[1]
    for row in read_samples(finetuned):
        whole = free[row["model"]]["text"]
        assert row["text"] == tokenizer.decode(row["generated_ids"]) == whole[: (whole + string).index(string)]
    assert read_json(finetuned / "report.json")["settings"]["stop"] == ["never written", string]


def test_a_text_in_a_file_is_the_samples(finetuned, script, tmp_path):
    """The same seed writes the same text, up to its last sentence, without the base model and without a report."""
    flags = [*LONG, "--num-validation-prompts", 0, "--no-measure"]
    assert script("generate_text", "--finetuned-model", finetuned, *flags).code == 0
    text = next(row["text"] for row in read_samples(finetuned) if row["model"] == "finetuned")
    before = (finetuned / "report.json").read_bytes()
    ran = script("generate_text", "--finetuned-model", finetuned, *LONG, "--to-file", tmp_path / "chapter.txt",
                 "--base-model", tmp_path / "nowhere")  # fmt: skip
    assert ran.code == 0, ran.err
    written = (tmp_path / "chapter.txt").read_text(encoding="utf-8")
    assert written == (text[: find_sentence_end(text, is_whole=True)] or text)
    assert f"chapter.txt: {len(stylometry.split_words(written))} words, 150 tokens in " in ran.out
    assert (finetuned / "report.json").read_bytes() == before
    again = script("generate_text", "--finetuned-model", finetuned, *LONG, "--to-file", tmp_path / "chapter.txt")
    assert again.code == 2
    assert (tmp_path / "chapter.txt").read_text(encoding="utf-8") == written


def test_ctrl_c_leaves_whole_sentences_in_the_file(large, tmp_path):
    path = tmp_path / "chapter.txt"
    flags = ["--finetuned-model", large / "model", "--prompt", "Day 3.", "--max-new-tokens", 100_000, "--to-file", path]
    command = [sys.executable, *map(str, [ROOT / "generate_text.py", *flags])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as running:
        while not path.exists() or path.stat().st_size < 30:
            assert running.poll() is None
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        said = running.communicate()[0]
    text = path.read_text(encoding="utf-8")
    assert running.returncode == 130
    assert find_sentence_end(text, is_whole=True) == len(text) > 0
    assert said.startswith(f"stopped; {path}: {len(stylometry.split_words(text))} words, ")


def test_samples_beyond_every_window_are_measured_or_named(finetuned, prepared, script, tmp_path, monkeypatch):
    """Longer than any validation segment: half of one is shown as the author's, the rest has its reason."""
    monkeypatch.setattr(stylometry, "MIN_WORDS", 60)
    longest = max(map(len, open_blocks(prepared).segments("validation")))
    model = shutil.copytree(finetuned, tmp_path / "model")
    flags = ["--max-new-tokens", longest + 1, "--num-validation-prompts", 3, "--dtype", "fp32"]
    ran = script("generate_text", "--finetuned-model", model, *flags)
    assert ran.code == 0, ran.err
    report = read_json(model / "report.json")
    shown = [row for row in report["texts"] if row["has_reference"]]
    assert len(shown) == 3
    assert {len(row["generated_ids"]) for row in read_samples(model)} >= {longest + 1}
    [reason] = [reason for reason in report["missing"] if reason.startswith("words, spelling and sense: ")]
    assert "in texts of 10 sources are needed" in reason
    assert report["by_quarter"].keys() == {"base", "finetuned", "reference"}
    assert report["quiz_pairs"] or any(reason.startswith("the quiz: ") for reason in report["missing"])


def test_short_segments_give_short_prompts(finetuned, script, tmp_path, tiny_model):
    """Segments of 33 to 63 tokens gave no prompt at all, and nothing said so."""
    (tmp_path / "book.txt").write_text(make_book(60))
    flags = ["--input-path", tmp_path / "book.txt", "--model-name", tiny_model, "--val-split", "0.1"]
    assert script("prepare_data", *flags, "--block-size", 16, "--output-dir", tmp_path / "blocks").code == 0
    longest = max(map(len, open_blocks(tmp_path / "blocks").segments("validation")))
    assert 33 <= longest < 64
    run = copy_run(finetuned, tmp_path / "run")
    (run / "run_config.json").unlink()  # of another split of the same text
    data = ["--data-dir", tmp_path / "blocks", "--base-model", tiny_model]
    ran = script("generate_text", "--finetuned-model", run, *data, *QUICK)
    assert ran.code == 0, ran.err
    assert sum(row["has_reference"] for row in read_json(run / "report.json")["texts"]) == 2


def test_a_model_in_several_files_is_finished(finetuned, script, tmp_path):
    run = copy_run(finetuned, tmp_path / "run")
    shutil.copytree(finetuned / "checkpoint-6", run / "checkpoint-6")
    (run / "manifest.json").unlink()
    (run / "model.safetensors").unlink()
    load_pair(finetuned)[0].save_pretrained(run, max_shard_size="20KB")
    assert len([*run.glob("model-*.safetensors")]) > 1
    ran = script("generate_text", "--finetuned-model", run, "--max-new-tokens", 4, *QUICK)
    assert ran.code == 0, ran.err


def test_without_validation_text_there_are_samples(finetuned, script, tmp_path, tiny_model):
    alone = copy_run(finetuned, tmp_path / "alone")
    (alone / "run_config.json").unlink()
    ran = script("generate_text", "--finetuned-model", alone, "--base-model", tiny_model, "--max-new-tokens", 4)
    assert ran.code == 0, ran.err
    assert "not measured: style and copying: there is no prepared data; give --data-dir" in ran.out
    assert "unseen" not in ran.out
    assert len(read_samples(alone)) == 2 * 2
    made = {"samples.jsonl", "report.json", "report.html", "report.md"}
    assert {path.name for path in alone.iterdir()} - {path.name for path in finetuned.iterdir()} <= made
    assert made <= {path.name for path in alone.iterdir()}
    assert not (alone / "README.md").exists(), "a model card is written only where finetune_generative.py has been"


def test_narrow_terminal_puts_texts_below_each_other(finetuned, script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    ran = script("generate_text", "--finetuned-model", finetuned, "--max-new-tokens", 4, *QUICK)
    assert "[fine-tuned model]" in ran.out
    shown = ran.out.split("=====\n", 1)[1].split("\nworth opening: ")
    assert len(shown) == 2
    assert max(map(len, shown[0].splitlines())) <= 40
