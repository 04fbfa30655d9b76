"""Refuse a model that is not a causal language model, or whose tensors do not fit its config."""

import json
import math
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from utils.errors import UserError
from utils.storage import read_json


def read_shapes(folder: Path) -> dict[str, list[int]]:
    """Read the names and shapes of a folder's tensors from the headers of its safetensors files."""
    shapes, paths, index = {}, sorted(folder.glob("model*.safetensors")), folder / "model.safetensors.index.json"
    if index.is_file() and folder / "model.safetensors" not in paths:
        listed = read_json(index, "model: ").get("weight_map")
        if not isinstance(listed, dict) or not {*map(str, listed.values())} <= {path.name for path in paths}:
            raise UserError(f"model: {index} names files that are not in {folder}")
    for path in paths:
        if not path.is_file():  # a dangling link
            raise UserError(f"model: {path} is not a file")
        try:
            with safe_open(path, framework="pt") as file:
                shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(f"model: {path} is damaged ({_compare_sizes(path)}): {error}") from None
    if not shapes and list(folder.glob("*.bin")):
        raise UserError(f"model: {folder} has only a pickle file; convert it to safetensors")
    if not shapes:
        raise UserError(f"model: {folder} has no model.safetensors")
    return shapes


def _compare_sizes(path: Path) -> str:
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            tensors = json.loads(file.read(min(length, size)))
        tensors.pop("__metadata__", None)
        return f"{size} bytes, header needs {8 + length + max(entry['data_offsets'][1] for entry in tensors.values())}"
    except Exception:  # a damaged header can be any JSON, or none
        return f"{size} bytes without a readable header"


def refuse_misfit(folder: Path, config, shapes: dict[str, list[int]]) -> None:
    """Compare a config with the tensors of the folder before it is given memory: it could ask for all there is."""
    n_layers = getattr(config, "num_hidden_layers", 1)
    if n_layers > max(len(shapes), 200):  # even layers without memory take time to create
        raise UserError(f"model: {folder}: config.json says {n_layers} layers, the weights have {len(shapes)} tensors")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # each model family fails in its own way
        raise UserError(f"model: {folder}: config.json does not fit: {error}") from error
    lacking = []
    for name, parameter in model.named_parameters():
        # The hub's gpt2 names its tensors without the prefix.
        shape = shapes.get(name, shapes.get(name.removeprefix(f"{model.base_model_prefix}.")))
        if shape is None:
            lacking.append(name)
        elif shape and shape != list(parameter.shape):
            sizes = ("x".join(map(str, size)) for size in (shape, parameter.shape))
            raise UserError(f"model: {folder}: {name} is {', config.json says '.join(sizes)}")
    if lacking and sum(p.numel() for p in model.parameters()) > sum(map(math.prod, shapes.values())):
        raise UserError(f"model: {folder} lacks {len(lacking)} tensors, first {lacking[0]}; "
                        f"config.json says {config.model_type}")  # fmt: skip


def check_causal(config: dict, source: str):
    """Turn the fields of a config.json into a transformers config; refuse all but causal language models."""
    kind = config.get("model_type")
    if "auto_map" in config:
        raise UserError(f"model: {source} wants to run its own code; refused")
    is_encoder = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.get("is_decoder")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or is_encoder or config.get("is_encoder_decoder"):
        raise UserError(f"model: {source} is {kind}, not a causal language model")
    for key in ("n_layer", "n_embd", "n_head", "n_positions", "vocab_size", "num_hidden_layers", "hidden_size",
                "num_attention_heads", "max_position_embeddings"):  # fmt: skip
        value = config.get(key, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"model: {source}: config.json: {key} must be a whole number from 1, not {value!r}")
    if config.get("n_embd", 0) % config.get("n_head", 1):
        raise UserError(f"model: {source}: n_embd {config['n_embd']} is not divisible by n_head {config['n_head']}")
    # These would change the form of the model's output, from which the loss is read.
    left_out = ("model_type", "return_dict", "use_return_dict", "output_attentions", "output_hidden_states")
    fields = {key: value for key, value in config.items() if key not in left_out}
    try:
        config = AutoConfig.for_model(kind, **fields)
        is_text = config.get_text_config() is config
    except Exception as error:  # each model family validates in its own way
        raise UserError(f"model: {source}: config.json does not fit: {error}") from error
    if config.is_encoder_decoder:
        raise UserError(f"model: {source} is {kind}, an encoder and a decoder, not a causal language model")
    if not is_text:
        raise UserError(f"model: {source} is {kind}, a model of more than text; only text models can be used")
    if hasattr(config, "output_router_logits"):  # would add a loss of the router's to that of the text
        config.output_router_logits = False
    return config


def find_learned(folder: Path, names: Iterable[str]) -> list[str]:
    """Return, sorted, which of a folder's tensors are weights.

    The others are constants of old checkpoints: causal masks, and the large negative number that masks.
    """
    learned = set(names)
    for path in folder.glob("model*.safetensors") if learned else ():
        with safe_open(path, framework="pt") as file:
            for name in learned.intersection(file.keys()):
                tensor = file.get_tensor(name)
                if is_mask(tensor) or (tensor.numel() == 1 and tensor.item() < -1000):
                    learned.remove(name)
    return sorted(learned)


def is_mask(tensor: torch.Tensor) -> bool:
    """Say whether each row i of a (..., T, T) tensor holds 1 at i, 0 or 1 before it and 0 after it."""
    if tensor.ndim < 2 or tensor.shape[-1] != tensor.shape[-2]:
        return False
    tensor = tensor.float()
    is_binary = torch.equal(tensor, tensor.bool().float())
    return is_binary and not tensor.triu(1).any() and bool(tensor.diagonal(dim1=-2, dim2=-1).all())


@torch.no_grad()
def refuse_noncausal(model, source: str) -> None:
    """Refuse a model in eval mode whose output changes with the tokens that follow: its loss would mean nothing."""
    last = model.get_input_embeddings().weight.shape[0] - 1
    try:
        first, second = model(input_ids=torch.tensor([[0, 0], [0, last]]), use_cache=False).logits[:, 0].float()
    except Exception as error:  # each model family fails in its own way
        raise UserError(f"model: {source} cannot read two tokens: {error}") from error
    if not torch.allclose(first, second, rtol=1e-3, atol=1e-3 * first.abs().max().item()):
        kind = model.config.model_type
        raise UserError(f"model: {source} is {kind}, which sees the tokens that follow, not a causal language model")


def refuse_without_dropout(model, rate: float | None) -> None:
    """Refuse a dropout rate above 0 for a model whose forward pass in training mode draws no random number."""
    if not rate:
        return
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        before = torch.get_rng_state()
        model.train()(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False)
        if torch.equal(before, torch.get_rng_state()):
            raise UserError(f"--dropout {rate:g}: {model.config.model_type} has no dropout rate; leave out the flag")
