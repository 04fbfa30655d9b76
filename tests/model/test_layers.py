"""The faster layers compute what those they replace compute, and draw what they should."""

import copy
from pathlib import Path

import pytest
import torch
from scorer import independent_loss
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MistralConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from utils.model import layers
from utils.model.loading import load_pair

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def pair():
    """A small GPT-2 without dropout and its faster twin, in training mode."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
                        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
    plain = GPT2LMHeadModel(config).train()
    fast = copy.deepcopy(plain)
    layers.use_fast_layers(fast, CPU)
    return plain, fast


def test_loss_and_gradients_are_the_plain_models(pair):
    input_ids = torch.randint(0, 300, (3, 64))  # more rows than are worked on at once
    assert input_ids.numel() > layers.CPU_ROWS
    plain, fast = (model(input_ids=input_ids, labels=input_ids).loss for model in pair)
    assert fast.item() == pytest.approx(plain.item(), abs=1e-6)
    assert fast.item() == pytest.approx(independent_loss(pair[0], input_ids), abs=1e-5)
    (plain * 0.25).backward()
    (fast * 0.25).backward()
    for expected, found in zip(pair[0].parameters(), pair[1].parameters(), strict=True):
        assert torch.allclose(found.grad, expected.grad, rtol=1e-4, atol=1e-7)


def test_loss_in_bf16_keeps_its_sum_in_float32(pair):
    input_ids = torch.randint(0, 300, (3, 64))
    with torch.autocast("cpu", torch.bfloat16):
        plain, fast = (model(input_ids=input_ids, labels=input_ids).loss for model in pair)
    assert fast.dtype == torch.float32
    assert fast.item() == pytest.approx(plain.item(), abs=1e-3)


def attend_in_bf16(module, query, key, value, attention_mask, **options):
    """The control: causal attention whose scores are rounded to bf16 before their softmax."""
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    assert scores.dtype == torch.bfloat16
    future = torch.full(scores.shape[-2:], -torch.inf, dtype=scores.dtype).triu(1)
    return ((scores + future).softmax(-1) @ value).transpose(1, 2), None


AttentionInterface.register("in_bf16", attend_in_bf16)
AttentionMaskInterface.register("in_bf16", sdpa_mask)


def test_gradients_in_bf16_are_as_near_to_float32_as_the_plain_models():
    """With a trained model, whose attention scores are large."""
    plain, tokenizer = load_pair(ROOT / "results/base_model")
    text = (ROOT / "results/data/book.txt").read_text(encoding="utf-8")
    input_ids = torch.tensor(tokenizer(text[:8000])["input_ids"][: 8 * 128]).view(8, 128)

    def gradients(model, dtype):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            model.train()(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    fast, rounded = copy.deepcopy(plain), copy.deepcopy(plain)
    exact = gradients(copy.deepcopy(plain), torch.float32)
    layers.use_fast_layers(fast, CPU)
    rounded.set_attn_implementation("in_bf16")
    errors = [(gradients(each, torch.bfloat16) - exact).norm() / exact.norm() for each in (plain, fast, rounded)]
    assert errors[1] < errors[0] < 0.2
    assert errors[2] > 0.5


def test_no_gradient_is_made_where_none_is_wanted(pair, monkeypatch):
    monkeypatch.setattr(torch, "empty_like", None)
    with torch.no_grad():
        assert pair[1](input_ids=torch.ones(1, 8, dtype=torch.long), labels=torch.ones(1, 8, dtype=torch.long)).loss > 0


def test_weights_config_and_mode_stay(pair):
    plain, fast = pair
    assert plain.state_dict().keys() == fast.state_dict().keys()
    assert plain.config.to_dict() == fast.config.to_dict()
    asleep = copy.deepcopy(plain).eval()
    layers.use_fast_layers(asleep, CPU)
    assert not any(module.training for module in asleep.modules())
    replaced = {type(module) for module in fast.modules()}
    assert {torch.nn.GELU, layers.FastDropout} <= replaced


def test_a_gpu_and_a_compiled_model_keep_their_dropout(pair):
    for device, compiled in ((torch.device("cuda"), False), (CPU, True)):
        model = copy.deepcopy(pair[0])
        layers.use_fast_layers(model, device, compiled)
        assert not any(isinstance(module, layers.FastDropout) for module in model.modules())


def test_labels_below_zero_are_no_targets():
    torch.manual_seed(3)
    logits, labels = torch.randn(2, 8, 50, requires_grad=True), torch.randint(0, 50, (2, 8))
    labels[0, 3:] = -100
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 50), labels[:, 1:].reshape(-1))
    found = layers.next_token_loss(logits, labels, 50)
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)
    gradients = (torch.autograd.grad(loss, logits)[0] for loss in (found, expected))
    assert torch.allclose(*gradients, atol=1e-7)


def test_a_second_backward_pass_is_refused():
    """The gradient is scaled in place: a second pass over it would scale it twice."""
    logits = torch.randn(1, 4, 9, requires_grad=True)
    loss = layers.next_token_loss(logits, torch.randint(0, 9, (1, 4)), 9) * 0.5
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("rate", [0.999999, 1 - 2**-17])
def test_the_highest_rates_drop_all_but_a_few(rate):
    torch.manual_seed(1)
    out = layers.fast_dropout(torch.ones(1000, 1000), rate)
    assert out.isfinite().all()
    assert (out > 0).sum() < 100  # of a million: one in 2 ** 16 is kept


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_drops_at_its_rate_and_keeps_the_mean(rate):
    torch.manual_seed(1)
    values = torch.ones(999, 1001)  # not a whole number of draws
    out = layers.fast_dropout(values, rate)
    n, dropped = values.numel(), (out == 0).sum().item()
    assert abs(dropped - n * rate) < 5 * (n * rate * (1 - rate)) ** 0.5
    assert out[out > 0].unique().item() == pytest.approx(1 / (1 - rate), rel=1e-4)
    # Elements that share a draw are as independent as any others.
    flat = (out == 0).flatten().float()
    for lag in (1, 2, 3, 4):
        both = (flat[lag:] * flat[:-lag]).mean().item()
        assert both == pytest.approx(rate**2, abs=5 * rate / n**0.5)


def test_a_rate_that_16_bits_cannot_hold_keeps_its_share_and_its_scale():
    torch.manual_seed(2)
    kept = sum(layers.fast_dropout(torch.ones(1000, 1000), 0.999999).unique(return_counts=True)[1][1:].sum().item()
               for _ in range(20))  # fmt: skip
    assert abs(kept - 20) < 5 * 20**0.5
    out = layers.fast_dropout(torch.ones(1000, 10_000), 0.999999)
    assert out.max().item() == pytest.approx(1e6, rel=1e-3)
    assert out.isfinite().all()
    assert layers.fast_dropout(torch.ones(10), 1 - 2**-16).isfinite().all()


def test_dropout_follows_the_seed_and_is_off_in_evaluation():
    layer, values = layers.FastDropout(0.3), torch.randn(50, 7)
    torch.manual_seed(5)
    first = layer(values)
    assert not torch.equal(first, layer(values))
    torch.manual_seed(5)
    assert torch.equal(first, layer(values))
    assert layer.eval()(values) is values
    assert layers.fast_dropout(values, 0.0) is values


@pytest.mark.parametrize("dropout", [0.25, 0.0])
@pytest.mark.parametrize(("scaling", "width"), [(None, 8), (0.3, 8), (None, 5)])
def test_attention_is_sdpas_but_for_what_is_dropped(scaling, width, dropout, monkeypatch):
    torch.manual_seed(2)
    query, key, value = (
        torch.randn(2, 3, 10, size).transpose(1, 2).contiguous().transpose(1, 2) for size in (8, 8, width)
    )
    module = torch.nn.Module()
    module.is_causal = True
    expected, _ = sdpa_attention_forward(module, query, key, value, None, scaling=scaling)
    drops = []
    monkeypatch.setattr(layers, "fast_dropout", lambda weights, rate: drops.append(rate) or weights)
    found, _ = layers.fast_attention(module, query, key, value, None, dropout=dropout, scaling=scaling)
    assert drops == [dropout]
    assert torch.allclose(found, expected, atol=1e-6)
    assert found.shape == expected.shape == (2, 10, 3, width)


def test_attention_that_sdpa_computes_well_or_alone_is_left_to_it(monkeypatch):
    monkeypatch.setattr(layers, "fast_dropout", None)
    monkeypatch.setattr(layers, "SHORT", 4)
    module = torch.nn.Module()
    module.is_causal = True
    query = torch.randn(1, 2, 5, 4)
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    bias = {"position_bias": torch.zeros(1, 2, 5, 5)}
    for attention_mask, dropout, options in (
        (mask, 0.5, {}), (None, 0.0, {}), (None, 0.5, bias), (None, 0.5, {"is_causal": False}),
    ):  # fmt: skip
        found, _ = layers.fast_attention(module, query, query, query, attention_mask, dropout=dropout, **options)
        assert found.shape == (1, 5, 2, 4)
    module.is_causal = False
    with pytest.raises(TypeError):  # what is called says more than the layer
        layers.fast_attention(module, query, query, query, None, dropout=0.5, is_causal=True)
    module.is_causal = True
    short = query[:, :, :4]
    layers.fast_attention(module.eval(), short, short, short, None)
    with pytest.raises(TypeError):
        layers.fast_attention(module.train(), short, short, short, None)


def test_a_model_in_training_attends_with_our_dropout(pair, monkeypatch):
    model = copy.deepcopy(pair[0])
    layers.use_fast_layers(model, CPU)
    for block in model.transformer.h:
        block.attn.attn_dropout.p = block.attn.config.attn_pdrop = 0.5
    rates = []
    drop = layers.fast_dropout
    monkeypatch.setattr(
        layers, "fast_dropout", lambda values, rate: rates.append((values.shape[-2:], rate)) or drop(values, rate)
    )
    input_ids = torch.ones(1, 8, dtype=torch.long)
    model(input_ids=input_ids, labels=input_ids)
    assert rates.count((torch.Size([8, 8]), 0.5)) == 2
    rates.clear()
    pair[0].transformer.h[0].attn.attn_dropout.p = 0.5
    pair[0](input_ids=input_ids, labels=input_ids)
    assert not rates, "another model of this process has its own dropout"
    model.eval()
    model(input_ids=input_ids, labels=input_ids)
    assert not rates


def test_only_this_model_has_the_attention_and_no_file_names_it(pair, tmp_path):
    plain, fast = pair
    assert (plain.config._attn_implementation, fast.config._attn_implementation) == ("sdpa", layers.FAST_ATTENTION)
    assert AttentionInterface()["sdpa"] is sdpa_attention_forward
    fast.save_pretrained(tmp_path)
    assert layers.FAST_ATTENTION not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_a_model_without_sdpa_keeps_its_attention(pair):
    pair[0].set_attn_implementation("eager")
    layers.use_fast_layers(pair[0], CPU)
    assert pair[0].config._attn_implementation == "eager"


@pytest.mark.parametrize("family", ["gpt2", "llama", "grouped llama"])
def test_padded_batches_and_generated_ids_are_the_plain_models(pair, family):
    """The masks that a model makes depend on the name of its attention."""
    plain, fast = pair
    if family != "gpt2":
        config = LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                             num_attention_heads=4, num_key_value_heads=2 if "grouped" in family else 4)  # fmt: skip
        plain = AutoModelForCausalLM.from_config(config).train()
        fast = copy.deepcopy(plain)
        layers.use_fast_layers(fast, CPU)
    assert fast.config._attn_implementation == layers.FAST_ATTENTION
    input_ids, mask = torch.randint(1, 300, (3, 20)), torch.ones(3, 20, dtype=torch.long)
    mask[0, :7] = mask[1, :2] = 0
    logits = [model(input_ids=input_ids, attention_mask=mask).logits for model in (plain, fast)]
    assert torch.allclose(*logits, atol=1e-5)
    new = [
        model.eval().generate(input_ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
        for model in (plain, fast)
    ]
    assert torch.equal(*new)


@pytest.mark.parametrize("width", [300, 320])
def test_the_fused_loss_is_that_in_rows(width, monkeypatch):
    """Also for logits that are wider than the vocabulary, whose last columns neither count nor get a gradient."""
    torch.manual_seed(4)
    logits, labels = torch.randn(3, 40, width), torch.randint(0, 300, (3, 40))
    labels[1, 5:] = -100
    losses, gradients = [], []
    for compute in (None, layers.compute_fused):
        leaf = logits.clone().requires_grad_()
        losses.append(layers.next_token_loss(leaf, labels, 300, compute))
        losses[-1].backward()
        gradients.append(leaf.grad)
        with torch.no_grad():
            assert torch.equal(layers.next_token_loss(leaf, labels, 300, compute), losses[-1])
    plain = logits[..., :300].clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(plain[:, :-1].reshape(-1, 300), labels[:, 1:].reshape(-1))
    expected.backward()
    for loss, gradient in zip(losses, gradients, strict=True):
        assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
        assert torch.allclose(gradient[..., :300], plain.grad, atol=1e-8)
        assert not gradient[..., 300:].any()


def test_a_gpus_output_layer_is_wider_in_training_alone(pair):
    plain, wide = pair[0], copy.deepcopy(pair[0])
    layers.use_fast_layers(wide, torch.device("cuda"))
    input_ids = torch.randint(0, 300, (3, 64))
    results = [model(input_ids=input_ids, labels=input_ids) for model in (plain, wide)]
    assert results[1].logits.shape[-1] == 320
    assert torch.allclose(results[1].logits[..., :300], results[0].logits, atol=1e-5)
    for result in results:
        result.loss.backward()
    assert results[1].loss.item() == pytest.approx(results[0].loss.item(), abs=1e-6)
    for expected, found in zip(plain.parameters(), wide.parameters(), strict=True):
        assert torch.allclose(found.grad, expected.grad, rtol=1e-4, atol=1e-7)
    with torch.no_grad():
        assert wide.eval()(input_ids=input_ids).logits.shape[-1] == 300


def test_a_gpus_attention_has_a_mask_where_there_is_padding(pair):
    plain, fast = pair[0].eval(), copy.deepcopy(pair[0]).eval()
    layers.use_fast_layers(fast, torch.device("cuda"))
    input_ids = torch.randint(0, 300, (2, 20))
    mask = torch.ones_like(input_ids)
    mask[0, :7] = 0
    for options in ({"use_cache": False}, {"attention_mask": mask}, {"attention_mask": mask, "use_cache": False}, {}):
        expected, found = (model(input_ids=input_ids, **options).logits for model in (plain, fast))
        assert torch.allclose(found, expected, atol=1e-5), options
    assert not torch.allclose(plain(input_ids=input_ids).logits, plain(input_ids=input_ids, attention_mask=mask).logits)


def test_a_window_of_attention_is_left_alone():
    config = MistralConfig(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                           num_attention_heads=2, num_key_value_heads=1, sliding_window=4, bos_token_id=0)  # fmt: skip
    plain = AutoModelForCausalLM.from_config(config).eval()
    fast = copy.deepcopy(plain)
    layers.use_fast_layers(fast, torch.device("cuda"))
    input_ids = torch.randint(0, 300, (2, 20))
    expected, found = (model(input_ids=input_ids, use_cache=False).logits for model in (plain, fast))
    assert torch.allclose(found, expected, atol=1e-5)
