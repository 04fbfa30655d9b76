"""Find a model's folder: a local one, the Hugging Face cache, then the hub.

Owns the only network access of the project. Everything after works on a local folder.
"""

import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from utils.errors import EXIT_MACHINE, UserError, machine_reason, warn
from utils.storage import hash_file, read_json

EMBEDDED_BASE = "results/base_model"
FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]
MAX_LAYERS = 10_000
ANSWER_SECONDS = 4
NOT_THERE, DOWN = 4, 5
FAILURES = {None: "its download is incomplete", 1: "the network is unreachable", DOWN: "the hub is down"}
# Run in a child: a name lookup or a silent server can block for minutes, and only a process can be ended.
ASK = f"""
import sys, urllib.error, urllib.request
try:
    urllib.request.urlopen(urllib.request.Request(sys.argv[1], method="HEAD"))
except urllib.error.HTTPError as error:
    sys.exit({NOT_THERE} if error.code in (401, 403, 404) else {DOWN})
except OSError:
    sys.exit(1)
"""
DOWNLOAD = """
import sys
from huggingface_hub import constants, snapshot_download
constants.DOWNLOAD_CHUNK_SIZE = 1 << 16  # its 10 MB reach the disk at once: a slow line would look like a dead one
snapshot_download(sys.argv[1], allow_patterns=sys.argv[2:])
"""
# A download that brings less than this many bytes in so many seconds will not end today.
STALL_BYTES, STALL_SECONDS = 100_000, 12


def locate_model(name: str, what: str = "model") -> Path:
    """Return the local folder of a model given by name or folder, downloading it if need be.

    Args:
        name: a folder, or a name on the Hugging Face hub like 'gpt2'.
        what: 'model' or 'tokenizer', for messages.
    Raises:
        UserError: no such folder; not in the cache and the hub cannot be reached (within 5 s), or sends
            nothing that helps (within 30 s).
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


def find_local(name: str) -> Path | None:
    """Return the folder of a model that is here or in the cache, without looking elsewhere."""
    if Path(name).is_dir():
        return Path(name)
    with suppress(UserError):  # a folder that is gone has no name of the hub's form
        return _from_cache(name, "model")
    return None


def _from_cache(name: str, what: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        folder = Path(snapshot_download(name, allow_patterns=FILES, local_files_only=True))
    except HFValidationError:
        raise UserError(f"{what}: {name!r} is neither a folder nor a name on the hub") from None
    except OSError:  # huggingface_hub's "not in the cache" is one
        return None
    # A download that was cut off leaves a folder too, in which links lack or lead nowhere.
    weights = [path for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern)]
    whole = (folder / "config.json").is_file() and weights and all(path.is_file() for path in weights)
    return folder if whole else None


def _from_hub(name: str, what: str) -> Path:
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    why = _ask(f"{endpoint}/{name}/resolve/main/config.json")
    if why == NOT_THERE:
        raise UserError(f"{what} {name!r} does not exist on the hub, or is not open to you")
    if why == 0:
        print(f"downloading {name} from {endpoint}", flush=True)
        why = _download(name)
        if why is None and (found := _from_cache(name, what)):
            return found
    advice = f"download it elsewhere and give its folder, or use the embedded --model-name {EMBEDDED_BASE}"
    raise UserError(f"{what} {name}: not in the cache and {FAILURES.get(why, why)}; {advice}", EXIT_MACHINE)


def _download(name: str) -> str | None:
    """Fetch a model into the cache in a child, and check its files; returns what went wrong, or None.

    The child is ended when it makes no headway. Files that came whole stay: the next one goes on after them.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    plain = os.environ | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_CACHE": str(HF_HUB_CACHE)}  # xet hides its progress
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen([sys.executable, "-c", DOWNLOAD, name, *FILES], env=plain, stderr=errors)
        try:
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
            child.wait()
            _remove_remains(cache)
        errors.seek(0)
        said = OSError(errors.read().decode(errors="replace"))
    for blob in cache.glob("blobs/*"):
        if len(blob.name) == 64 and hash_file(blob) != blob.name:  # the hub names large files by their sha256
            blob.unlink()
            return "a downloaded file had a wrong checksum and was removed"
    return None if child.returncode == 0 else f"the download failed ({machine_reason(said) or 'try it again'})"


def _count_bytes(cache: Path) -> int:
    size = 0
    for path in cache.glob("blobs/*"):
        with suppress(FileNotFoundError):  # it is renamed once it is whole
            size += path.lstat().st_size
    return size


def _remove_remains(cache: Path) -> None:
    """Remove files that came in part; one that another process is writing has its lock held."""
    from filelock import FileLock

    for path in cache.glob("blobs/*.incomplete"):
        lock = cache.parent / ".locks" / cache.name / f"{path.name.split('.')[0]}.lock"
        with suppress(OSError, NotImplementedError), FileLock(lock, timeout=0):
            path.unlink(missing_ok=True)


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
    n_layers = config.get("num_hidden_layers")  # the families that have it make a list of so many names at once
    if isinstance(n_layers, int) and n_layers > MAX_LAYERS:
        raise UserError(f"{what}: {path} says {n_layers} layers, more than {MAX_LAYERS:,}")
    return config


def position_limit(config: dict) -> int | None:
    """Return the number of positions a model has, in tokens, or None when it has no fixed one."""
    for key in ("n_positions", "max_position_embeddings", "n_ctx"):
        if isinstance(config.get(key), int):
            return config[key]
    return None
