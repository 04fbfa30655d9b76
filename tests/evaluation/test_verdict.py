"""The verdict: what each sentence says is true of the figures, for any report."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.evaluation.ngrams import measure_quarters
from utils.evaluation.report import Report
from utils.evaluation.verdict import describe_gap, judge

PARTS = ("words", "spelling", "sense")
share = st.floats(0, 1)
rate = st.one_of(st.just(0.0), st.floats(0, 1))


@st.composite
def intervals(draw, values):
    low, value, high = sorted(draw(st.tuples(values, values, values)))
    return {"value": value, "low": low, "high": high}


@st.composite
def shares(draw):
    """Any parts; the ends 0 and 1 are as likely as all between."""
    ends = st.one_of(st.sampled_from([0.0, 0.75, 1.0]), share)
    return {part: draw(intervals(ends)) for part in PARTS if draw(st.booleans())}


@st.composite
def reports(draw):
    """Any figures; whatever may be missing is missing in some."""

    def maybe(strategy):
        return draw(st.one_of(st.none(), strategy))

    has_author = draw(st.booleans())
    names = ["base", "finetuned"] + ["reference"] * has_author
    gain, bits = intervals(st.floats(-3, 3)), st.floats(-90, 300)
    styled = draw(st.booleans())
    judged = {
        name: {"copy_rate": maybe(rate), **(
            {"unknown_words": draw(rate), "parts": draw(shares()) if has_author else {}}
            if styled else {"missing": "too short"})}
        for name in draw(st.sampled_from([[], ["friend"], ["friend", "base"]]))
    }  # fmt: skip
    return Report(
        book_gain=maybe(gain), control_gain=draw(gain), style_gain=maybe(gain), forgetting_percent=maybe(bits),
        copy_rate={name: {"8": draw(rate)} for name in names},
        longest_copy={"finetuned": {"tokens": draw(st.integers(0, 500))}},
        extraction=maybe(st.fixed_dictionaries({name: st.fixed_dictionaries({split: st.fixed_dictionaries({
            "exact_match": rate, "prefixes": st.just(50), "tokens": st.just(32),
            "extractable": st.fixed_dictionaries({"1": st.just(0.0), "10000": rate})})
            for split in ("train", "validation")}) for name in ("base", "finetuned")})),
        repetition={"finetuned": {"loops": maybe(rate)}},
        delta={name: draw(st.floats(0, 3)) for name in names} if styled else None,
        unknown_words={name: draw(rate) for name in names} if styled else None,
        reader_auc={name: draw(intervals(share)) for name in names} if styled else None,
        parts={name: draw(shares()) if has_author else {} for name in names} if styled else None,
        reader="a/reader", reader_is_base=draw(st.booleans()), other_book=draw(st.booleans()), judged=judged,
    )  # fmt: skip


def percent(text):
    return float(text.rstrip("%")) / 100


def check_headline(sentence, measured, unknown, author, faults, own_reader=False):
    """Check a headline against the shares; return whether it makes the claim."""
    closed = min(measured.values(), key=lambda s: s["value"])
    value, low, high = map(float, re.search(r"\((\d\.\d\d) \[(\d\.\d\d), (\d\.\d\d)\]\)", sentence).groups())
    assert (value, low, high) == pytest.approx((closed["value"], closed["low"], closed["high"]), abs=0.0051)
    good = {part for part, s in measured.items() if s["value"] >= 0.75 and s["high"] >= 1}
    bad = {part for part, s in measured.items() if s["high"] < 1}
    claims = "writes like the book" in sentence
    supported = good == set(measured) and "sense" in good
    assert claims == (supported and not faults and not own_reader)
    assert ("its own base cannot confirm the sense" in sentence) == (supported and own_reader)
    amounts = {"Hardly any": (0, 0.05), "A small part": (0.05, 0.25), "Less than half": (0.05, 0.5), "Half": (0.4, 0.6),
               "More than half": (0.5, 0.9), "Nearly all": (0.9, 1)}  # fmt: skip
    if not claims:
        least, most = amounts[sentence.split(" of the way")[0]]
        assert least <= closed["value"] <= most
    said = re.search(r"has the book's ([^;:]*?)(?:, not|;|\.$)", sentence)
    assert {part for part in PARTS if said and part in said[1]} == (set() if claims else good)
    assert ("read by a/reader" in sentence) == ("sense" in measured)
    lacks = re.search(r"(?:not its|not have the book's) ([^;:]+)", sentence)
    for part, value in re.findall(r"(words|spelling|sense) \((\d\.\d\d)[,)]", sentence):
        assert float(value) == pytest.approx(measured[part]["value"], abs=0.0051)
    assert {part for part in PARTS if lacks and part in lacks[1]} == bad
    undecided = re.search(r"too little text to decide on its ([^;]+)", sentence)
    assert {part for part in PARTS if undecided and part in undecided[1]} == set(measured) - good - bad
    left = re.search(r"; ([a-z, ]+) could not be measured", sentence)
    assert {part for part in PARTS if left and part in left[1]} == set(PARTS) - set(measured)
    words = re.search(
        r"([\d.]+%) of its words \(the author: ([\d.]+%)\) stand in neither book nor general text", sentence
    )
    assert bool(words) == ("spelling" in bad)
    if words:
        assert (percent(words[1]), percent(words[2])) == pytest.approx((unknown, author), abs=0.00051)
    return claims


def find(verdict, start):
    return next((sentence for sentence in verdict if sentence.startswith(start)), None)


@settings(max_examples=2000, deadline=None)
@given(reports())
def test_no_sentence_is_false(report):
    judged = judge(report)
    verdict, flags = judged.verdict, judged.flags
    own = report.copy_rate.get("reference", {}).get("8")
    limit = min(3 * max(own or 0, 0.01), (1 + (own or 0)) / 2)
    copied = report.copy_rate["finetuned"]["8"]
    assert flags["copies"] == (copied > limit)
    assert bool(find(verdict, "It copies much")) == flags["copies"]
    assert percent(re.search(r"[\d.]+%", find(verdict, "It copies"))[0]) == pytest.approx(copied, abs=0.00051)

    train = report.extraction and report.extraction["finetuned"]["train"]["exact_match"]
    recites = find(verdict, "It recites")
    assert bool(recites) == bool(flags["memorized"])
    if recites:
        assert train >= 0.1
        assert train > report.extraction["finetuned"]["validation"]["exact_match"]
    if report.extraction:
        sentence = recites or find(verdict, "It does not recite")
        drawn = {name: report.extraction[name]["train"]["extractable"]["10000"] for name in ("base", "finetuned")}
        shown = re.search(r"continues (\d+%) of .* hold (\d+%) of them \(the base model's (\d+%)\)", sentence).groups()
        assert [percent(text) for text in shown] == pytest.approx(
            [train, drawn["finetuned"], drawn["base"]], abs=0.0051
        )
        if not recites:
            hidden = drawn["finetuned"] >= 0.1 and drawn["finetuned"] > drawn["base"]
            assert ("can be made to" in sentence) == hidden

    change = report.forgetting_percent
    if change is not None:
        sentence = find(verdict, "It forgot")
        assert ("fewer" in sentence) == (change < 0)
        amount = re.match(r"It forgot (nothing|hardly anything|little|much):", sentence)[1]
        least, most = {"nothing": (-1e9, 0), "hardly anything": (0, 1), "little": (1, 20), "much": (20, 1e9)}[amount]
        assert least <= change <= most
        assert flags["forgot"] == (amount == "much")

    learned = find(verdict, "It learned the book")
    book = report.book_gain
    assert bool(learned) == bool(flags["learned_the_book"])
    if learned:
        assert book["low"] > 0
        assert report.style_gain["low"] > 0
    if find(verdict, "It did not learn"):
        assert book["value"] <= 0
    uncertain = find(verdict, "It is not certain")
    if uncertain:
        assert book["value"] > 0
        assert min(book["low"], report.style_gain["low"] if report.style_gain else 1) <= 0
    unknown = find(verdict, "Unseen pages cost")
    assert bool(unknown) == (book is not None and book["low"] > 0 and book["value"] > 0 and report.style_gain is None)
    assert not unknown or flags["learned_the_book"] is None
    cost = re.search(r"cost ([\d.]+) bits per byte (less|more)", " ".join(verdict))
    if cost:
        assert float(cost[1]) == pytest.approx(abs(book["value"]), abs=0.0051)
        assert (cost[2] == "less") == (book["value"] > 0)

    measured = (report.parts or {}).get("finetuned")
    headline = next((s for s in verdict if re.search(r"^[A-Z][a-z ]+ of the way|^It writes like the book", s)), None)
    assert bool(headline) == bool(measured)
    faults = [name for name in ("copies", "memorized", "forgot") if flags[name]]
    faults += ["gain"] * (flags["learned_the_book"] is False)
    if headline:
        unknown = report.unknown_words
        claims = check_headline(headline, measured, unknown["finetuned"], unknown.get("reference"), faults,
                                report.reader_is_base)  # fmt: skip
        assert claims == (flags["writes_like_the_book"] is True)
        said = {"copies": "it copies", "memorized": "it recites", "forgot": "it forgot much", "gain": "its gain"}
        assert all((phrase in headline) == (name in faults) for name, phrase in said.items())

    figures = {"Words": report.delta, "Spelling": report.unknown_words,
               "Sense": report.reader_auc and {name: f["value"] for name, f in report.reader_auc.items()}}  # fmt: skip
    for (start, values), part in zip(figures.items(), PARTS, strict=True):
        sentence = find(verdict, start)
        assert bool(sentence) == bool(values)
        if sentence:
            numbers = re.search(r"(?:is|of) ([\d.]+)(%?) \((?:author ([\d.]+)%?, )?base ([\d.]+)%?\)", sentence)
            scale = 100 if numbers[2] else 1
            shown = {"finetuned": numbers[1], "base": numbers[4]} | ({"reference": numbers[3]} if numbers[3] else {})
            assert {name: float(v) / scale for name, v in shown.items()} == pytest.approx(values, abs=0.0051)
            closed = re.search(r"([\d.]+) \[([\d.]+), ([\d.]+)\] of the gap closed", sentence)
            assert bool(closed) == (part in measured)
            assert ("does not exceed its noise" in sentence) == (part not in measured and "reference" in values)
            if closed:
                expected = [measured[part][key] for key in ("value", "low", "high")]
                assert [float(v) for v in closed.groups()] == pytest.approx(expected, abs=0.0051)
    sense = find(verdict, "Sense")
    assert sense is None or ("lenient" in sense) == report.reader_is_base

    for name, text in judged.judged.items():
        copies = text["copy_rate"] is not None and text["copy_rate"] > limit
        assert bool(text["copies"]) == copies
        assert f"{name}: {text['verdict']}" in verdict
        if text.get("parts"):
            author = report.unknown_words.get("reference")
            claims = check_headline(text["verdict"], text["parts"], text["unknown_words"], author, ["copies"] * copies)
            assert claims == (text["writes_like_the_book"] is True)
            doubt = "The reader cannot confirm this of texts by models that were fine-tuned from it."
            assert text["verdict"].endswith(doubt) == (claims and report.reader_is_base)
        else:
            assert text["writes_like_the_book"] is not True


def interval(value, low, high):
    return {"value": value, "low": low, "high": high}


GOOD, WEAK = interval(0.95, 0.7, 1.0), interval(0.39, 0.28, 0.51)


@pytest.mark.parametrize(
    ("parts", "faults", "start", "writes"),
    [
        ({"words": GOOD, "spelling": GOOD, "sense": GOOD}, [], "It writes like the book", True),
        ({"sense": GOOD}, [], "It writes like the book", True),
        ({"words": GOOD, "spelling": GOOD}, [], "Nearly all of the way", None),
        ({"words": GOOD, "spelling": GOOD, "sense": GOOD}, ["it copies"], "Nearly all of the way", False),
        ({"words": GOOD, "sense": WEAK}, [], "Less than half of the way", False),
        ({"words": WEAK, "spelling": GOOD, "sense": GOOD}, [], "Less than half of the way", False),
        ({"sense": interval(0.97, 0.9, 0.99)}, [], "Nearly all of the way", False),  # the author is outside
        ({"sense": interval(0.7, 0.2, 1.0)}, [], "More than half of the way", None),  # the author is inside
        ({"words": GOOD, "sense": interval(0.7, 0.2, 1.0)}, ["it copies"], "More than half of the way", False),
        ({"spelling": interval(0.7, 0.2, 1.0), "sense": GOOD}, [], "More than half of the way", None),
        ({"words": WEAK, "sense": interval(0.7, 0.2, 1.0)}, [], "Less than half of the way", False),
        ({}, [], None, None),
    ],
)  # fmt: skip
def test_the_weakest_part_decides(parts, faults, start, writes):
    sentence, claim = describe_gap(parts, faults, 0.056, 0.036, "a/reader")
    assert claim is writes
    assert sentence is None if start is None else sentence.startswith(start)


def test_a_model_cannot_be_confirmed_by_its_own_base():
    parts = {"spelling": GOOD, "sense": interval(1.0, 0.7, 1.0)}
    sentence, claim = describe_gap(parts, [], 0.056, 0.036, "a/reader", own_reader=True)
    assert claim is None
    assert sentence == (
        "Nearly all of the way from the base model to the author (0.95 [0.70, 1.00]): it has the book's spelling "
        "(0.95) and sense (1.00, read by a/reader); its own base cannot confirm the sense, another --reader-model can; "
        "words could not be measured."
    )
    assert describe_gap(parts | {"sense": WEAK}, [], 0.056, 0.036, "a/reader", own_reader=True)[1] is False


def test_a_headline_by_hand():
    parts = {"words": GOOD, "spelling": WEAK, "sense": interval(0.1, 0.0, 0.2)}
    sentence, _ = describe_gap(parts, [], 0.056, 0.036, "a/reader")
    assert sentence == (
        "A small part of the way from the base model to the author (0.10 [0.00, 0.20]): it has the book's words "
        "(0.95), not its spelling (0.39) or sense (0.10, read by a/reader); "
        "5.6% of its words (the author: 3.6%) stand in neither book nor general text."
    )


def test_too_little_text_by_hand():
    parts = {"words": GOOD, "spelling": GOOD, "sense": interval(0.72, 0.32, 1.0)}
    assert describe_gap(parts, [], 0.056, 0.036, "a/reader") == (
        "More than half of the way from the base model to the author (0.72 [0.32, 1.00]): it has the book's words "
        "(0.95) and spelling (0.95); there is too little text to decide on its sense (0.72, read by a/reader).",
        None,
    )
    parts = {"words": WEAK, "sense": interval(0.72, 0.32, 1.0)}
    assert describe_gap(parts, [], 0.056, 0.036, "a/reader")[0] == (
        "Less than half of the way from the base model to the author (0.39 [0.28, 0.51]): it does not have the book's "
        "words (0.39); there is too little text to decide on its sense (0.72, read by a/reader); spelling could not be "
        "measured."
    )


def figures(gain=(0.2, 0.3), book=(0.3, 0.4), copied=0.05, own=0.04, extracted=0.0, forgot=4.0, loops=0.0):
    def between(low, high):
        return {"value": (low + high) / 2, "low": low, "high": high}

    train = {"exact_match": extracted, "prefixes": 50, "tokens": 32, "extractable": {"10000": 0.0}}
    extraction = {"train": train, "validation": {"exact_match": 0.0}}
    return Report(**{
        "style_gain": between(*gain), "book_gain": between(*book), "control_gain": between(-0.1, 0.0),
        "forgetting_percent": forgot,
        "copy_rate": {"finetuned": {"8": copied}, "reference": {"8": own}},
        "longest_copy": {"finetuned": {"tokens": 21}},
        "extraction": {"base": extraction, "finetuned": extraction}, "repetition": {"finetuned": {"loops": loops}},
    })  # fmt: skip


def test_verdict_of_a_healthy_run():
    judged = judge(figures())
    assert judged.verdict == [
        "It learned the book: unseen pages cost 0.35 bits per byte less than for the base model.",
        "It copies little: 5.0% of its tokens lie in n-grams of 8 or more tokens of the training text, the longest "
        "span has 21 tokens; the author's own unseen pages have 4.0%.",
        "It does not recite: given the beginnings of 50 training blocks, it continues 0% of them word for word for "
        "32 tokens; 10,000 samples each are likely to hold 0% of them (the base model's 0%).",
        "It forgot little: general text costs 4.0% more bits than before.",
    ]
    assert judged.flags == {"learned_the_book": True, "copies": False, "memorized": False, "forgot": False,
                             "decays": None, "writes_like_the_book": None}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "flag", "value", "words"),
    [
        (
            {"gain": (-0.01, 0.3)},
            "learned_the_book",
            False,
            "not certain that it learned anything of this book alone: unseen",
        ),
        ({"gain": (-0.01, 0.3)}, "learned_the_book", False, "and general text 0.05 more."),
        (
            {"book": (-0.01, 0.3)},
            "learned_the_book",
            False,
            "not certain that it learned the book: unseen pages cost 0.14 bits",
        ),
        ({"book": (-0.9, -0.1)}, "learned_the_book", False, "cost 0.50 bits per byte more than for the base model"),
        ({"book": (-0.9, -0.1), "gain": (0.2, 2.0)}, "learned_the_book", False, "did not learn the book"),
        ({"copied": 0.121}, "copies", True, "It copies much: 12.1%"),
        ({"copied": 0.12}, "copies", False, "It copies little"),
        ({"copied": 0.03, "own": 0.0}, "copies", False, "pages have 0.0%"),
        ({"copied": 0.031, "own": 0.0}, "copies", True, "copies much"),
        ({"extracted": 0.1}, "memorized", True, "It recites: given"),
        ({"extracted": 0.98}, "memorized", True, "it continues 98% of them"),
        ({"extracted": 0.08}, "memorized", False, "does not recite"),
        ({"forgot": 20.0}, "forgot", True, "forgot much: general text costs 20.0% more"),
        ({"forgot": 19.9}, "forgot", False, "forgot little"),
        ({"forgot": 0.5}, "forgot", False, "forgot hardly anything"),
        ({"forgot": -2.0}, "forgot", False, "forgot nothing: general text costs 2.0% fewer"),
        ({"loops": 0.2}, "forgot", False, "20% of its samples end in a loop"),
    ],
)
def test_verdict_names_what_is_wrong(change, flag, value, words):
    judged = judge(figures(**change))
    assert judged.flags[flag] is value
    assert words in " ".join(judged.verdict)


def test_without_general_text_it_is_not_known_whether_the_book_was_learned():
    judged = judge(replace(figures(), style_gain=None, control_gain=None, forgetting_percent=None))
    assert judged.verdict[0] == (
        "Unseen pages cost 0.35 bits per byte less than for the base model; whether it learned more than the book's "
        "language is not known without enough general text of that language."
    )
    assert judged.flags["learned_the_book"] is None


def test_verdict_of_nothing_is_empty():
    judged = judge(Report())
    assert judged.verdict == []
    assert judged.flags == dict.fromkeys(
        ("learned_the_book", "copies", "memorized", "forgot", "decays", "writes_like_the_book")
    )


RNG = np.random.default_rng(3)
BOOK = RNG.integers(0, 200, 20_000)
AUTHOR = [RNG.integers(0, 200, 2000) for _ in range(3)]
LOOPING = [np.concatenate([text[:1500], np.tile(text[:20], 25)]) for text in AUTHOR]
COPYING = [np.concatenate([text[:1500], BOOK[start : start + 500]]) for text, start in zip(AUTHOR, (0, 5000, 9000))]  # noqa: B905


def judge_quarters(texts, reference=None):
    columns = {"base": AUTHOR, "finetuned": texts} | ({"reference": reference} if reference else {})
    quarters = {name: measure_quarters(column, BOOK) for name, column in columns.items()}
    judged = judge(replace(figures(), by_quarter=quarters))
    return judged.flags["decays"], " ".join(sentence for sentence in judged.verdict if "decays" in sentence)


def test_a_text_that_loops_at_its_end_decays():
    sentence = "It decays from the first quarter of its samples to the last: repeated 4-grams rise from 0.0% to 96.0%"
    assert judge_quarters(LOOPING, AUTHOR) == (True, f"{sentence} (author 0.0% to 0.0%).")
    assert judge_quarters(LOOPING) == (True, f"{sentence}.")


def test_a_text_that_copies_at_its_end_decays():
    sentence = "copied tokens rise from 0.0% to 100.0% (author 0.0% to 0.0%)."
    assert judge_quarters(COPYING, AUTHOR) == (
        True,
        f"It decays from the first quarter of its samples to the last: {sentence}",
    )


def test_the_authors_own_text_does_not_decay():
    assert judge_quarters(AUTHOR, AUTHOR) == (False, "")
    assert judge_quarters([text[::-1] for text in LOOPING], AUTHOR) == (False, ""), "a loop at the start is no decay"
    assert judge_quarters(LOOPING, LOOPING) == (False, ""), "the author's text has it too"


def test_few_tokens_are_not_judged():
    assert judge_quarters([text[-1000:] for text in LOOPING[:1]], AUTHOR) == (None, "")
