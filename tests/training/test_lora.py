"""LoRA through the command: the merged model and its adapter, resuming to the bit, and what is refused."""

import os
import re
import shutil
import signal
import socket
import sys

import pytest
import torch
from conftest import replace
from forked import Workshop, digest_files, digest_run, digest_tensors, run_child, strays, workshop  # noqa: F401
from huggingface_hub import constants
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from utils.errors import UserError
from utils.model import lora
from utils.model.loading import load_model
from utils.storage import describe_files, read_json, read_sealed, write_sealed
from utils.training import checkpoint, forecast, optim

peft = pytest.importorskip("peft")

RUN = ["--lora-rank", 4, "--max-steps", 6, "--batch-size", 4, "--learning-rate", "1e-2", "--dtype", "fp32",
       "--copy-samples", 0, "--sample-tokens", 0, "--save-every", 3]  # fmt: skip
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
IDS = torch.arange(5, 69).reshape(2, 32)


@pytest.fixture
def finetune(script, prepared, tmp_path):
    """Run finetune_generative.py with RUN into tmp_path/name; returns what it printed and the output folder."""

    def run(name, *flags, data=prepared, code=0):
        ran = script("finetune_generative", "--data-dir", data, "--output-dir", tmp_path / name, *RUN, *flags)
        assert ran.code == code, ran.err
        return ran, tmp_path / name

    return run


@pytest.fixture
def no_network(monkeypatch):
    """Let the hub's client try, and note every name that is looked up."""
    asked = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *name, **_: asked.append(name) or (_ for _ in ()).throw(OSError())
    )
    yield
    assert not asked


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def check_result(out, base):
    """Check that the root is a whole model, which equals the base with the adapter beside it."""
    merged = AutoModelForCausalLM.from_pretrained(out)
    tied = merged.config.tie_word_embeddings
    assert (merged.get_input_embeddings().weight is merged.get_output_embeddings().weight) == tied
    plain = AutoModelForCausalLM.from_pretrained(base)
    untrained = logits(plain)
    adapted = peft.PeftModel.from_pretrained(plain, out / "adapter")
    assert (logits(merged) - logits(adapted)).abs().max() < 1e-5
    assert (logits(merged) - untrained).abs().max() > 1e-2
    before, after = (load_file(folder / "model.safetensors") for folder in (base, out))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    layers = {n for n, m in merged.named_modules() if type(m).__name__ in ("Conv1D", "Linear") and n != "lm_head"}
    assert changed == {f"{name}.weight" for name in layers}
    targets = read_json(out / "adapter/adapter_config.json")["target_modules"]
    assert targets == sorted(targets), "a set would be written in another order by the next process"
    assert {path.name for path in (out / "adapter").iterdir()} == ADAPTER


def test_merged_model_equals_base_and_adapter(finetune, script, tiny_model, no_network):
    ran, out = finetune("run")
    check_result(out, tiny_model)
    config = read_json(out / "adapter/adapter_config.json")
    assert (config["r"], config["lora_alpha"], config["lora_dropout"], config["fan_in_fan_out"]) == (4, 8, 0, True)
    n_trained = sum(t.numel() for t in load_file(out / "adapter/adapter_model.safetensors").values())
    n_base = sum(p.numel() for p in load_model(tiny_model).parameters())
    assert read_json(out / "run_config.json")["parameters"] == {"all": n_base + n_trained, "trained": n_trained}
    assert f"rank 4, alpha 8, {n_trained:,} parameters trained" in ran.out
    # Merged in float32, then rounded once.
    rounded = load_file(finetune("bf16", "--save-dtype", "bf16")[1] / "model.safetensors")
    exact = load_file(out / "model.safetensors")
    assert all(torch.equal(rounded[name], tensor.bfloat16()) for name, tensor in exact.items())
    assert script("generate_text", "--finetuned-model", out, "--max-new-tokens", 5, "--no-measure").code == 0
    assert "Trained with LoRA (rank 4, alpha 8" in (out / "README.md").read_text()
    assert not list(out.rglob("*.bin"))


@pytest.mark.parametrize("tied", [True, False])
def test_linear_layers_of_llama(finetune, script, tmp_path, tiny_model, book, tied):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
                         tie_word_embeddings=tied)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    flags = ["--input-path", book, "--model-name", tmp_path / "llama", "--block-size", 32]
    assert script("prepare_data", *flags, "--output-dir", tmp_path / "blocks").code == 0
    out = finetune("run", "--gradient-checkpointing", data=tmp_path / "blocks")[1]
    assert read_json(out / "adapter/adapter_config.json")["fan_in_fan_out"] is False
    check_result(out, tmp_path / "llama")


def test_a_checkpoint_has_the_adapter_alone(finetune, tiny_model):
    out = finetune("run", "--lora-alpha", 12)[1]
    folder = out / "checkpoint-6"
    assert {path.name for path in folder.iterdir()} == ADAPTER | {
        "manifest.json", "optimizer.safetensors", "rng_state.safetensors", "tokenizer.json", "tokenizer_config.json",
        "trainer_state.json",
    }  # fmt: skip
    assert all(".lora_" in name for name in load_file(folder / "optimizer.safetensors"))
    model = load_model(tiny_model)
    whole = checkpoint.checkpoint_bytes(model)
    lora.add_adapter(model, 4, 12, 0, "base", folder)
    tensors = sum((folder / name).stat().st_size for name in ("adapter_model.safetensors", "optimizer.safetensors"))
    assert tensors - 20_000 < checkpoint.checkpoint_bytes(model) - checkpoint.OTHER_BYTES < tensors
    assert checkpoint.checkpoint_bytes(model) < whole
    assert checkpoint.best_bytes(model) > (out / "model.safetensors").stat().st_size
    again = {name: p for name, p in model.named_parameters() if p.requires_grad}
    lora.save_adapter(model, {name: p.detach() for name, p in again.items()}, out / "again")
    assert digest_files(out / "again") != digest_files(out / "adapter")  # base_model_name_or_path is another
    assert digest_tensors(out / "again/adapter_model.safetensors") == digest_tensors(
        out / "checkpoint-6/adapter_model.safetensors"
    )


def stopping(*settings, build=optim.build_schedule):
    schedule = build(*settings)
    return lambda step: (step == 2 and signal.raise_signal(signal.SIGTERM)) or schedule(step)


@pytest.fixture
def stopped(finetune, monkeypatch):
    """Folder of a run with dropout that SIGTERM stopped at step 3."""
    with monkeypatch.context() as patch:
        replace(optim, "build_schedule", stopping, patch.setattr)
        out = finetune("stopped", "--dropout", "0.2", code=128 + signal.SIGTERM)[1]
    torch.manual_seed(123)
    return out


def test_stopped_and_resumed_equals_unbroken(finetune, stopped):
    whole = finetune("whole", "--dropout", "0.2")[1]
    ran, _ = finetune("stopped", "--dropout", "0.2", "--lora-alpha", 8)  # the default, written out
    assert "resuming from step 3 of 6" in ran.out
    assert digest_run(stopped) == digest_run(whole)
    assert digest_files(stopped / "adapter") == digest_files(whole / "adapter")


def test_another_adapter_is_refused(finetune, stopped):
    before = digest_files(stopped)
    for flags, says in [
        (["--lora-rank", 5], "--lora-rank 5 but the run has 4"),
        (["--lora-rank", 0], "--lora-rank None but the run has 4"),
        (["--lora-alpha", 9], "--lora-alpha 9 but the run has 8"),
    ]:
        assert says in finetune("stopped", "--dropout", "0.2", *flags, code=2)[0].err
    assert digest_files(stopped) == before


@pytest.fixture
def own_base(tmp_path, tiny_model, book, script):
    """A base model that a test may change, and blocks for it."""
    base, blocks = shutil.copytree(tiny_model, tmp_path / "base"), tmp_path / "blocks"
    flags = ["--input-path", book, "--model-name", base, "--block-size", 32, "--output-dir", blocks]
    assert script("prepare_data", *flags).code == 0
    return base, blocks


def test_resuming_needs_the_same_base(finetune, own_base, tmp_path, monkeypatch):
    base, blocks = own_base
    with monkeypatch.context() as patch:
        replace(optim, "build_schedule", stopping, patch.setattr)
        finetune("run", data=blocks, code=128 + signal.SIGTERM)
    moved = base.rename(tmp_path / "moved")
    err = finetune("run", data=blocks, code=2)[0].err
    assert err.splitlines()[-1] == f"error: model: {base}: no such directory"
    shutil.copytree(moved, base)
    changed = AutoModelForCausalLM.from_pretrained(base)
    changed.transformer.ln_f.bias.data += 1
    changed.save_pretrained(base)
    assert "base model differs from the run's" in finetune("run", data=blocks, code=2)[0].err
    # A base that comes back during the run, as from the hub, is compared too.
    import finetune_generative

    with monkeypatch.context() as patch:
        patch.setattr(finetune_generative, "find_local", lambda name: None)
        assert "base model differs from the run's" in finetune("run", data=blocks, code=2)[0].err
        shutil.rmtree(base)
        moved.rename(base)
        assert "resuming from step 3" in finetune("run", data=blocks)[0].out
    shutil.rmtree(base)
    assert "already complete" in finetune("run", data=blocks)[0].out


def test_a_pickle_is_never_read(finetune, stopped, own_base, tmp_path, script):
    """Neither beside a checkpoint, nor beside a base model, where transformers would read it with peft's help."""
    folder = stopped / "checkpoint-3"
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    write_sealed(folder, read_sealed(folder) | {"files": describe_files(folder)})
    err = finetune("stopped", "--dropout", "0.2", code=2)[0].err
    assert re.search(r"error: .*checkpoint-3/adapter_model\.safetensors cannot be read: .*\n$", err)
    base, blocks = own_base
    for path in (stopped / "checkpoint-3").glob("adapter_*"):
        shutil.copy(path, base)
    says = f"error: model: {base} has an adapter, expected a whole model; merge it first"
    assert finetune("other", data=blocks, code=2)[0].err.splitlines()[-1] == says
    err = script("generate_text", "--finetuned-model", folder, "--base-model", tmp_path / "base").err
    assert "has an adapter, expected a whole model" in err


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors: tensors.popitem(), r"lora_\w\.weight is missing, expected \(\d+, \d+\)"),
        (lambda tensors: tensors.update(more=torch.zeros(2)), r"more is \(2,\), expected None"),
        (
            lambda tensors: tensors.update({name: torch.zeros(3, 3) for name in tensors}),
            r"weight is \(3, 3\), expected",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(tiny_model, tmp_path, change, says):
    model = load_model(tiny_model)
    lora.add_adapter(model, 4, 8, 0, "base")
    lora.save_adapter(model, {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, tmp_path)
    tensors = load_file(tmp_path / lora.WEIGHTS)
    change(tensors)
    lora.save_file(tensors, tmp_path / lora.WEIGHTS)
    with pytest.raises(UserError, match=says):
        lora.add_adapter(load_model(tiny_model), 4, 8, 0, "base", tmp_path)
    (tmp_path / lora.WEIGHTS).write_bytes(b"12345678{")
    with pytest.raises(UserError, match="cannot be read"):
        lora.add_adapter(load_model(tiny_model), 4, 8, 0, "base", tmp_path)


MIXTRAL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
           "intermediate_size": 32, "num_local_experts": 2}  # fmt: skip
UNFIT = {"mamba": {"hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}, "mixtral": MIXTRAL}


@pytest.mark.parametrize("kind", UNFIT)
def test_a_model_that_peft_cannot_adapt_is_refused(kind, recwarn):
    """Mamba reads a layer's weight without the layer; Mixtral's experts are no layers."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=50, **UNFIT[kind]))
    with pytest.raises(UserError, match=f"--lora-rank: {kind} has not the linear layers"):
        lora.add_adapter(model, 4, 8, 0, kind)
    assert not recwarn.list


def test_a_model_without_linear_layers_is_refused(tiny_model):
    model = load_model(tiny_model)
    model.transformer.h = torch.nn.ModuleList()
    with pytest.raises(UserError, match="--lora-rank: gpt2 has not the linear layers"):
        lora.add_adapter(model, 4, 8, 0, "base")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--lora-alpha", 8], "--lora-alpha 8 has no effect without --lora-rank"),
        (["--lora-rank", 8, "--from-scratch", "x.json"], "--lora-rank and --from-scratch exclude each other"),
        (["--lora-rank", -1], "--lora-rank must be 0 or more"),
        (["--lora-rank", 8, "--lora-alpha", 0], "--lora-alpha must be 1 or more"),
    ],
)
def test_flags_that_do_not_fit(script, flags, says):
    refused = script("finetune_generative", *flags)
    assert (refused.code, refused.out) == (2, "")
    assert refused.err.startswith("error: ")
    assert says in refused.err


def test_without_peft_one_line_says_what_to_install(finetune, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    ran, out = finetune("run", code=2)
    assert (
        ran.err.splitlines()[-1] == "error: --lora-rank needs the package peft; install it: python -m pip install peft"
    )
    assert not (out / "run_config.json").exists()


def test_dry_run_knows_that_few_weights_are_trained(finetune, tiny_model, monkeypatch):
    made = []
    monkeypatch.setattr(checkpoint, "OTHER_BYTES", 0)
    replace(forecast, "forecast_run", lambda *args, make=forecast.forecast_run: made.append(make(*args)) or made[-1],
            monkeypatch.setattr)  # fmt: skip
    for rank in (0, 4):
        ran, out = finetune("run", "--lora-rank", rank, "--dry-run")
        assert ("LoRA" in ran.out) == bool(rank)
    assert not out.exists()
    model = load_model(tiny_model)
    whole = 4 * sum(p.numel() for p in model.parameters())
    lora.add_adapter(model, 4, 8, 0, "base")
    adapter = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert [each.disk_bytes for each in made] == [2 * 3 * whole + whole, 3 * adapter + 2 * (whole + adapter)]


def kill_at(moment):
    """Return a hook that kills the process before or after the second best model's adapter takes its place."""

    def prepare(rename=os.replace):
        seen = []

        def killing(source, target):
            seen.extend([target] if str(target).endswith("/adapter") else [])
            if len(seen) == 2 and moment == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)
            if len(seen) == 2:
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = killing

    return prepare


def test_killed_while_the_best_model_is_replaced(workshop):  # noqa: F811
    """Adapter and merged model are never of different steps: the folder is refused until the run is resumed."""
    whole, flags = workshop.folder / "whole", ("--lora-rank", 2)
    assert run_child(*workshop.finetune(whole, *flags)).code == 0
    for moment in ("before", "after"):
        out = workshop.folder / moment
        command = workshop.finetune(out, *flags)
        assert run_child(*command, prepare=kill_at(moment)).code == -signal.SIGKILL
        refused = run_child(*workshop.generate(out))
        assert refused.code == 2
        assert "error: model: " in refused.err
        assert run_child(*command).code == 0
        assert digest_run(out) == digest_run(whole)
        assert not strays(out)
