"""Find a model's folder: a local one, the Hugging Face cache, then the hub.

Owns the only network access of the project. Everything after works on a local folder.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from utils.cli import EXIT_MACHINE, UserError, warn

EMBEDDED_BASE = "results/base_model"
FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]
CONNECT_SECONDS = 4
# Run in a child: a name lookup or a silent server can block for minutes, and only a process can be ended.
CONNECT = """
import socket, sys, urllib.parse
url = urllib.parse.urlsplit(sys.argv[1])
socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80))).close()
"""
DOWNLOAD = """
import sys
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
try:
    snapshot_download(sys.argv[1], allow_patterns=sys.argv[2:])
except (RepositoryNotFoundError, GatedRepoError):
    sys.exit(4)
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
        if "/" not in name and name in ("gpt2", "distilgpt2"):
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
    advice = f"download it elsewhere and give its folder, or use the embedded --model-name {EMBEDDED_BASE}"
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    # Behind a proxy only the proxy can be reached, and it resolves the names.
    proxied = any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"))
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if offline or not (proxied or _ends_well(CONNECT, [endpoint], CONNECT_SECONDS)):
        why = "HF_HUB_OFFLINE is set" if offline else "the network is unreachable"
        raise UserError(f"{what} {name}: not in the cache and {why}; {advice}", EXIT_MACHINE)
    print(f"downloading {name} from {endpoint}", flush=True)
    result = subprocess.run([sys.executable, "-c", DOWNLOAD, name, *FILES], stderr=None, check=False)
    if result.returncode == 4:
        raise UserError(f"{what} {name!r} does not exist on the hub, or is not open to you")
    found = _from_cache(name, what) if result.returncode == 0 else None
    if found is None:
        raise UserError(f"{what} {name}: the download failed; {advice}", EXIT_MACHINE)
    return found


def _ends_well(code: str, arguments: list[str], seconds: float) -> bool:
    try:
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, timeout=seconds, capture_output=True, check=False)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def read_config(folder: Path, what: str = "model") -> dict:
    """Read a model folder's config.json as plain JSON.

    Raises:
        UserError: it is missing, damaged, or names no model type.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{what}: {folder} has no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise UserError(f"{what}: {path} is damaged") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UserError(f"{what}: {path} does not name a model type")
    return config


def position_limit(config: dict) -> int | None:
    """Return the number of positions a model has, in tokens, or None when it has no fixed one."""
    for key in ("n_positions", "max_position_embeddings", "n_ctx"):
        if isinstance(config.get(key), int):
            return config[key]
    return None
