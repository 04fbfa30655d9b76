"""LoRA: freeze a model and train two small matrices A and B beside each linear layer, whose weight becomes W + s B A.

peft adds the layers and the model keeps its class. The files are peft's: adapter_model.safetensors and
adapter_config.json. Source: Hu et al. 2021, arXiv 2106.09685.
"""

import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from utils.errors import UserError

ADAPTER = "default"  # peft's name of a model's only adapter
WEIGHTS = "adapter_model.safetensors"


def add_adapter(model, rank: int, alpha: int, seed: int, base: str, checkpoint: Path | None = None) -> None:
    """Freeze a model and add an adapter to all its linear layers but the output layer; the output stays as it is.

    Args:
        rank: rows of A and columns of B.
        alpha: s is alpha / rank.
        base: name of the model, for adapter_config.json.
        checkpoint: folder of the adapter's weights; by default A is random and B is zero.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model  # an optional package
    except ImportError:
        raise UserError("--lora-rank needs the package peft; install it: python -m pip install peft") from None
    is_transposed = any(isinstance(module, Conv1D) for module in model.modules())  # GPT-2 keeps W as (in, out)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", fan_in_fan_out=is_transposed,
                        task_type="CAUSAL_LM", base_model_name_or_path=base)  # fmt: skip
    torch.manual_seed(seed)
    try:
        with warnings.catch_warnings(action="ignore"):
            inject_adapter_in_model(config, model)
    except ValueError:  # no linear layer, or one whose weight the model reads without the layer
        refused = True
    else:  # peft also adapts the experts of some models, which are no layers
        adapted = [module.base_layer for module in model.modules() if hasattr(module, "lora_A")]
        refused = not all(isinstance(layer, Conv1D | torch.nn.Linear) for layer in adapted)
    if refused:
        kind = model.config.model_type
        raise UserError(f"--lora-rank: {kind} has not the linear layers that peft can adapt; leave out the flag")
    # A set's order differs between processes, and so would the file.
    config.target_modules, config.inference_mode = sorted(config.target_modules), True
    if checkpoint:
        _load_adapter(model, checkpoint)


def has_adapter(model) -> bool:
    """Say whether a model has an adapter."""
    return hasattr(model, "peft_config")


def save_adapter(model, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Write a model's adapter as peft reads it; `tensors` are its whole weights by their names in the model."""
    model.peft_config[ADAPTER].save_pretrained(folder)
    save_file({_saved_name(name): tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)


def _load_adapter(model, folder: Path) -> None:
    path = folder / WEIGHTS
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    targets = {_saved_name(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    shapes, expected = ({name: tuple(t.shape) for name, t in part.items()} for part in (tensors, targets))
    for name in sorted(shapes.keys() | expected.keys()):
        if shapes.get(name) != expected.get(name):
            raise UserError(f"{path}: {name} is {shapes.get(name, 'missing')}, expected {expected.get(name)}")
        targets[name].data.copy_(tensors[name])


def _saved_name(name: str) -> str:
    return f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}"


def merge_adapter(model, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of a model without adapter that computes the same.

    Args:
        model: gives the places of its adapter; its own tensors are not read.
        tensors: whole float32 weights by their names in the model; they stay as they are.
    """
    merged = {name.replace(".base_layer.", "."): each for name, each in tensors.items() if ".lora_" not in name}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            a, b = (tensors[f"{name}.lora_{side}.{ADAPTER}.weight"] for side in "AB")
            change = module.scaling[ADAPTER] * (b @ a)
            merged[f"{name}.weight"] = merged[f"{name}.weight"] + (change.T if module.fan_in_fan_out else change)
    return merged
