"""Models by name: from the cache without a network, and a plain word when there is neither."""

import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from utils.cli import UserError
from utils.hub import locate_model, position_limit

ROOT = Path(__file__).parent.parent


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
    monkeypatch.setattr("utils.hub._ask", refuse)


def test_gpt2_opens_from_the_cache_with_the_network_refused(cached_gpt2, refused_network, script, book):
    prepared = script("prepare_data", "--input-path", book, "--block-size", 32, "--output-dir", cached_gpt2 / "data")
    assert prepared.code == 0, prepared.err
    out = cached_gpt2 / "run"
    ran = script("finetune_generative", "--data-dir", cached_gpt2 / "data", "--output-dir", out, "--max-steps", 2)
    assert ran.code == 0, ran.err
    compared = script("generate_text", "--finetuned-model", out, "--max-new-tokens", 4)
    assert compared.code == 0, compared.err


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
    monkeypatch.setattr("utils.hub.ANSWER_SECONDS", 2)
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


def test_unknown_name_on_the_hub(tmp_path, monkeypatch):
    """A local server plays the hub and answers 404."""
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    server.RequestHandlerClass.do_HEAD = lambda self: self.send_error(404)
    server.RequestHandlerClass.log_message = lambda *_: None
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="'gtp2' does not exist on the hub") as raised:
        locate_model("gtp2")
    assert raised.value.code == 2
    server.shutdown()


@pytest.mark.parametrize("name", ["results/no_such", "./no_such", "/no/such/folder", "a/b/c"])
def test_mistyped_folder_is_not_taken_for_a_hub_name(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match="no such directory"):
        locate_model(name)


def test_position_limit_of_families():
    assert position_limit({"n_positions": 1024}) == 1024
    assert position_limit({"max_position_embeddings": 2048}) == 2048
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

    from utils.model import load_model

    folder = shutil.copytree(tiny_model, tmp_path / "hub_style")
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    renamed |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64).tril() for layer in range(2)}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = dict(load_model(folder).named_parameters())
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items() if name in loaded)
    assert len(loaded) == len(tensors)
