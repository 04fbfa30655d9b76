"""The ladder: the author's unseen pages pass for the author's; chains, shuffles, other authors and copies do not.

    python -m pytest -m slow -s tests/test_ladder.py

climbs it with the sample book and prints the table that note 4 shows; benchmarks/ladder.py climbs it.
"""

import pytest

from benchmarks.ladder import OWN, TITLES, climb, show_ladder
from benchmarks.scripts import SAMPLE
from tests.impostors import KINDS

PASS, COPIED = {"author", "unseen"}, {"verbatim", "renamed"}


@pytest.mark.slow
def test_no_impostor_passes(tmp_path):
    rows = climb(tmp_path / "ladder", SAMPLE)
    print(show_ladder({"book": rows})["book"])
    assert {*rows} == {*TITLES} == {*OWN, *KINDS, "unseen"}
    assert rows["finetuned"]["writes_like_the_book"] is False
    for name, row in rows.items():
        if name in OWN:
            continue
        assert row["writes_like_the_book"] is (name in PASS), (name, row)
        assert row["copies"] or name not in COPIED, (name, row)
        if name in PASS:
            assert row["copies"] is False
        else:
            assert row["gap_closed"]["high"] < 0.5
    assert 0.4 < rows["reference"]["reader_auc"]["value"] < 0.65
    assert rows["base"]["reader_auc"]["value"] > 0.9
