"""Families of models, tiny and with random weights, through all that the three scripts do with them."""

import copy
import json
import signal

import pytest
import torch
from conftest import add_start_token, replace
from safetensors.torch import load_file, save_file
from scorer import independent_loss
from transformers import AutoConfig, AutoModelForCausalLM

import generate_text
from utils.data.blocks import open_blocks
from utils.data.tokenizer import END_OF_TEXT, load_tokenizer, start_ids, train_tokenizer
from utils.errors import UserError
from utils.model import layers
from utils.model.loading import load_model, use_checkpointing
from utils.training import optim

CPU = torch.device("cpu")
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
GATED = WIDE | {"intermediate_size": 48}
GROUPED = GATED | {"num_key_value_heads": 2}
HEADS = GROUPED | {"head_dim": 16}  # heads wider than the model
SLIDING = {"sliding_window": 8}  # tokens: less than a block
NEO = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64}
LOCAL = {"attention_types": [[["global", "local"], 1]], "window_size": 8}
BOS = "<s>"
# Name: model type, the token that its tokenizer puts before a text, fields of its config.
FAMILIES = {
    "gpt2": ("gpt2", None, GPT),
    "gpt_neo": ("gpt_neo", None, NEO | LOCAL),
    "gptj": ("gptj", None, GPT | {"rotary_dim": 4}),
    "gpt_neox": ("gpt_neox", None, GATED),
    "opt": ("opt", END_OF_TEXT, WIDE | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": ("bloom", None, {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mpt": ("mpt", None, {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "expansion_ratio": 2}),
    "falcon": ("falcon", None, WIDE | {"multi_query": True}),
    "falcon_alibi": ("falcon", None, WIDE | {"multi_query": False, "alibi": True}),
    "llama": ("llama", BOS, GATED),
    "mistral": ("mistral", BOS, GROUPED | SLIDING),
    "mixtral": ("mixtral", BOS, GROUPED | {"num_local_experts": 4, "output_router_logits": True}),
    "qwen2": ("qwen2", None, GROUPED),
    "qwen3": ("qwen3", None, HEADS),
    "gemma": ("gemma", BOS, HEADS),
    "gemma2": ("gemma2", BOS, HEADS | SLIDING | {"query_pre_attn_scalar": 16}),
    "gemma3": ("gemma3_text", BOS, HEADS | SLIDING | {"query_pre_attn_scalar": 16}),
    "phi": ("phi", None, GATED),
    "phi3": ("phi3", BOS, GROUPED | {"pad_token_id": 0}),
    "biogpt": ("biogpt", END_OF_TEXT, GATED),
    "gpt_bigcode": ("gpt_bigcode", None, GPT),
    "xglm": ("xglm", END_OF_TEXT, {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48,
                                   "max_position_embeddings": 64}),
    "stablelm": ("stablelm", None, GROUPED),
    "starcoder2": ("starcoder2", None, GROUPED | SLIDING),
    "olmo": ("olmo", None, GATED),
    "olmo2": ("olmo2", None, GATED),
    "gpt_oss": ("gpt_oss", None, HEADS | SLIDING | {"num_local_experts": 4}),
    "ctrl": ("ctrl", None, GPT | {"dff": 48}),
    "mamba": ("mamba", None, {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
}  # fmt: skip
WITHOUT_DROPOUT = {"mpt", "mamba"}
# transformers' own two ways to compute its attention with a bias by distance differ.
WITHOUT_EAGER = {"falcon_alibi"}
EVERY_DAY = {"opt", "mistral"}
RATE = 0.3


@pytest.fixture(scope="session")
def family(tmp_path_factory, book):
    """Return the folder of a family's model, which is made on first use."""
    folders = {}

    def make(name):
        if name not in folders:
            kind, start, fields = FAMILIES[name]
            folders[name] = tmp_path_factory.mktemp("families") / name
            tokenizer = train_tokenizer([book.read_text(encoding="utf-8")], 400)
            if start:
                add_start_token(tokenizer, start)
            ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
            config = AutoConfig.for_model(kind, **{"vocab_size": len(tokenizer)} | ids | fields)
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config)
            for parameter in model.parameters():  # at their start many are 0, and what multiplies them has no effect
                parameter.data += 0.02 * torch.randn_like(parameter)
            model.save_pretrained(folders[name])
            tokenizer.save_pretrained(folders[name])
        return folders[name]

    return make


def ids_like(model, n_rows=2, n_tokens=40):
    size, seeded = model.get_input_embeddings().weight.shape[0], torch.Generator().manual_seed(0)
    return torch.randint(3, size, (n_rows, n_tokens), generator=seeded)


def loss_and_gradients(model, ids):
    """Return the loss of a model in training mode, and its gradients by name."""
    model.train().zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found, expected):
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name


def plain_twin(model, name):
    """Return the same model as transformers computes it, with eager attention."""
    twin = copy.deepcopy(model)
    if name not in WITHOUT_EAGER:
        twin.set_attn_implementation("eager")
    return twin


def test_activations_are_computed_twice_or_that_is_refused(family):
    """CTRL's model raised a ValueError of transformers."""
    opt = load_model(family("opt"), 0.0)
    use_checkpointing(opt)
    assert opt.is_gradient_checkpointing
    with pytest.raises(UserError, match="--gradient-checkpointing: ctrl models cannot; try a smaller"):
        use_checkpointing(load_model(family("ctrl"), 0.0))


# What the functions do


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_the_plain_models(family, name):
    model = load_model(family(name), 0.0)
    plain, ids = plain_twin(model, name), ids_like(model)
    layers.use_fast_layers(model, CPU)
    expected = loss_and_gradients(plain, ids)
    assert_close(loss_and_gradients(model, ids), expected)
    assert expected[0] == pytest.approx(independent_loss(plain.eval(), ids), abs=1e-5)


def same_dropout(monkeypatch):
    """Let every dropout, of PyTorch and of ours, drop the same elements of tensors of the same size."""

    def drop(values, p=0.5, training=True, inplace=False):
        drawn = torch.rand(values.numel(), generator=torch.Generator().manual_seed(values.numel()))
        return values * (drawn.view(values.shape) >= p) / (1 - p) if training and p else values

    def attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, value))
        scores = query @ key.transpose(-1, -2) * (scale or query.shape[-1] ** -0.5)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if attn_mask is not None:
            is_bool = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -torch.inf) if is_bool else scores + attn_mask
        return drop(scores.softmax(-1), dropout_p) @ value

    monkeypatch.setattr(torch.nn.functional, "dropout", drop)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    monkeypatch.setattr(layers, "fast_dropout", drop)


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - WITHOUT_DROPOUT))
def test_dropout_drops_the_same_places_as_in_the_plain_model(family, name, monkeypatch):
    model = load_model(family(name), RATE)
    plain, ids = plain_twin(model, name), ids_like(model)
    layers.use_fast_layers(model, CPU)
    same_dropout(monkeypatch)
    found = loss_and_gradients(model, ids)
    assert_close(found, loss_and_gradients(plain, ids))
    assert found[0] != pytest.approx(independent_loss(plain.eval(), ids), abs=1e-6), "nothing was dropped"


@pytest.mark.parametrize("name", FAMILIES)
def test_dropout_is_on_above_zero_and_off_at_zero(family, name):
    def losses(rate):
        model = load_model(family(name), rate)
        layers.use_fast_layers(model, CPU)
        ids = ids_like(model)
        return [model.train()(input_ids=ids, labels=ids, use_cache=False).loss.item() for _ in range(2)]

    assert len(set(losses(0.0))) == 1
    if name in WITHOUT_DROPOUT:
        with pytest.raises(UserError, match=rf"^--dropout {RATE}: {name} has no dropout rate; leave out the flag$"):
            losses(RATE)
    else:
        assert len(set(losses(RATE))) == 2


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_with_padding_is_continued_as_its_rows_alone(family, name):
    model = load_model(family(name))
    layers.use_fast_layers(model, CPU)
    rows = [row[:n].tolist() for n, row in zip((5, 11, 16), ids_like(model, 3), strict=True)]
    new = [model.generate(torch.tensor([row]), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
           for row in rows]  # fmt: skip
    if name == "mamba":  # has no mask
        return
    longest = max(map(len, rows))
    batch = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    together = model.generate(batch, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None,
                              pad_token_id=0)  # fmt: skip
    assert [row[-6:].tolist() for row in together] == [row[0, -6:].tolist() for row in new]


# Files of old versions, and what is refused


def rewrite(folder, target, change):
    """Copy a model with other tensors."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    save_file(change(load_file(folder / "model.safetensors")), target / "model.safetensors", {"format": "pt"})
    return target


def old_buffers(prefix, where, dtype=torch.bool, masked=True):
    """Return what the attention of two layers kept in files of old versions; the second layer's is local."""
    mask = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
    local = mask & ~torch.ones(1, 1, 64, 64, dtype=torch.bool).tril(-8)
    buffers = {f"{prefix}{n}.{where}.bias": m.to(dtype) for n, m in enumerate((mask, local))}
    return buffers | {f"{prefix}{n}.{where}.masked_bias": torch.tensor(-1e9) for n in range(2) if masked}


OLD_FILES = {
    "gpt2": lambda old: old | old_buffers("transformer.h.", "attn", torch.float32),
    "gpt2 without prefix": lambda old: {
        name.removeprefix("transformer."): tensor
        for name, tensor in (old | old_buffers("h.", "attn", torch.uint8)).items()
    },
    "gpt2 with the head that is tied": lambda old: old | {"lm_head.weight": old["transformer.wte.weight"].clone()},
    "gpt_neo": lambda old: old | old_buffers("transformer.h.", "attn.attention"),
    "gptj": lambda old: old | old_buffers("transformer.h.", "attn"),
    "gpt_neox": lambda old: old | old_buffers("gpt_neox.layers.", "attention")
    | {f"gpt_neox.layers.{n}.attention.rotary_emb.inv_freq": torch.rand(4) for n in range(2)},
    "llama": lambda old: old | {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.rand(4) for n in range(2)},
}  # fmt: skip


@pytest.mark.parametrize("case", OLD_FILES)
def test_buffers_of_old_versions_are_left_out(family, tmp_path, case):
    folder = family(case.split()[0])
    model = load_model(rewrite(folder, tmp_path / "old", OLD_FILES[case]))
    expected = load_model(folder).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


BIAS = "transformer.h.0.attn.attention.bias"
MORE = {
    "a layer": ("gpt2", {"transformer.h.2.ln_1.weight": torch.ones(32)}),
    "a bias that the family lacks": ("llama", {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}),
    "no mask, but weights": ("gpt_neo", {BIAS: torch.rand(1, 1, 64, 64).tril()}),
    "no mask, since it sees what follows": ("gpt_neo", {BIAS: torch.ones(1, 1, 64, 64)}),
    "no mask, since it sees nothing": ("gpt_neo", {BIAS: torch.zeros(1, 1, 64, 64)}),
    "a gate": ("gpt_neo", {"transformer.h.0.attn.attention.masked_bias": torch.tensor(-3.0)}),
    "norms of the next version": ("qwen2", {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}),
}


@pytest.mark.parametrize("case", MORE)
def test_weights_that_the_model_lacks_are_refused(family, tmp_path, case):
    name, more = MORE[case]
    with pytest.raises(UserError, match=f"has 1 tensors too many, first {next(iter(more))}$"):
        load_model(rewrite(family(name), tmp_path / "more", lambda old: old | more))


@pytest.mark.parametrize(("name", "lost"), [
    ("gpt2", "transformer.h.1.mlp.c_fc.bias"), ("mixtral", "model.norm.weight"),
    ("gpt_neox", "embed_out.weight"), ("mistral", "model.layers.0.self_attn.k_proj.weight"),
])  # fmt: skip
def test_weights_that_the_file_lacks_are_refused(family, tmp_path, name, lost):
    def without(old):
        assert lost in old
        return {key: tensor for key, tensor in old.items() if key != lost}

    with pytest.raises(UserError, match=r"lacks \d tensors, first "):
        load_model(rewrite(family(name), tmp_path / "less", without))


REFUSED = {
    "gemma3": ("a model of more than text; only text models can be used", {"text_config": dict(HEADS)}),
    "llama4": ("a model of more than text; only text models can be used", {}),
    "pegasus": ("an encoder and a decoder, not a causal language model", {}),
    "t5": ("not a causal language model", {}),
    "bert": ("not a causal language model", {}),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_kinds_are_refused_with_their_reason(family, tmp_path, kind):
    reason, fields = REFUSED[kind]
    folder = rewrite(family("llama"), tmp_path / kind, dict)
    (folder / "config.json").write_text(json.dumps({"model_type": kind} | fields))
    with pytest.raises(UserError, match=f"{kind}.*{reason}$"):
        load_model(folder)


def test_a_model_that_sees_the_tokens_that_follow_is_refused(tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model("xlnet", vocab_size=300, d_model=32, n_layer=2, n_head=4, d_inner=48)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "xlnet")
    with pytest.raises(UserError, match=r"is xlnet, which sees the tokens that follow, not a causal language model$"):
        load_model(tmp_path / "xlnet")


# The three scripts


@pytest.fixture(scope="session")
def short_book(tmp_path_factory, book):
    path = tmp_path_factory.mktemp("short") / "book.txt"
    path.write_text(book.read_text(encoding="utf-8")[:6000], encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in EVERY_DAY else pytest.mark.slow) for name in FAMILIES]
)
def test_three_scripts(family, name, script, short_book, tmp_path, monkeypatch):
    """Prepare, train two steps, stop and resume to the bit, write and measure."""
    folder, data = family(name), tmp_path / "data"

    def run(script_name, *flags, code=0):
        ended = script(script_name, *flags)
        assert ended.code == code, ended.err
        return ended

    def train(out, code=0):
        dropout = [] if name in WITHOUT_DROPOUT else ["--dropout", RATE]
        run("finetune_generative", "--data-dir", data, "--output-dir", tmp_path / out, "--max-steps", 2, *dropout,
            "--batch-size", 4, "--learning-rate", "1e-2", "--dtype", "fp32", "--copy-samples", 2, "--sample-tokens", 4,
            "--save-dtype", "bf16", "--save-every", 2, code=code)  # fmt: skip
        return tmp_path / out

    def stopping(*settings, build=optim.build_schedule):
        schedule = build(*settings)
        return lambda step: (step == 0 and signal.raise_signal(signal.SIGTERM)) or schedule(step)

    run("prepare_data", "--input-path", short_book, "--model-name", folder, "--block-size", 32, "--output-dir", data)
    straight = train("straight")
    with monkeypatch.context() as patch:
        replace(optim, "build_schedule", stopping, patch.setattr)
        stopped = train("stopped", code=128 + signal.SIGTERM)
    assert [path.name for path in stopped.glob("checkpoint-*")] == ["checkpoint-1"]
    torch.manual_seed(123)
    train("stopped")
    for file in ("model.safetensors", "optimizer.safetensors"):
        first, second = (load_file(out / "checkpoint-2" / file) for out in (straight, stopped))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), file
    base = load_file(folder / "model.safetensors")
    trained = load_file(straight / "checkpoint-2/model.safetensors")
    assert base.keys() == trained.keys()
    assert not all(torch.equal(trained[key], base[key]) for key in base)

    metrics = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    blocks = open_blocks(data).validation[:]["input_ids"]
    for step, model in ((0, folder), (2, straight / "checkpoint-2")):
        plain = AutoModelForCausalLM.from_pretrained(model).eval()
        loss = next(row["eval/loss"] for row in metrics if row["step"] == step and "eval/loss" in row)
        assert loss == pytest.approx(independent_loss(plain, blocks), abs=1e-4)

    monkeypatch.setattr(generate_text, "MAX_ROUNDS", 1)
    run("generate_text", "--finetuned-model", straight, "--max-new-tokens", 12, "--num-validation-prompts", 3,
        "--control-path", short_book, "--dtype", "fp32")  # fmt: skip
    tokenizer = load_tokenizer(straight)
    start = start_ids(tokenizer)
    assert start == start_ids(load_tokenizer(folder))
    assert len(start) == (FAMILIES[name][1] is not None)
    samples = [json.loads(line) for line in (straight / "samples.jsonl").read_text().splitlines()]
    assert len({sample["prompt"] for sample in samples}) == 5
    for sample in samples:
        assert sample["prompt_ids"][: len(start)] == start
        if sample["prompt"]:
            assert tokenizer.decode(sample["prompt_ids"][len(start) :]) == sample["prompt"]
    report = json.loads((straight / "report.json").read_text())
    assert report["scores"]["book"]["base"]["eval/loss"] == pytest.approx(metrics[0]["eval/loss"], abs=1e-4)
