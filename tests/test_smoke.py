def test_x(prepared, script, tiny_model, tmp_path):
    r = script(
        "finetune_generative",
        "--data-dir",
        prepared,
        "--output-dir",
        tmp_path / "o",
        "--max-steps",
        4,
        "--sample-tokens",
        5,
    )
    print(r)
    assert r.code == 0
    r = script("generate_text", "--finetuned-model", tmp_path / "o", "--max-new-tokens", 5)
    print(r)
    assert r.code == 0
