"""Check and load a causal language model, or create a new one; choose device and dtype."""

import contextlib
import json
import math
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from utils.data.tokenizer import load_tokenizer
from utils.errors import EXIT_DIVERGED, UserError
from utils.model.hub import position_limit, read_config
from utils.storage import MANIFEST, read_json, verify_folder

# The scripts print what a user needs: the settings, and an error when tensors are missing.
logging.set_verbosity_error()
logging.disable_progress_bar()

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_model(folder: Path):
    """Load a causal language model in float32, in eval mode, on the CPU.

    Raises:
        UserError: missing or damaged files, missing or extra tensors, NaN or infinity, another kind of model.
    """
    if not folder.is_dir():
        raise UserError(f"model: {folder}: no such directory")
    config = check_causal(read_config(folder / "config.json"), str(folder))
    refuse_misfit(folder, config, read_shapes(folder))
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=torch.float32, output_loading_info=True,
            use_safetensors=True, local_files_only=True, trust_remote_code=False)  # fmt: skip
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"model: {folder} cannot be loaded: {error}") from error
    missing, extra = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing:
        raise UserError(f"model: {folder} lacks {len(missing)} tensors, first {missing[0]}")
    if extra:
        raise UserError(f"model: {folder} has {len(extra)} tensors too many, first {extra[0]}")
    bad = first_not_finite(model)
    if bad:
        raise UserError(f"model: {folder}: {bad} has a value that is not a number")
    # Only the flags decide how to decode: a generation_config.json beside the model would add to them.
    model.generation_config = GenerationConfig.from_model_config(model.config)
    return model.eval()


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
    if lacking and count_parameters(model) > sum(map(math.prod, shapes.values())):
        raise UserError(f"model: {folder} lacks {len(lacking)} tensors, first {lacking[0]}; "
                        f"config.json says {config.model_type}")  # fmt: skip


def check_causal(config: dict, source: str):
    """Turn the fields of a config.json into a transformers config; refuse all but causal language models."""
    kind = config.get("model_type")
    if "auto_map" in config:
        raise UserError(f"model: {source} wants to run its own code; refused")
    encoder = kind in ("bert", "roberta", "xlm-roberta", "electra", "camembert")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or encoder or config.get("is_encoder_decoder"):
        raise UserError(f"model: {source} is {kind}, not a causal language model")
    for key in ("n_layer", "n_embd", "n_head", "n_positions", "vocab_size", "num_hidden_layers"):
        value = config.get(key, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"model: {source}: config.json: {key} must be a whole number from 1, not {value!r}")
    if config.get("n_embd", 0) % config.get("n_head", 1):
        raise UserError(f"model: {source}: n_embd {config['n_embd']} is not divisible by n_head {config['n_head']}")
    # These would change the form of the model's output, from which the loss is read.
    left_out = ("model_type", "return_dict", "use_return_dict", "output_attentions", "output_hidden_states")
    fields = {key: value for key, value in config.items() if key not in left_out}
    try:
        return AutoConfig.for_model(kind, **fields)
    except Exception as error:  # each model family validates in its own way
        raise UserError(f"model: {source}: config.json does not fit: {error}") from error


def new_model(config_path: Path, tokenizer, seed: int):
    """Create a model with random weights from a JSON file of config fields and the size of a tokenizer."""
    fields = read_config(config_path, "--from-scratch") | {"vocab_size": len(tokenizer)}
    fields |= dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eos_token_id)
    config = check_causal(fields, str(config_path))
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def check_fit(model, data) -> None:
    """Refuse blocks longer than the model's context, or with ids outside its vocabulary."""
    limit, rows = position_limit(model.config.to_dict()), model.get_input_embeddings().weight.shape[0]
    if limit and data.block_size > limit:
        raise UserError(f"data has blocks of {data.block_size} tokens; the model takes {limit}")
    for token_id in data.id_range():
        if not 0 <= token_id < rows:
            raise UserError(f"data has token id {token_id}; the model knows 0 to {rows - 1}")


def set_dropout(model, rate: float) -> None:
    """Set every dropout rate of a model, in its modules and in its config."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = rate
        for name in ("attention_dropout", "attn_dropout_rate"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, rate)
    for key, value in model.config.to_dict().items():
        if ("dropout" in key or key.endswith("_pdrop")) and isinstance(value, float):
            setattr(model.config, key, rate)


def is_finite(tensor: torch.Tensor) -> bool:
    """Say whether no value is NaN or infinite: minimum and maximum tell, in one pass that allocates nothing."""
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


def count_parameters(model) -> int:
    """Count parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())


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


def load_pair(folder: Path, verified: bool = False):
    """Load a folder's model and tokenizer, and check that they fit each other and, unless `verified`, the manifest."""
    problem = None if verified or not (folder / MANIFEST).is_file() else verify_folder(folder)
    if problem:
        raise UserError(f"model: {problem}")
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(f"tokenizer has {len(tokenizer)} ids, the model {rows}")
    return model, tokenizer
