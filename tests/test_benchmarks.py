"""The benchmarks: both sides of a comparison do the same, and what is not known is left out."""

import json

from transformers import GPT2LMHeadModel

from benchmarks import generation, gpu, run


def test_the_page_is_what_the_stored_figures_give():
    stored = json.loads((run.HERE / "results.json").read_text())
    assert run.write_page(stored) == (run.HERE / "README.md").read_text(encoding="utf-8")


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
