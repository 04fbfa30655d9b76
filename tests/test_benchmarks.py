"""The benchmarks: both sides of a comparison do the same, and what is not known is left out."""

import json

import pytest
from transformers import GPT2LMHeadModel

from benchmarks import generation, gpu, run


def test_the_page_is_what_the_stored_figures_give():
    stored = json.loads((run.HERE / "results.json").read_text())
    assert run.write_page(stored) == (run.HERE / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("wanted", "met", "missed"), [
    (">= 2.5", 2.5, 2.4), ("<= 0.05", 0.05, 0.051), ("< 2", 1.9, 2.0), ("0.8 to 1.2", 0.8, 0.79),
    ("0.8 to 1.2", 1.2, 1.21), ("none", 7, None)])  # fmt: skip
def test_a_missed_target_is_named(wanted, met, missed):
    assert run.is_met(met, wanted)
    assert missed is None or not run.is_met(missed, wanted)


def test_both_sides_sample_alike(monkeypatch):
    """generate() drew from 0.9 of the probability mass, this project from all of it, at another temperature."""
    theirs, ours = [], []
    generate, generate_ids = GPT2LMHeadModel.generate, generation.generate_ids

    def watch_generate(*args, **options):
        theirs.append(options)
        return generate(*args, **options)

    def watch_generate_ids(model, eos, prompts, seeds, decoding, *more):
        ours.append(decoding)
        return generate_ids(model, eos, prompts, seeds, decoding, *more)

    monkeypatch.setattr(GPT2LMHeadModel, "generate", watch_generate)
    for module, measure in ((generation, generation.measure), (gpu, gpu.generate)):
        monkeypatch.setattr(module, "generate_ids", watch_generate_ids)
        theirs.clear(), ours.clear()
        measure(quick=True)
        named = ("temperature", "top_p", "top_k")
        drawn = {tuple(options[name] for name in named) for options in theirs if options.get("do_sample")}
        assert (
            drawn == {tuple(getattr(one, name) for name in named) for one in ours if one.do_sample} == {(1.0, 0.9, 0)}
        )


@pytest.mark.parametrize(
    ("device", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA GeForce RTX 4090", 165e12),
     ("NVIDIA L4", 121e12), ("NVIDIA L40S", None), ("cpu", None)],
)  # fmt: skip
def test_a_peak_is_found_by_whole_words(device, peak):
    assert gpu.find_peak(device) == peak


def test_of_a_gpu_whose_peak_is_not_known_there_is_no_share(monkeypatch, tmp_path):
    figures = json.loads((run.HERE / "gpu.json").read_text()) | {"device": "NVIDIA L40S", "peak_flops": None}
    for sizes in figures["training"].values():
        for of in sizes.values():
            of["mfu"] = None
    (tmp_path / "gpu.json").write_text(json.dumps(figures))
    (tmp_path / "results.json").write_text((run.HERE / "results.json").read_text())
    monkeypatch.setattr(run, "HERE", tmp_path)
    page, shown = "\n".join(run.list_gpu()), run.render()
    assert "| this project | 1024 | 258,369 | 221 | - | 11.9 |" in page
    assert "MFU is the share" not in page
    assert shown["gpu.this_project.1024"] == "258,369"
    assert shown["gpu.this_project.1024.mfu"] == shown["gpu.product"] == "-"
