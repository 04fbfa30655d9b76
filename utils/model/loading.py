"""Load a causal language model or create a new one; set its dropout; choose device and dtype."""

import contextlib
import os
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig
from transformers.utils import logging

from utils.data.tokenizer import load_tokenizer
from utils.errors import EXIT_DIVERGED, UserError
from utils.model.checks import (
    check_causal,
    find_learned,
    read_shapes,
    refuse_misfit,
    refuse_noncausal,
    refuse_without_dropout,
)
from utils.model.hub import position_limit, read_config
from utils.storage import MANIFEST, verify_folder

# The scripts print what a user needs: the settings, and an error when tensors are missing.
logging.set_verbosity_error()
logging.disable_progress_bar()

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_model(folder: Path, dropout: float | None = None):
    """Load a causal language model in float32, in eval mode, on the CPU.

    Args:
        dropout: the rate of all its dropout; None for the rates of its config.
    Raises:
        UserError: missing or damaged files, missing or extra tensors, NaN or infinity, another kind of model.
    """
    if not folder.is_dir():
        raise UserError(f"model: {folder}: no such directory")
    if (folder / "adapter_config.json").is_file():  # with peft there, transformers would add it, from a pickle too
        raise UserError(f"model: {folder} has an adapter, expected a whole model; merge it first")
    config = check_causal(read_config(folder / "config.json"), str(folder))
    if dropout is not None:
        set_dropout(config, dropout)
    refuse_misfit(folder, config, read_shapes(folder))
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=torch.float32, output_loading_info=True,
            use_safetensors=True, local_files_only=True, trust_remote_code=False)  # fmt: skip
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"model: {folder} cannot be loaded: {error}") from error
    missing, extra = sorted(info["missing_keys"]), find_learned(folder, info["unexpected_keys"])
    if missing:
        raise UserError(f"model: {folder} lacks {len(missing)} tensors, first {missing[0]}")
    if extra:
        raise UserError(f"model: {folder} has {len(extra)} tensors too many, first {extra[0]}")
    bad = first_not_finite(model)
    if bad:
        raise UserError(f"model: {folder}: {bad} has a value that is not a number")
    # Only the flags decide how to decode: a generation_config.json beside the model would add to them.
    model.generation_config = GenerationConfig.from_model_config(model.config)
    refuse_noncausal(model, str(folder))
    refuse_without_dropout(model, dropout)
    return model.eval()


def new_model(config_path: Path, tokenizer, seed: int, dropout: float | None = None):
    """Create a model with random weights from a JSON file of config fields and the size of a tokenizer."""
    fields = read_config(config_path, "--from-scratch") | {"vocab_size": len(tokenizer)}
    fields |= dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eos_token_id) | {"pad_token_id": None}
    config = check_causal(fields, str(config_path))
    if dropout is not None:
        set_dropout(config, dropout)
    torch.manual_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # each model family fails in its own way
        raise UserError(f"--from-scratch: {config_path} does not fit: {error}") from error
    refuse_noncausal(model.eval(), str(config_path))
    refuse_without_dropout(model, dropout)
    return model


def check_fit(model, data) -> None:
    """Refuse blocks longer than the model's context, or with ids outside its vocabulary."""
    limit, rows = position_limit(model.config.to_dict()), model.get_input_embeddings().weight.shape[0]
    if limit and data.block_size > limit:
        raise UserError(f"data has blocks of {data.block_size} tokens; the model takes {limit}")
    for token_id in data.id_range():
        if not 0 <= token_id < rows:
            raise UserError(f"data has token id {token_id}; the model knows 0 to {rows - 1}")


def set_dropout(config: PreTrainedConfig, rate: float) -> None:
    """Set every dropout rate of a config, before the model is built: many families copy the rates into their layers."""
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            set_dropout(value, rate)
        elif ("dropout" in name or name.endswith("pdrop")) and isinstance(value, int | float) and value != rate:
            with contextlib.suppress(StrictDataclassError):  # MPT allows whole numbers only
                setattr(config, name, rate)


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a tensor that this process holds, where several share it; else all of it."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def is_finite(tensor: torch.Tensor) -> bool:
    """Say whether no value is NaN or infinite: minimum and maximum tell, in one pass that allocates nothing."""
    tensor = own_part(tensor)
    return not tensor.numel() or all(value.isfinite() for value in tensor.aminmax())


def first_not_finite(model, optimizer=None) -> str | None:
    """Return the name of the first parameter that holds NaN or infinity, itself or in its optimizer state."""
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {}) if optimizer else {}
        if not all(map(is_finite, (parameter, *state.values()))):
            return name
    return None


def refuse_not_finite(model, optimizer=None) -> None:
    """Raise UserError (exit status 4) before a value that is not finite is saved and spoils every later run."""
    name = first_not_finite(model, optimizer)
    if name:
        raise UserError(f"{name} has a value that is not a finite number", EXIT_DIVERGED)


def use_checkpointing(model) -> None:
    """Have a model compute its activations twice, instead of keeping them; UserError if its kind cannot."""
    # The name of newer releases of transformers, where the other one warns.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    try:
        enable({"use_reentrant": False})
    except ValueError:
        kind = model.config.model_type
        raise UserError(f"--gradient-checkpointing: {kind} models cannot; try a smaller --micro-batch-size") from None


def count_parameters(model, trained: bool = False) -> int:
    """Count parameters, tied ones once: all, or those that are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


def pick_device(name: str) -> torch.device:
    """Turn --device into a device; 'auto' prefers cuda, then mps, then cpu."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {name}: this PyTorch has no CUDA")
    if name.startswith("cuda:") and int(name[5:]) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} GPU")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: this PyTorch has no MPS")
    return torch.device(name)


def set_deterministic(wanted: bool) -> None:
    """Choose deterministic GPU kernels; those of a CPU always are."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def pick_dtype(name: str, device: torch.device) -> str:
    """Turn --dtype into 'fp32' or 'bf16'; 'auto' avoids emulated bf16, which is slower than fp32."""
    native = has_native_bf16(device)
    if name == "auto":
        return "bf16" if native else "fp32"
    if name == "bf16" and device.type == "cuda" and not native:
        raise UserError(f"--dtype {name}: not supported by this device")
    return name


def has_native_bf16(device: torch.device) -> bool:
    """Say whether a device multiplies bf16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and hasattr(torch.cpu, "_is_avx512_bf16_supported"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def autocast(device: torch.device, dtype: str):
    """Return a context in which the forward pass computes in dtype."""
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bf16" else contextlib.nullcontext()


def load_pair(folder: Path, verified: bool = False, dropout: float | None = None):
    """Load a folder's model and tokenizer, and check that they fit each other and, unless `verified`, the manifest."""
    problem = None if verified or not (folder / MANIFEST).is_file() else verify_folder(folder)
    if problem:
        raise UserError(f"model: {problem}")
    model, tokenizer = load_model(folder, dropout), load_tokenizer(folder)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(f"tokenizer has {len(tokenizer)} ids, the model {rows}")
    return model, tokenizer
