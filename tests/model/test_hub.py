"""Models by name: from the cache without a network, from a hub of any health, and a plain word when there is none."""

import hashlib
import json
import shutil
import socket
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

import pytest

import utils.model.hub
from utils.errors import UserError
from utils.model.hub import find_local, locate_model, position_limit
from utils.model.loading import load_pair

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def cached_gpt2(tmp_path, tiny_model, monkeypatch):
    """A Hugging Face cache folder that holds a model under the name gpt2."""
    repo = tmp_path / "hub" / "models--gpt2"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    shutil.copytree(tiny_model, repo / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


@pytest.fixture
def refused_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("utils.model.hub._download", refuse)


@pytest.mark.parametrize("by", ["a name in the cache", "its folder"])
def test_no_connection_is_tried(cached_gpt2, refused_network, script, book, tiny_model, monkeypatch, by):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    model = tiny_model if by == "its folder" else "gpt2"
    data, out = cached_gpt2 / "data", cached_gpt2 / "run"
    for name, *flags in [
        ("prepare_data", "--input-path", book, "--block-size", 32, "--output-dir", data, "--model-name", model),
        ("finetune_generative", "--data-dir", data, "--output-dir", out, "--max-steps", 2, "--copy-samples", 2),
        ("generate_text", "--finetuned-model", out, "--max-new-tokens", 4, "--num-validation-prompts", 0,
         "--control-path", book),
    ]:  # fmt: skip
        ended = script(name, *flags)
        assert ended.code == 0, ended.err


def test_missing_model_offline_names_the_embedded_base(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set.*--model-name results/base_model") as raised:
        locate_model("gpt2")
    assert raised.value.code == 3


@pytest.mark.parametrize("kind", ["refused", "no such host", "silent"])
def test_missing_model_without_network_ends_soon(tmp_path, monkeypatch, kind):
    """A refused port, a name that does not resolve, a server that accepts and stays silent."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    if kind == "refused":
        listener.close()
    endpoint = "http://nowhere.invalid" if kind == "no such host" else f"http://127.0.0.1:{port}"
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("utils.model.hub.ANSWER_SECONDS", 2)
    began = time.monotonic()
    with pytest.raises(UserError, match=r"gpt2.*results/base_model") as raised:
        locate_model("gpt2")
    assert raised.value.code == 3
    assert time.monotonic() - began < 60  # not a measure of speed: without limits this never ends
    listener.close()


def test_local_folder_named_gpt2_wins_and_says_so(tmp_path, tiny_model, monkeypatch, capsys):
    shutil.copytree(tiny_model, tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    assert locate_model("gpt2") == Path("gpt2")
    assert "using ./gpt2, a local directory" in capsys.readouterr().err


COMMIT = "c" * 40
WEIGHTS = "model.safetensors"


class Hub(ThreadingHTTPServer):
    """Plays the hub with the files of one folder, in health or with one fault."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.fault, self.asked, self.closing = "", [], Event()
        Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *_):
        """A reader that hangs up is part of the play."""


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        hub, path = self.server, self.path.partition("?")[0]
        hub.asked.append(f"{self.command} {path}")
        later = not path.endswith("/resolve/main/config.json")
        if hub.fault == "gated" and self.headers["Authorization"] != "Bearer opensesame":
            return self.send_error(401)
        if hub.fault in ("404", "503") or (hub.fault == "503 later" and later):
            return self.send_error(int(hub.fault[:3]))
        if hub.fault == "silent later" and later:
            return hub.closing.wait(60)
        if path.startswith("/api/models/tiny/tree/"):
            listed = [self.describe(name, data) for name, data in hub.files.items()]
            return self.answer(json.dumps(listed).encode(), {}, body)
        if path.startswith("/api/models/tiny"):
            return self.answer(json.dumps({"id": "tiny", "sha": COMMIT, "siblings": []}).encode(), {}, body)
        name = path.rpartition("/")[2]
        if "/tiny/resolve/" not in path or name not in hub.files:
            return self.send_error(404)
        data, etag = hub.files[name], self.describe(name, hub.files[name])["oid"]
        if name == WEIGHTS:
            etag = hashlib.sha256(data).hexdigest()
            if hub.fault == "wrong":
                data = data[:-1] + bytes([data[-1] ^ 1])
        sizes = {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": len(data), "X-Repo-Commit": COMMIT}
        self.answer(data, sizes | {"ETag": f'"{etag}"'}, body, hub.fault if name == WEIGHTS else "")

    def describe(self, name, data):
        entry = {"type": "file", "path": name, "size": len(data)}
        entry["oid"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        if name == WEIGHTS:
            entry["lfs"] = {"size": len(data), "oid": hashlib.sha256(data).hexdigest(), "pointerSize": 100}
        return entry

    def answer(self, data, headers, body, fault=""):
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        for key, value in (headers | {"Content-Length": len(data) - start}).items():
            self.send_header(key, str(value))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        piece, pause = {"byte a second": (1, 1), "slow line": (10_000, 0.1)}.get(fault, (1 << 20, 0))
        end = len(data) // 2 if fault == "cut" else len(data)
        for at in range(start, end if body else 0, piece):
            self.wfile.write(data[at : min(at + piece, end)])
            if self.server.closing.wait(pause):
                return
        self.close_connection = self.close_connection or fault == "cut"


@pytest.fixture
def hub(tiny_model, tmp_path, monkeypatch):
    server = Hub(tiny_model)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()


def test_unknown_name_on_the_hub(hub):
    hub.fault = "404"
    with pytest.raises(UserError, match="'gtp2' does not exist on the hub") as raised:
        locate_model("gtp2")
    assert raised.value.code == 2


def test_what_python_itself_says_in_the_child_is_not_the_hubs_answer(hub, monkeypatch):
    hub.fault = "404"
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    with pytest.raises(UserError, match="'gtp2' does not exist on the hub"):
        locate_model("gtp2")


def test_a_gated_model_opens_with_the_users_token(hub, monkeypatch):
    hub.fault = "gated"
    with pytest.raises(UserError, match="not open to you"):
        locate_model("tiny")
    monkeypatch.setenv("HF_TOKEN", "opensesame")
    assert same_files(locate_model("tiny"), hub)


def test_a_model_of_pickles_on_the_hub_is_no_failed_download(hub):
    hub.files["pytorch_model.bin"] = hub.files.pop(WEIGHTS)
    with pytest.raises(UserError, match="'tiny' has no safetensors weights on the hub") as raised:
        locate_model("tiny")
    assert raised.value.code == 2


def remains(folder):
    return [path.name for path in folder.rglob("*.incomplete")]


def same_files(folder, hub):
    """What came is to the byte what the hub has."""
    wanted = {name: data for name, data in hub.files.items() if Path(name).suffix in (".json", ".txt", ".safetensors")}
    return {path.name: path.read_bytes() for path in folder.iterdir()} == wanted


def test_model_comes_from_the_hub_once(hub, tmp_path, tiny_model):
    folder = locate_model("tiny")
    assert same_files(folder, hub)
    assert load_pair(folder)[0].num_parameters() == load_pair(tiny_model)[0].num_parameters()
    hub.asked.clear()
    hub.fault = "503"  # a cached model does not even ask
    assert locate_model("tiny") == find_local("tiny") == folder
    assert hub.asked == []


def test_half_a_model_in_the_cache_is_none(cached_gpt2):
    """As a cut download leaves it: a link to nowhere, and no list of what there should be."""
    assert find_local("gpt2")
    (weights,) = cached_gpt2.rglob(WEIGHTS)
    weights.unlink()
    weights.symlink_to("nowhere")
    assert find_local("gpt2") is None


FAULTS = {
    "503": "the hub is down",
    "503 later": "the download failed",
    "silent later": "sends less than",
    "byte a second": "sends less than",
    "cut": "the download failed|sends less than",
    "wrong": "a downloaded file had a wrong checksum and was removed",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failing_hub_is_left_soon_and_the_same_call_succeeds_later(hub, tmp_path, monkeypatch, amount, fault):
    monkeypatch.setattr(utils.model.hub, "STALL_SECONDS", amount(3, utils.model.hub.STALL_SECONDS))
    hub.fault, began = fault, time.monotonic()
    with pytest.raises(
        UserError, match=rf"^model tiny: .*({FAULTS[fault]}).*; .*--model-name results/base_model"
    ) as raised:
        locate_model("tiny")
    assert raised.value.code == 3
    assert time.monotonic() - began < 30
    assert find_local("tiny") is None  # nothing half is taken for a model
    assert remains(tmp_path) == []
    hub.fault = ""
    assert same_files(locate_model("tiny"), hub)


def test_slow_line_is_not_taken_for_a_dead_one(hub, monkeypatch):
    """Nine seconds of 100 kB/s, where 17 kB/s are wanted: what arrives must be seen to arrive."""
    monkeypatch.setattr(utils.model.hub, "STALL_SECONDS", 6)  # a busy machine needs three to start the download
    hub.files[WEIGHTS] += bytes(900_000 - len(hub.files[WEIGHTS]))
    hub.fault = "slow line"
    assert same_files(locate_model("tiny"), hub)


def test_full_disk_is_named(hub, tmp_path, monkeypatch):
    (tmp_path / "huggingface_hub.py").write_text("raise OSError(28, 'No space left on device')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UserError, match=r"the download failed \(no space left on device\)"):
        locate_model("tiny")


def test_partial_files_are_removed_but_not_those_of_another_process(hub, tmp_path, monkeypatch):
    """And a file that is renamed while the bytes are counted is no defect."""
    from filelock import FileLock

    cache = tmp_path / "cache" / "models--tiny"
    locks = tmp_path / "cache" / ".locks" / cache.name
    locks.mkdir(parents=True)
    (cache / "blobs").mkdir(parents=True)
    for etag in ("mine", "others"):
        (cache / "blobs" / f"{etag}.12345678.incomplete").write_bytes(b"half")
    with FileLock(locks / "others.lock"):
        utils.model.hub._remove_partial_files(cache)
    assert remains(cache) == ["others.12345678.incomplete"]
    with monkeypatch.context() as patch:
        there = list((cache / "blobs").iterdir())
        patch.setattr(Path, "glob", lambda *_: [cache / "blobs" / "gone", *there])
        assert utils.model.hub._count_bytes(cache) == 4


@pytest.mark.parametrize("name", ["results/no_such", "./no_such", "/no/such/folder", "a/b/c"])
def test_mistyped_folder_is_not_taken_for_a_hub_name(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match="no such directory"):
        locate_model(name)


def test_position_limit_of_families():
    assert position_limit({"n_positions": 1024}) == 1024
    assert position_limit({"max_position_embeddings": 2048}) == 2048
    assert position_limit({"max_seq_len": 512}) == 512  # MPT
    assert position_limit({}) is None


def test_flag_mistakes_are_found_before_torch_is_imported():
    code = (
        "import sys, runpy; sys.argv = ['x', '--block-size', '0']\n"
        "try: runpy.run_path('prepare_data.py', run_name='__main__')\n"
        "except SystemExit as e: print(e.code, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == ["2", "False", "False"]


def test_hub_naming_of_gpt2_loads_whole(tmp_path, tiny_model):
    """The hub's gpt2 names its tensors without 'transformer.', and stores masks that are no parameters."""
    import torch
    from safetensors.torch import load_file, save_file

    from utils.model.loading import load_model

    folder = shutil.copytree(tiny_model, tmp_path / "hub_style")
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    renamed |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64).tril() for layer in range(2)}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = dict(load_model(folder).named_parameters())
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items() if name in loaded)
    assert len(loaded) == len(tensors)
