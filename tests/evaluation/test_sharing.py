"""Sharing a model: a card that the hub accepts and that says nothing false, what is uploaded, and who can open it."""

import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import copy_run
from forked import digest_files
from huggingface_hub import ModelCard, ModelCardData, repocard_data
from huggingface_hub.utils import filter_repo_objects, validate_repo_id
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import generate_text
from utils.argument_types import LICENSES
from utils.errors import UserError
from utils.evaluation.render import describe_card, describe_terms
from utils.evaluation.report import Report

ROOT = Path(__file__).parents[2]
LANGUAGE = re.compile(r"[a-z]{2,3}")


def check_card(path):
    """Read a model card as the hub does, check every field of its metadata, and return it."""
    card = ModelCard.load(path)
    metadata = yaml.safe_load(path.read_text(encoding="utf-8").split("---\n")[1])
    again = ModelCardData(**ModelCard(f"---\n{card.data.to_yaml()}\n---\n").data.to_dict())
    assert again.to_dict() == card.data.to_dict()
    assert metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "text-generation"
    assert all(isinstance(tag, str) for tag in metadata["tags"])
    assert metadata.get("license", "other") in LICENSES
    assert LANGUAGE.fullmatch(metadata.get("language", "en"))
    if "base_model" in metadata:
        validate_repo_id(metadata["base_model"])
    if "model-index" in metadata:
        name, results = repocard_data.model_index_to_eval_results(metadata["model-index"])
        assert name == metadata["model-index"][0]["name"]
        assert all(isinstance(result.metric_value, float) for result in results)
    return card


def test_the_card_of_a_run_has_metadata_that_the_hub_accepts(measured):
    report = json.loads((measured / "report.json").read_text(encoding="utf-8"))
    card = check_card(measured / "README.md")
    assert card.data.base_model is card.data.license is card.data.language is None  # a local folder without a card
    assert card.data.tags == ["gpt2", "fine-tuned-on-a-book"]
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results["perplexity"] == pytest.approx(report["scores"]["book"]["finetuned"]["eval/perplexity"], abs=1e-5)
    assert report["settings"]["data_sha256"] in card.content
    assert report["settings"]["judged_sha256"] == {}
    assert "| judged |" not in card.content
    assert ("Do not share" in card.content) == bool(report["flags"]["memorized"] or report["flags"]["copies"])
    for name in ("language", "license"):
        assert f"No {name} is given, since the base model's card names none" in card.content


def test_the_embedded_base_has_a_card_that_the_hub_accepts():
    data = check_card(ROOT / "results/base_model/README.md").data
    assert (data.license, data.language, data.tags) == ("cc0-1.0", "en", ["gpt2"])


def test_language_and_license_come_from_the_bases_card_or_a_flag(large, tiny_model, script, tmp_path):
    base = shutil.copytree(tiny_model, tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: mit\nlanguage: fr\n---\nA base.\n", encoding="utf-8")
    tuned = copy_run(large / "model", tmp_path / "tuned")
    flags = ["--finetuned-model", tuned, "--base-model", base, "--no-measure", "--num-validation-prompts", 0,
             "--max-new-tokens", 2]  # fmt: skip
    for given, language, license_name in [
        ([], "fr", "mit"),
        (["--language", "de"], "de", "mit"),
        (["--license", "apache-2.0"], "fr", "apache-2.0"),
    ]:
        ran = script("generate_text", *flags, *given)
        assert ran.code == 0, ran.err
        card = check_card(tuned / "README.md")
        assert (card.data.language, card.data.license) == (language, license_name)
        assert "is given, since" not in card.content


OTHER = "license: other\nlicense_name: my-own\nlicense_link: LICENSE"
CARDS = [
    ("---\nlicense: mit\nlanguage: [en, de]\n---\n", {"language": ["en", "de"], "license": "mit"}),
    (f"---\n{OTHER}\n---\n", {"license": "other", "license_name": "my-own", "license_link": "LICENSE"}),
    ("---\nlanguage: no\nlicense: 3\n---\n", {}),  # YAML's false and a number
    ("---\nlanguage: [en, no]\nlicense: []\n---\n", {}),
    ("---\n- a\n---\n", {}),
    ("---\nlicense: mit: x\n---\n", {}),
    ("no card", {}),
    (b"\xff\xfe", {}),
    (None, {}),
]


@pytest.mark.parametrize(("card", "terms"), CARDS)
def test_what_a_card_does_not_say_is_left_out(tmp_path, card, terms):
    if card is not None:
        (tmp_path / "README.md").write_bytes(card if isinstance(card, bytes) else card.encode())
    assert describe_terms(tmp_path, None, None) == terms
    given = {name: value for name, value in terms.items() if name == "language"} | {"license": "mit"}
    assert describe_terms(tmp_path, None, "mit") == given  # another's license_name goes with its license
    assert describe_terms(tmp_path, "no", None)["language"] == "no"


@pytest.mark.parametrize(("base", "named"), [("gpt2", "gpt2"), ("someone/gpt-x", "someone/gpt-x"), ("here", None)])
def test_only_a_model_of_the_hub_is_named_as_the_base(tmp_path, monkeypatch, base, named):
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    report = Report(settings={"base_model": base, "finetuned_model": "out/mine", "language": "no"})
    (tmp_path / "card.md").write_text(f"---\n{describe_card(report, 'llama')}\n---\n", encoding="utf-8")
    data = check_card(tmp_path / "card.md").data
    assert (data.base_model, data.language, data.license) == (named, "no", None)
    assert data.tags == ["llama", "fine-tuned-on-a-book"]


def test_a_mistyped_language_or_license_is_refused():
    for flags, says in [
        (["--license", "Apache2"], "--license: 'Apache2' is not on the hub's list of licenses; use apache-2.0"),
        (
            ["--license", "?"],
            "--license: '?' is not on the hub's list of licenses; use apache-2.0, cc0-1.0, mit, other or",
        ),
        (["--language", "english"], "--language: 'english' is not a code of ISO 639; use en, fr, de or the like"),
    ]:
        with pytest.raises(UserError, match=f"^{re.escape(says)}"):
            generate_text.parse_args(flags)


def upload_words():
    """The words of the README's `hf upload` command."""
    page = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    return shlex.split(re.search(r"^ {4}\.venv/bin/(hf upload .*)$", page, re.MULTILINE)[1])


@pytest.fixture
def uploaded(measured, tmp_path):
    """Folder of what that command uploads of a run's folder."""
    run, words = shutil.copytree(measured, tmp_path / "run"), upload_words()
    (run / "tensorboard").mkdir()
    (run / "tensorboard/events.out").write_text("x")
    shutil.copytree(run / "checkpoint-300", run / "untrained_model")
    excluded = [after for word, after in itertools.pairwise(words) if word == "--exclude"]
    paths = [path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()]
    for path in filter_repo_objects(paths, ignore_patterns=excluded):
        (tmp_path / "hub" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(run / path, tmp_path / "hub" / path)
    return tmp_path / "hub"


def test_the_upload_command_has_flags_that_the_hubs_program_knows():
    helped = subprocess.run([Path(sys.executable).parent / "hf", "upload", "--help"], capture_output=True, text=True)
    flags = {word for word in upload_words() if word.startswith("--")}
    assert flags == {"--private", "--exclude"}
    assert flags <= set(re.findall(r"--[a-z-]+", helped.stdout))


def test_the_upload_has_the_model_and_neither_the_books_text_nor_paths(uploaded):
    assert {path.relative_to(uploaded).as_posix() for path in uploaded.rglob("*") if path.is_file()} == {
        "README.md", "all_results.json", "config.json", "generation_config.json", "loss_curve.png", "manifest.json",
        "metrics.jsonl", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def test_what_is_uploaded_opens_in_a_pipeline_unchanged(uploaded):
    before = digest_files(uploaded)
    generator = pipeline("text-generation", model=str(uploaded))
    found = generator("Day 12. Hal went to", max_new_tokens=12, do_sample=False, return_full_text=False)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(uploaded), AutoTokenizer.from_pretrained(uploaded)
    ids = tokenizer("Day 12. Hal went to", return_tensors="pt")
    expected = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert found == [{"generated_text": tokenizer.decode(expected, skip_special_tokens=True)}]
    assert digest_files(uploaded) == before
    assert model.dtype == torch.float32
