"""The training loop through its command: exact accumulation, exact resume, and that it learns."""

import contextlib
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import replace
from safetensors.torch import load_file
from scorer import independent_loss

import finetune_generative
from utils.data.blocks import open_blocks
from utils.data.tokenizer import load_tokenizer
from utils.errors import UserError
from utils.evaluation.generation import Decoding, generate_ids
from utils.model.loading import load_pair, new_model
from utils.storage import read_json
from utils.training import checkpoint as checkpoints
from utils.training import optim
from utils.training.checkpoint import TrainState

QUICK = ["--max-steps", 6, "--batch-size", 4, "--learning-rate", "1e-3", "--dtype", "fp32", "--copy-samples", 0,
         "--sample-tokens", 0]  # fmt: skip

SAMPLED = ["--max-new-tokens", 5, "--num-validation-prompts", 2, "--no-measure"]


@pytest.fixture
def finetune(script, prepared, tmp_path):
    """Run finetune_generative.py into tmp_path/name; returns the output folder."""

    def run(name, *flags, data=prepared, code=0):
        ran = script("finetune_generative", "--data-dir", data, "--output-dir", tmp_path / name, *flags)
        assert ran.code == code, ran.err
        return tmp_path / name

    return run


def weights(folder: Path) -> dict:
    return load_file(folder / "model.safetensors")


def assert_same(first: Path, second: Path):
    """Every tensor of two checkpoints is equal to the bit, the optimizer's too."""
    for name in ("model.safetensors", "optimizer.safetensors"):
        a, b = load_file(first / name), load_file(second / name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name


DROPOUT = ["--dropout", "0.2", "--save-every", 6]


@pytest.fixture
def straight_and_stopped(finetune, monkeypatch):
    """Return the folder of a whole run, and that of the same run stopped by SIGTERM at step 3."""

    def stopping(*settings, build=optim.build_schedule):
        schedule = build(*settings)
        return lambda step: (step == 2 and signal.raise_signal(signal.SIGTERM)) or schedule(step)

    straight = finetune("straight", *QUICK, *DROPOUT)
    with monkeypatch.context() as patch:
        replace(optim, "build_schedule", stopping, patch.setattr)
        stopped = finetune("stopped", *QUICK, *DROPOUT, code=128 + signal.SIGTERM)
    torch.manual_seed(123)  # a new process would not begin where the stopped one left its generator
    return straight, stopped


def test_stopped_and_continued_equals_never_stopped(finetune, straight_and_stopped):
    straight, stopped = straight_and_stopped
    assert [path.name for path in stopped.glob("checkpoint-*")] == ["checkpoint-3"]
    finetune("stopped", *QUICK, *DROPOUT)
    assert_same(straight / "checkpoint-6", stopped / "checkpoint-6")
    steps = [json.loads(line)["step"] for line in (stopped / "metrics.jsonl").read_text().splitlines()]
    expected = [json.loads(line)["step"] for line in (straight / "metrics.jsonl").read_text().splitlines()]
    assert steps == expected


def test_random_state_is_part_of_a_checkpoint(finetune, straight_and_stopped, monkeypatch):
    """Without the restored generator, dropout would draw other masks after a stop."""
    straight, stopped = straight_and_stopped
    monkeypatch.setattr(finetune_generative, "restore_random_state", lambda path, device: None)
    finetune("stopped", *QUICK, *DROPOUT)
    with pytest.raises(AssertionError):
        assert_same(straight / "checkpoint-6", stopped / "checkpoint-6")


def test_accumulation_changes_nothing(finetune):
    whole = finetune("4x1", *QUICK, "--dropout", 0)
    parts = finetune("2x2", *QUICK, "--dropout", 0, "--batch-size", 2, "--grad-accum-steps", 2)
    a, b = weights(whole), weights(parts)
    assert max((a[key] - b[key]).abs().max().item() for key in a) < 1e-5
    losses = [json.loads(line).get("train/loss") for line in (whole / "metrics.jsonl").read_text().splitlines()]
    again = [json.loads(line).get("train/loss") for line in (parts / "metrics.jsonl").read_text().splitlines()]
    assert [x for x in losses if x] == pytest.approx([x for x in again if x], abs=1e-5)


def test_uneven_last_batch_is_weighted_by_its_blocks(finetune, prepared):
    """157 blocks in updates of 2 x 60: micro-batches of 60 and 37 must not count alike."""
    still = ["--dropout", 0, "--max-steps", 2]
    out = finetune("uneven", *QUICK, *still, "--batch-size", 60, "--grad-accum-steps", 2)
    whole = finetune("whole", *QUICK, *still, "--batch-size", 120)
    a, b = weights(out), weights(whole)
    assert max((a[key] - b[key]).abs().max().item() for key in a) < 1e-5


def test_workers_evaluation_and_logging_change_no_bit(finetune):
    plain = finetune("plain", *QUICK, "--dropout", "0.2", "--eval-every", 6)
    busy = finetune(
        "busy", *QUICK[:-2], "--dropout", "0.2", "--eval-every", 1, "--sample-tokens", 3, "--num-workers", 2,
        "--save-every", 1, "--log-every", 3, "--report-to", "tensorboard",
    )  # fmt: skip
    assert_same(plain / "checkpoint-6", busy / "checkpoint-6")
    assert list((busy / "tensorboard").glob("events*"))


def test_logged_loss_is_the_mean_over_the_update(finetune, prepared, tiny_model):
    """The first update's loss is the base model's own on those blocks, not its last micro-batch's."""
    out = finetune("run", *QUICK, "--batch-size", 2, "--grad-accum-steps", 3, "--max-steps", 1, "--dropout", 0)
    first = next(
        row["train/loss"]
        for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        if "train/loss" in row
    )
    from utils.data.blocks import BatchOrder

    data, (model, _) = open_blocks(prepared), load_pair(tiny_model)
    rows = [i for batch in BatchOrder(len(data.train), 2, 3, 42).step_batches(0) for i in batch]
    assert first == pytest.approx(independent_loss(model, data.train[rows]["input_ids"]), abs=1e-5)


def test_keeps_the_best_model_and_stops_early(finetune, prepared):
    out = finetune(
        "run", "--epochs", 40, "--learning-rate", "1e-2", "--lr-schedule", "constant", "--early-stopping-patience", 2,
        "--eval-every", 10, "--sample-tokens", 0, "--copy-samples", 0, "--dtype", "fp32", "--keep-checkpoints", 1,
    )  # fmt: skip
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    validation = {row["step"]: row["eval/loss"] for row in rows if "eval/loss" in row and row["step"] > 0}
    best = min(validation, key=validation.get)
    results = json.loads((out / "all_results.json").read_text())
    assert results["best_step"] == best
    assert max(validation) == best + 20 < results["max_steps"]
    model, _ = load_pair(out)
    data = open_blocks(prepared)
    assert independent_loss(model, data.validation[:]["input_ids"]) == pytest.approx(validation[best], abs=1e-5)
    assert [path.name for path in out.glob("checkpoint-*")] == [f"checkpoint-{max(validation)}"]


COPYING = ["--max-steps", 60, "--eval-every", 10, "--learning-rate", "1e-2", "--dtype", "fp32", "--sample-tokens", 0,
           "--copy-samples", 4, "--save-every", 60]  # fmt: skip


def evaluations(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in rows if "eval/loss" in row}


def test_copying_is_measured_at_each_evaluation(finetune):
    out = finetune("run", *COPYING, "--max-copy-rate", 1)
    rates = {step: row["eval/copy_rate"] for step, row in evaluations(out).items()}
    assert list(rates) == [0, 10, 20, 30, 40, 50, 60]
    assert 0 <= rates[0] < rates[60] <= 1
    results = json.loads((out / "all_results.json").read_text())
    assert (results["base_copy_rate"], results["copy_rate"]) == (rates[0], rates[results["best_step"]])
    off = finetune("off", *COPYING, "--copy-samples", 0)
    assert not [row for row in evaluations(off).values() if "eval/copy_rate" in row]
    assert not {"copy_rate", "base_copy_rate"} & json.loads((off / "all_results.json").read_text()).keys()
    assert_same(out / "checkpoint-60", off / "checkpoint-60")


def test_a_model_that_copies_is_not_the_best(finetune, prepared):
    """The best is the one with the least loss among those that copy no more than --max-copy-rate."""
    free = finetune("free", *COPYING, "--max-copy-rate", 1)
    rows = {step: row for step, row in evaluations(free).items() if step}
    least = min(rows, key=lambda step: rows[step]["eval/loss"])
    assert json.loads((free / "all_results.json").read_text())["best_step"] == least
    limit = rows[least]["eval/copy_rate"] - 1e-6
    allowed = {step: row["eval/loss"] for step, row in rows.items() if row["eval/copy_rate"] <= limit}
    assert allowed, "the case tries something"
    kept = finetune("kept", *COPYING, "--max-copy-rate", limit)
    best = min(allowed, key=allowed.get)
    assert json.loads((kept / "all_results.json").read_text())["best_step"] == best != least
    validation = open_blocks(prepared).validation[:]["input_ids"]
    assert independent_loss(load_pair(kept)[0], validation) == pytest.approx(allowed[best], abs=1e-5)


@pytest.mark.parametrize(
    ("figures", "best"),
    [
        ([(3, 0.1), (2, 0.1), (1, 0.21)], [1, 2]),
        ([(3, 0.1), (2, 0.1), (1, 0.2)], [1, 2, 3]),  # at the limit is not above it
        ([(3, 0.1), (2, 0.3), (2.5, 0.2)], [1, 3]),
        ([(2, 0.5), (3, 0.1), (1, 0.5)], [1, 2]),
        ([(2, 0.5), (3, 0.6), (1, 0.9)], [1, 3]),  # all copy: the least loss
        ([(3, None), (2, None), (2, None)], [1, 2]),
    ],
)
def test_copying_counts_before_the_loss(figures, best):
    state, chosen = TrainState(), []
    base = {"eval/loss": 0.5, "eval/copy_rate": 0.0}
    assert not state.record_evaluation(base, 0.2), "the base model is no result"
    for state.step, (loss, rate) in enumerate(figures, 1):
        result = {"eval/loss": float(loss)} | ({} if rate is None else {"eval/copy_rate": rate})
        if state.record_evaluation(result, 0.2):
            chosen.append(state.step)
            assert state.best_metrics == result
    assert (chosen, state.best_step, state.base_metrics) == (best, best[-1], base)
    assert state.evals_without_gain == len(figures) - best[-1]


@pytest.fixture(scope="module")
def periodic(tmp_path_factory, tiny_model, script_once):
    """The seed's case: one sentence again and again, prepared for a base with 128 positions."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("periodic")
    base, text = folder / "base", folder / "loop.txt"
    torch.manual_seed(0)
    config = GPT2Config.from_pretrained(tiny_model, n_positions=128, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    GPT2LMHeadModel(config).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(base)
    text.write_text(SENTENCE * 300)
    script_once("prepare_data", "--input-path", text, "--model-name", base, "--output-dir", folder / "blocks")
    return folder


SENTENCE = "Hal rang the bell at the ford, and the ferry came over the cold water for him.\n"


def continue_sentence(model, tokenizer):
    """Return the model's greedy next 60 tokens after a period and a bit, and the true ones."""
    stream = tokenizer(SENTENCE * 8)["input_ids"]
    start = len(tokenizer(SENTENCE)["input_ids"]) + 3
    greedy = Decoding(max_new_tokens=60, do_sample=False)
    (new,) = generate_ids(model, tokenizer.eos_token_id, [stream[:start]], [0], greedy, contextlib.nullcontext)
    return new, stream[start : start + 60]


def test_periodic_text_is_learned_and_continued(finetune, periodic):
    """After a short run from a base the true loss is at most the seed's 0.1143, and the text goes on verbatim."""
    data_dir = periodic / "blocks"
    out = finetune("run", "--learning-rate", "1e-2", "--epochs", 12, "--dtype", "fp32", data=data_dir)
    model, tokenizer = load_pair(out)
    new, true = continue_sentence(model, tokenizer)
    assert new == true
    assert independent_loss(model, open_blocks(data_dir).validation[:]["input_ids"]) <= 0.1143


def test_labels_shifted_twice_would_teach_gibberish(periodic):
    """The ancestor's run: a fine loss by its own account, a true loss above 5, text that goes wrong at once."""
    data, (model, tokenizer) = open_blocks(periodic / "blocks"), load_pair(periodic / "base")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for step in range(120):
        rows = data.train[[(step * 8 + i) % len(data.train) for i in range(8)]]["input_ids"]
        loss = model(input_ids=rows[:, :-1], labels=rows[:, 1:]).loss  # shifted here, and again inside
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    new, true = continue_sentence(model, tokenizer)
    assert loss.item() < 0.2
    assert independent_loss(model, data.validation[:]["input_ids"]) > 5
    assert sum(a == b for a, b in zip(new, true, strict=False)) < 30


def test_losses_are_golden(finetune):
    """A tiny run's losses; they change only in a commit that says why."""
    out = finetune("run", *QUICK, "--dropout", 0)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert losses == pytest.approx(GOLDEN, abs=2e-4)


GOLDEN = [5.9638, 5.92939, 5.85999, 5.81244, 5.79365, 5.77896]


def test_finished_run_is_left_alone(finetune, script, prepared, tmp_path):
    out, summaries = finetune("run", *QUICK), ("all_results.json", "loss_curve.png")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name not in summaries}
    ran = script("finetune_generative", "--data-dir", prepared, "--output-dir", out, *QUICK)
    assert ran.code == 0
    assert "already complete at step 6" in ran.out
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_without_its_checkpoints_is_not_begun_again(finetune, straight_and_stopped, script, prepared, finished):
    """README calls them of use only to resume; the model, the report and all else would have been replaced."""
    out = straight_and_stopped[0 if finished else 1]
    for checkpoint in out.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    (out / "mine.txt").write_text("a note")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    ran = script("finetune_generative", "--data-dir", prepared, "--output-dir", out, *QUICK, *DROPOUT)
    if finished:
        assert (ran.code, "already complete at step 6" in ran.out) == (0, True)
    else:
        assert (ran.code, "were removed, so that the run cannot go on; --overwrite" in ran.err) == (2, True)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert finetune(out.name, *QUICK, *DROPOUT, "--overwrite") == out


def test_the_base_of_a_run_without_a_checkpoint_is_looked_for(finetune, tiny_model, monkeypatch):
    """Killed before its first checkpoint, and the base left the cache: its hash was not recorded, and refused later."""

    def die(*_):
        raise RuntimeError("killed")

    save = checkpoints.save_checkpoint
    monkeypatch.setattr(checkpoints, "save_checkpoint", die)
    with pytest.raises(RuntimeError, match="killed"):
        finetune("run", *QUICK)
    monkeypatch.setattr(checkpoints, "save_checkpoint", save)
    looked = []
    monkeypatch.setattr(finetune_generative, "locate_model", lambda *args: looked.append(args) or tiny_model)
    out = finetune("run", *QUICK)
    assert looked
    assert read_json(out / "run_config.json")["settings"]["base_sha256"]


@pytest.mark.parametrize("n_positions", [4, 32, 64])
def test_samples_may_be_longer_than_the_context(finetune, script, book, tiny_model, tmp_path, n_positions):
    """Default flags, and a sample and a prompt longer than any context, on models with few positions."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    sizes = {"vocab_size": len(tokenizer), "n_positions": n_positions, "n_embd": 16, "n_layer": 1, "n_head": 1}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path / "short")
    tokenizer.save_pretrained(tmp_path / "short")
    flags = ["--input-path", book, "--model-name", tmp_path / "short", "--block-size", min(n_positions, 16)]
    assert script("prepare_data", *flags, "--output-dir", tmp_path / "blocks").code == 0
    for name, flags in (("defaults", []), ("long", ["--sample-tokens", 150, "--sample-prompt", "Ada went. " * 30])):
        finetune(name, "--max-steps", 2, *flags, data=tmp_path / "blocks")


@pytest.mark.slow
def test_a_sample_beyond_the_context_of_the_embedded_model(finetune, script, book, tmp_path):
    base = Path(__file__).parent.parent / "results/base_model"
    flags = ["--input-path", book, "--model-name", base, "--output-dir", tmp_path / "blocks"]
    assert script("prepare_data", *flags).code == 0
    finetune("run", "--max-steps", 1, "--copy-samples", 0, "--sample-tokens", 600, data=tmp_path / "blocks")


def test_output_opens_with_transformers_alone(finetune, prepared):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = finetune("run", *QUICK, "--save-dtype", "bf16")
    for folder in (out, out / "checkpoint-6"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert len(AutoTokenizer.from_pretrained(folder)) == model.config.vocab_size
    assert {tensor.dtype for tensor in weights(out).values()} == {torch.bfloat16}
    assert weights(out).keys() == weights(out / "checkpoint-6").keys()
    assert {tensor.dtype for tensor in weights(out / "checkpoint-6").values()} == {torch.float32}
    assert not [path for path in out.rglob("*") if path.suffix in (".bin", ".pt", ".pkl") or path.name.startswith(".")]


def test_from_scratch_with_a_tokenizer_of_its_own(finetune, script, book, tmp_path):
    """No download at all: tokenizer and model made from the text, then compared with the untrained one."""
    data_dir, config = tmp_path / "data", tmp_path / "config.json"
    config.write_text('{"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}')
    prepared = script("prepare_data", "--input-path", book, "--train-tokenizer", 300, "--block-size", 32,
                      "--output-dir", data_dir)  # fmt: skip
    assert prepared.code == 0, prepared.err
    flags = ["--max-steps", 12, "--learning-rate", "1e-2", "--copy-samples", 2]
    out = finetune("run", "--from-scratch", config, *flags, data=data_dir)
    results = json.loads((out / "all_results.json").read_text())
    assert results["eval_loss"] < results["base_eval_loss"] - 0.3
    compared = script("generate_text", "--finetuned-model", out, *SAMPLED)
    assert compared.code == 0, compared.err
    assert "untrained_model" in compared.out


LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
         "num_attention_heads": 2, "max_position_embeddings": 64}  # fmt: skip


@pytest.mark.parametrize("wrong", [{"hidden_act": "gelu_newer"}, {"intermediate_size": -3}])
def test_a_configuration_that_no_model_can_be_made_from_is_refused(tmp_path, tiny_model, wrong):
    path, tokenizer = tmp_path / "config.json", load_tokenizer(tiny_model)
    path.write_text(json.dumps(LLAMA | {"pad_token_id": 32000}))  # of another tokenizer: it is left out
    assert new_model(path, tokenizer, 1).config.pad_token_id is None
    path.write_text(json.dumps(LLAMA | wrong))
    with pytest.raises(UserError, match=r"^--from-scratch: .*config.json does not fit: "):
        new_model(path, tokenizer, 1)


def test_an_optional_package_is_asked_for_before_anything_is_removed(monkeypatch):
    monkeypatch.setattr("utils.argument_types.find_spec", lambda _: None)
    assert finetune_generative.parse_args([]).report_to == "none"
    with pytest.raises(UserError, match="tensorboard is not installed; pip install tensorboard"):
        finetune_generative.parse_args(["--report-to", "tensorboard"])


def test_small_llama_goes_through(finetune, script, tmp_path, tiny_model, book):
    """Any causal language model folder works, not only GPT-2's."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=0)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    prepared = script("prepare_data", "--input-path", book, "--model-name", tmp_path / "llama", "--block-size", 32,
                      "--output-dir", tmp_path / "blocks")  # fmt: skip
    assert prepared.code == 0, prepared.err
    out = finetune("run", *QUICK, "--dropout", "0.1", data=tmp_path / "blocks")
    assert script("generate_text", "--finetuned-model", out, *SAMPLED).code == 0
