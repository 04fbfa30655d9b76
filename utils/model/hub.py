"""Find a model's folder: a local one, the Hugging Face cache, then the hub. The project's only network access."""

import os
import select
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from filelock import FileLock
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError

from utils.errors import EXIT_MACHINE, UserError, machine_reason, warn
from utils.storage import hash_file, read_json

EMBEDDED_BASE = "results/base_model"
FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]
MAX_LAYERS = 10_000
ANSWER_SECONDS = 4
# A download of less than this many bytes in so many seconds is given up.
STALL_BYTES, STALL_SECONDS = 100_000, 12
NOT_FOUND = "it is not on the hub"
# Run in a child process, which can be ended: a name lookup or a silent server can block for minutes.
DOWNLOAD = f"""
import sys, urllib.error, urllib.request
url, name, *patterns = sys.argv[1:]
try:
    urllib.request.urlopen(urllib.request.Request(url, method="HEAD"))
except urllib.error.HTTPError as error:
    sys.exit("{NOT_FOUND}" if error.code in (401, 403, 404) else "the hub is down")
except Exception:
    sys.exit("the network is unreachable")
print("the hub answers", flush=True)
from huggingface_hub import constants, snapshot_download
constants.DOWNLOAD_CHUNK_SIZE = 1 << 16  # the default of 10 MB makes a slow line look like a dead one
snapshot_download(name, allow_patterns=patterns)
"""


def locate_model(name: str, what: str = "model") -> Path:
    """Return the local folder of a model, downloading it if need be.

    Args:
        name: a folder, or a name on the Hugging Face hub like 'gpt2'.
        what: 'model' or 'tokenizer', for messages.
    Raises:
        UserError: no such folder; or not in the cache and the hub does not answer (5 s) or send enough (30 s).
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
    return _find_cached(name, what) or _fetch(name, what)


def find_local(name: str) -> Path | None:
    """Return the folder of a model that is local or in the cache, without network access."""
    if Path(name).is_dir():
        return Path(name)
    with suppress(UserError):  # the path of a removed folder is no valid name of the hub
        return _find_cached(name, "model")
    return None


def _find_cached(name: str, what: str) -> Path | None:
    try:
        folder = Path(snapshot_download(name, allow_patterns=FILES, local_files_only=True))
    except HFValidationError:
        raise UserError(f"{what}: {name!r} is neither a folder nor a name on the hub") from None
    except OSError:  # LocalEntryNotFoundError is one
        return None
    # An interrupted download leaves a folder too, with links missing or dangling.
    weights = [path for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern)]
    whole = (folder / "config.json").is_file() and weights and all(path.is_file() for path in weights)
    return folder if whole else None


def _fetch(name: str, what: str) -> Path:
    """Download a model and return its folder, or raise UserError with the reason and advice."""
    reason = _download(name, os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    if reason == NOT_FOUND:
        raise UserError(f"{what} {name!r} does not exist on the hub, or is not open to you")
    if reason is None and (folder := _find_cached(name, what)):
        return folder
    advice = f"download it elsewhere and give its folder, or use the embedded --model-name {EMBEDDED_BASE}"
    reason = reason or "its download is incomplete"
    raise UserError(f"{what} {name}: not in the cache and {reason}; {advice}", EXIT_MACHINE)


def _download(name: str, endpoint: str) -> str | None:
    """Download a model into the cache in a child process, and check its files; return the reason of a failure."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set"
    cache = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    plain = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_CACHE": str(constants.HF_HUB_CACHE)}  # xet hides its progress
    command = [sys.executable, "-c", DOWNLOAD, f"{endpoint}/{name}/resolve/main/config.json", name, *FILES]
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(command, env=os.environ | plain, stdout=subprocess.PIPE, stderr=errors)
        try:
            if not select.select([child.stdout], [], [], ANSWER_SECONDS)[0]:
                return f"no answer in {ANSWER_SECONDS} s"
            answered = child.stdout.read(1)  # empty when the child has ended
            if answered:
                print(f"downloading {name} from {endpoint}", flush=True)
            seen, since = 0, time.monotonic()
            while child.poll() is None:
                time.sleep(0.2)
                size = _count_bytes(cache)
                if size >= seen + STALL_BYTES:
                    seen, since = size, time.monotonic()
                elif time.monotonic() > since + STALL_SECONDS:
                    return f"the hub sends less than {STALL_BYTES / 1000:.0f} kB in {STALL_SECONDS} s"
        finally:
            child.kill()
            child.communicate()
            _remove_partial_files(cache)
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip()
    for blob in cache.glob("blobs/*"):
        if len(blob.name) == 64 and hash_file(blob) != blob.name:  # the hub names large files by their sha256
            blob.unlink()
            return "a downloaded file had a wrong checksum and was removed"
    if not answered:
        return said
    return f"the download failed ({machine_reason(OSError(said)) or 'try it again'})" if child.returncode else None


def _count_bytes(cache: Path) -> int:
    size = 0
    for path in cache.glob("blobs/*"):
        with suppress(FileNotFoundError):  # it is renamed once it is complete
            size += path.lstat().st_size
    return size


def _remove_partial_files(cache: Path) -> None:
    """Remove partly downloaded files, except those that another process is writing and therefore locks."""
    for path in cache.glob("blobs/*.incomplete"):
        lock = cache.parent / ".locks" / cache.name / f"{path.name.split('.')[0]}.lock"
        with suppress(OSError, NotImplementedError), FileLock(lock, timeout=0):
            path.unlink(missing_ok=True)


def read_config(path: Path, what: str = "model") -> dict:
    """Read a config.json, or a file of the same form; UserError if it is missing, damaged or without a model type."""
    if not path.is_file():
        raise UserError(f"{what}: {path.parent} has no {path.name}")
    config = read_json(path, f"{what}: ")
    if not isinstance(config.get("model_type"), str):
        raise UserError(f"{what}: {path} does not name a model type")
    n_layers = config.get("num_hidden_layers")  # some families create a list of so many names at once
    if isinstance(n_layers, int) and n_layers > MAX_LAYERS:
        raise UserError(f"{what}: {path} says {n_layers} layers, more than {MAX_LAYERS:,}")
    return config


def position_limit(config: dict) -> int | None:
    """Return a model's context length in tokens, or None when it is not fixed."""
    for key in ("n_positions", "max_position_embeddings", "n_ctx"):
        if isinstance(config.get(key), int):
            return config[key]
    return None
