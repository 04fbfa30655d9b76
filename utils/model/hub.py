"""Find a model's folder: a local one, the Hugging Face cache, then the hub. The project's only network access."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from filelock import FileLock
from huggingface_hub import constants, get_token, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from utils.errors import EXIT_MACHINE, UserError, machine_reason, warn
from utils.storage import hash_file, hash_files, read_json

EMBEDDED_BASE = "results/base_model"
FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "README.md"]
MAX_LAYERS = 10_000
ANSWER_SECONDS = 4
# A download of less than this many bytes in so many seconds is given up.
STALL_BYTES, STALL_SECONDS = 100_000, 12
NOT_FOUND, DOWN = 4, 5
REASONS = {NOT_FOUND: "it is not on the hub", DOWN: "the hub is down"}
# Both run in a child process, which can be ended: a name lookup or a silent server can block for minutes.
ASK = f"""
import os, sys, urllib.error, urllib.request
question = urllib.request.Request(sys.argv[1], method="HEAD")
if os.environ["HF_TOKEN"]:  # for this host alone, not for one that it redirects to
    question.add_unredirected_header("Authorization", "Bearer " + os.environ["HF_TOKEN"])
try:
    urllib.request.urlopen(question)
except urllib.error.HTTPError as error:
    sys.exit({NOT_FOUND} if error.code in (401, 403, 404) else {DOWN})
except Exception:
    sys.exit(1)
"""
DOWNLOAD = """
import sys
from huggingface_hub import constants, snapshot_download
constants.DOWNLOAD_CHUNK_SIZE = 1 << 16  # the default of 10 MB makes a slow line look like a dead one
snapshot_download(sys.argv[1], allow_patterns=sys.argv[2:])
"""


def locate_model(name: str, what: str = "model") -> Path:
    """Return the folder of a model given by folder or by name on the Hugging Face hub, downloading it if need be.

    Raises:
        UserError: no such folder; or not in the cache and the hub does not answer (5 s) or send enough (30 s).
    """
    folder = Path(name)
    if folder.is_dir():
        if name in ("gpt2", "distilgpt2"):
            warn(f"using ./{name}, a local directory, not the hub's {name}")
        return folder
    if folder.exists():
        raise UserError(f"{what}: {name}: is a file, expected a directory")
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if is_path or (folder.parent != Path() and folder.parent.is_dir()):  # results/x is a mistyped folder, not a name
        raise UserError(f"{what}: {name}: no such directory")
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UserError(f"{what}: {name!r} is neither a folder nor a name on the hub") from None
    return _find_cached(name) or _fetch(name, what)


def find_local(name: str) -> Path | None:
    """Return the folder of a model that is local or in the cache, without network access."""
    return Path(name) if Path(name).is_dir() else _find_cached(name)


def _find_cached(name: str) -> Path | None:
    try:
        folder = Path(snapshot_download(name, allow_patterns=FILES, local_files_only=True))
    except (OSError, HFValidationError):  # not there; or the path of a removed folder, which is no name of the hub
        return None
    # An interrupted download leaves a folder too, with links missing or dangling.
    weights = [path for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern)]
    whole = (folder / "config.json").is_file() and weights and all(path.is_file() for path in weights)
    return folder if whole else None


def _fetch(name: str, what: str) -> Path:
    """Download a model and return its folder, or raise UserError with the reason and advice."""
    reason = _download(name, os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    if reason == REASONS[NOT_FOUND]:
        raise UserError(f"{what} {name!r} does not exist on the hub, or is not open to you (hf auth login)")
    if reason is None:
        if folder := _find_cached(name):
            return folder
        raise UserError(f"{what} {name!r} has no safetensors weights on the hub; convert it and give its folder")
    advice = f"download it elsewhere and give its folder, or use the embedded --model-name {EMBEDDED_BASE}"
    raise UserError(f"{what} {name}: not in the cache and {reason}; {advice}", EXIT_MACHINE)


def _download(name: str, endpoint: str) -> str | None:
    """Download a model into the cache in a child process, and check its files; return the reason of a failure."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set"
    python, url = [sys.executable, "-c"], f"{endpoint}/{name}/resolve/main/config.json"
    known = os.environ | {"HF_TOKEN": get_token() or ""}
    try:
        code = subprocess.run([*python, ASK, url], env=known, capture_output=True, timeout=ANSWER_SECONDS).returncode
    except subprocess.TimeoutExpired:
        return f"no answer in {ANSWER_SECONDS} s"
    if code:
        return REASONS.get(code, "the network is unreachable")
    print(f"downloading {name} from {endpoint}", flush=True)
    cache = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    plain = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_CACHE": str(constants.HF_HUB_CACHE)}  # xet hides its progress
    command = [*python, DOWNLOAD, name, *FILES]
    child = subprocess.Popen(command, env=os.environ | plain, stderr=subprocess.PIPE, errors="replace")
    seen = 0
    try:
        while child.returncode is None:
            try:
                said = child.communicate(timeout=STALL_SECONDS)[1]
            except subprocess.TimeoutExpired:
                before, seen = seen, _count_bytes(cache)
                if seen < before + STALL_BYTES:
                    return f"the hub sends less than {STALL_BYTES / 1000:.0f} kB in {STALL_SECONDS} s"
    finally:
        child.kill()
        child.communicate()
        _remove_partial_files(cache)
    for blob in cache.glob("blobs/*"):
        if len(blob.name) == 64 and hash_file(blob) != blob.name:  # the hub names large files by their sha256
            blob.unlink()
            return "a downloaded file had a wrong checksum and was removed"
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


def hash_model(folder: Path) -> str:
    """Return one sha256 over a model folder's weights and config."""
    return hash_files([*folder.glob("model*.safetensors"), *folder.glob("config.json")])


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
    values = map(config.get, ("n_positions", "max_position_embeddings", "max_seq_len", "n_ctx"))
    return next((value for value in values if isinstance(value, int)), None)
