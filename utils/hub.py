"""Find a model's folder: a local one, the Hugging Face cache, then the hub.

Owns the only network access of the project. Everything after works on a local folder.
"""

import os
import subprocess
import sys
from pathlib import Path

from utils.cli import EXIT_MACHINE, UserError, warn
from utils.files import read_json

EMBEDDED_BASE = "results/base_model"
FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]
ANSWER_SECONDS = 4
NOT_THERE = 4
# Run in a child: a name lookup or a silent server can block for minutes, and only a process can be ended.
ASK = f"""
import sys, urllib.error, urllib.request
try:
    urllib.request.urlopen(urllib.request.Request(sys.argv[1], method="HEAD"))
except urllib.error.HTTPError as error:
    sys.exit({NOT_THERE} if error.code in (401, 403, 404) else 1)
except OSError:
    sys.exit(1)
"""
DOWNLOAD = """
import sys
from huggingface_hub import snapshot_download
snapshot_download(sys.argv[1], allow_patterns=sys.argv[2:])
"""


def locate_model(name: str, what: str = "model") -> Path:
    """Return the local folder of a model given by name or folder, downloading it if need be.

    Args:
        name: a folder, or a name on the Hugging Face hub like 'gpt2'.
        what: 'model' or 'tokenizer', for messages.
    Raises:
        UserError: no such folder; not in the cache and the hub cannot be reached (within 5 s).
    """
    folder = Path(name)
    if folder.is_dir():
        if name in ("gpt2", "distilgpt2"):
            warn(f"using ./{name}, a local directory, not the hub's {name}")
        return folder
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") != (1 if "/" in name else 0):
        kind = "is a file, expected a directory" if folder.exists() else "no such directory"
        raise UserError(f"{what}: {name}: {kind}")
    if folder.parent != Path() and folder.parent.is_dir():
        raise UserError(f"{what}: {name}: no such directory")  # results/x is a mistyped folder, not a name
    return _from_cache(name, what) or _from_hub(name, what)


def _from_cache(name: str, what: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=FILES, local_files_only=True))
    except HFValidationError:
        raise UserError(f"{what}: {name!r} is neither a folder nor a name on the hub") from None
    except OSError:  # huggingface_hub's "not in the cache" is one
        return None


def _from_hub(name: str, what: str) -> Path:
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    answer = _ask(f"{endpoint}/{name}/resolve/main/config.json")
    if answer == NOT_THERE:
        raise UserError(f"{what} {name!r} does not exist on the hub, or is not open to you")
    if answer == 0:
        print(f"downloading {name} from {endpoint}", flush=True)
        if subprocess.run([sys.executable, "-c", DOWNLOAD, name, *FILES], check=False).returncode == 0:
            found = _from_cache(name, what)
            if found:
                return found
    why = {0: "the download failed", 1: "the network is unreachable"}.get(answer, answer)
    advice = f"download it elsewhere and give its folder, or use the embedded --model-name {EMBEDDED_BASE}"
    raise UserError(f"{what} {name}: not in the cache and {why}; {advice}", EXIT_MACHINE)


def _ask(url: str) -> int | str:
    """Return 0 when the hub has a file, NOT_THERE, 1 when it cannot be reached, or another reason."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set"
    command = [sys.executable, "-c", ASK, url]
    try:
        return subprocess.run(command, timeout=ANSWER_SECONDS, capture_output=True, check=False).returncode
    except subprocess.TimeoutExpired:
        return f"no answer in {ANSWER_SECONDS} s"


def read_config(path: Path, what: str = "model") -> dict:
    """Read a model's config.json, or another file of its form, as plain JSON.

    Raises:
        UserError: it is missing, damaged, or names no model type.
    """
    if not path.is_file():
        raise UserError(f"{what}: {path.parent} has no {path.name}")
    config = read_json(path, f"{what}: ")
    if not isinstance(config.get("model_type"), str):
        raise UserError(f"{what}: {path} does not name a model type")
    return config


def position_limit(config: dict) -> int | None:
    """Return the number of positions a model has, in tokens, or None when it has no fixed one."""
    for key in ("n_positions", "max_position_embeddings", "n_ctx"):
        if isinstance(config.get(key), int):
            return config[key]
    return None
