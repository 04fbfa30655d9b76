"""The verdict: the figures of a report in sentences, and the thresholds that they are judged by."""

from dataclasses import replace

from utils.evaluation.memorization import default_copy_rate
from utils.evaluation.report import Report
from utils.evaluation.style import PARTS, weakest

FORGETS_LITTLE, FORGETS_MUCH = 1, 20  # percent more bits for general text
MEMORIZES = 0.1  # of the training blocks continued verbatim
LOOPS = 0.1  # of the samples
DECAYS, MIN_QUARTER = 0.1, 500  # rise of a share from the first quarter of the samples to the last; tokens of a quarter
SUPPORTS = 0.75  # of the gap from base to author, with the author inside the interval
AMOUNTS = [
    (0.05, "Hardly any"),
    (0.25, "A small part"),
    (0.4, "Less than half"),
    (0.6, "Half"),
    (0.9, "More than half"),
    (1, "Nearly all"),
]
UNSPACED = ("The script has no spaces between words: words are characters and pairs of neighboring characters; lengths "
            "and copies count characters.")  # fmt: skip
FAULTS = {"copies": "it copies", "memorized": "it recites", "forgot": "it forgot much"}


def judge(report: Report) -> Report:
    """Return the report with its verdict, the most important sentence first, and flags; None: undecided."""
    judged = {
        "learned_the_book": _judge_gain(report),
        "copies": _judge_copying(report),
        "memorized": _judge_memorization(report),
        "forgot": _judge_forgetting(report),
    }
    flags = {name: flag for name, (_, flag) in judged.items()}
    gain, *others = [sentence for sentence, _ in judged.values()]
    faults = [fault for name, fault in FAULTS.items()
              if flags[name] and not (name == "forgot" and report.other_language)]  # fmt: skip
    if flags["learned_the_book"] is False:
        faults.append("its gain on unseen pages does not show it")
    headline, writes = describe_gap((report.parts or {}).get("finetuned", {}), faults, *_unknown(report), report.reader,
                                    report.said_of_unknown, report.reader_is_base)  # fmt: skip
    opening = [gain, headline] if flags["learned_the_book"] is False else [headline, gain]
    if report.other_book:
        opening.insert(0, "A control: the validation text is of another book than the model was trained on.")
    closing = []
    decay, decays = _judge_decay(report)
    if decays:
        closing.append(decay)
    loops = (report.repetition or {}).get("finetuned", {}).get("loops") or 0
    if loops >= LOOPS:
        closing.append(f"{loops:.0%} of its samples end in a loop; a higher --temperature helps.")
    if report.max_copy:
        limit = report.max_copy
        closing.append(f"--max-copy {limit['tokens']} restricted the choice of {limit['acted']:,} of the "
                       f"{limit['generated']:,} tokens of both models.")  # fmt: skip
    texts = {name: _judge_text(report, figures) for name, figures in report.judged.items()}
    closing += [f"{name}: {figures['verdict']}" for name, figures in texts.items()]
    sentences = [
        *opening,
        UNSPACED if report.unspaced else None,
        _describe_words(report),
        _describe_spelling(report),
        _describe_sense(report),
        *others,
        *closing,
    ]
    return replace(report, verdict=[sentence for sentence in sentences if sentence], judged=texts,
                   flags=flags | {"decays": decays, "writes_like_the_book": writes})  # fmt: skip


def supports(share: dict[str, float]) -> bool | None:
    """Return whether a part's share of the gap supports that a text is like the author's; None: undecided."""
    if share["high"] < 1:  # the author is outside the interval
        return False
    return True if share["value"] >= SUPPORTS else None


def describe_gap(
    shares: dict[str, dict],
    faults: list[str],
    unknown: float | None,
    author_unknown: float | None,
    reader: str | None,
    said_of_unknown: str = "stand in neither book nor general text",
    own_reader: bool = False,
) -> tuple[str | None, bool | None]:
    """Say how far the weakest part has come, and return whether all parts support "writes like the book".

    It is None where a part is undecided, where sense is not measured, and where a model's own base is the reader:
    samples at temperature 1 are about as likely under a model as real text is, so that its base can show that their
    sense is not the book's, and cannot show that it is.

    Args:
        shares: the gap closed by each part that could be measured.
        faults: what else speaks against it.
        unknown: share of words that nobody wrote; author_unknown: the author's.
        reader: name of the model that measured the sense.
        said_of_unknown: Report.said_of_unknown.
        own_reader: whether the reader is the base of the model that wrote the texts.
    """
    if not shares:
        return None, None
    closed = weakest(shares)
    interval = f"{closed['value']:.2f} [{closed['low']:.2f}, {closed['high']:.2f}]"
    named = {part: f"{part} ({share['value']:.2f}{f', read by {reader}' if part == 'sense' else ''})"
             for part, share in shares.items()}  # fmt: skip
    has, lacks, undecided = ([part for part in PARTS if part in shares and supports(shares[part]) is answer]
                             for answer in (True, False, None))  # fmt: skip
    unmeasured = _join([part for part in PARTS if part not in shares])
    closing = f"; {unmeasured} could not be measured." if unmeasured else "."
    owned, missing = _join([named[part] for part in has]), _join([named[part] for part in lacks], "or")
    supported = "sense" in has and not lacks and not undecided
    if supported and not faults and not own_reader:
        claim = "It writes like the book: it is as near to the author as can be measured"
        return f"{claim} ({interval}), by {owned}{closing}", True
    clauses = []
    if has:
        clauses.append(f"it has the book's {owned}" + (f", not its {missing}" if lacks else ""))
    elif lacks:
        clauses.append(f"it does not have the book's {missing}")
    if undecided:
        clauses.append(f"there is too little text to decide on its {_join([named[part] for part in undecided])}")
    if "spelling" in lacks:
        clauses.append(f"{unknown:.1%} of its words (the author: {author_unknown:.1%}) {said_of_unknown}")
    if supported and own_reader:
        clauses.append("its own base cannot confirm the sense, another --reader-model can")
    if faults:
        clauses.append(f"but {_join(faults)}")
    amount = next(words for bound, words in AMOUNTS if closed["value"] <= bound)
    sentence = f"{amount} of the way from the base model to the author ({interval}): {'; '.join(clauses)}"
    return sentence + closing, False if lacks or faults else None


def _unknown(report: Report) -> tuple[float | None, float | None]:
    rates = report.unknown_words or {}
    return rates.get("finetuned"), rates.get("reference")


def _judge_text(report: Report, figures: dict) -> dict:
    """Return the figures of a judged file with verdict, copies and writes_like_the_book."""
    rate = figures["copy_rate"]
    copies = None if rate is None else rate > _copy_limit(report)
    faults = [f"{rate:.1%} of its tokens are copied"] if copies else []
    unknown, author_unknown = figures.get("unknown_words"), _unknown(report)[1]
    sentence, writes = describe_gap(figures.get("parts") or {}, faults, unknown, author_unknown, report.reader,
                                    report.said_of_unknown)  # fmt: skip
    if writes and report.reader_is_base:
        sentence += " The reader cannot confirm this of texts by models that were fine-tuned from it."
    if sentence is None:
        sentence = f"Not judged: {figures['missing']}." if figures.get("missing") else "No part could be measured."
        sentence = f"It copies: {faults[0]}. {sentence}" if copies else sentence
    empty = dict.fromkeys(("unknown_words", "delta", "reader_auc", "gap_closed"))
    writes = False if copies else writes
    return empty | figures | {"copies": copies, "writes_like_the_book": writes, "verdict": sentence}


def _describe_share(report: Report, part: str) -> str:
    if "reference" not in (report.parts or {}):
        return ""
    share = report.parts["finetuned"].get(part)
    if share is None:
        return "; the gap between base and author does not exceed its noise"
    return "; {value:.2f} [{low:.2f}, {high:.2f}] of the gap closed".format(**share)


def _enumerate(figures: dict[str, float], form: str) -> str:
    """Put a measure's columns into words: "0.445 (author 0.398, base 0.781)"."""
    others = [f"{label} {form.format(figures[name])}" for name, label in (("reference", "author"), ("base", "base"))
              if name in figures]  # fmt: skip
    return f"{form.format(figures['finetuned'])} ({', '.join(others)})"


def _describe_words(report: Report) -> str | None:
    if report.delta is None:
        return None
    figures = _enumerate(report.delta, "{:.3f}")
    return f"Words: Burrows' Delta from the book is {figures}{_describe_share(report, 'words')}."


def _describe_spelling(report: Report) -> str | None:
    if report.unknown_words is None:
        return None
    return (f"Spelling: the share of words that {report.said_of_unknown} is "
            f"{_enumerate(report.unknown_words, '{:.1%}')}{_describe_share(report, 'spelling')}.")  # fmt: skip


def _describe_sense(report: Report) -> str | None:
    if report.reader_auc is None:
        return None
    auc = {name: figure["value"] for name, figure in report.reader_auc.items()}
    lenient = ", the base model itself, which is lenient with text of its own kind" if report.reader_is_base else ""
    return (f"Sense: a reader ({report.reader}{lenient}) tells it from the book with an AUC of "
            f"{_enumerate(auc, '{:.2f}')}, 0.5 being not at all{_describe_share(report, 'sense')}.")  # fmt: skip


def _judge_gain(report: Report) -> tuple[str | None, bool | None]:
    """Claim no more than the likelihood of unseen pages supports."""
    book, style = report.book_gain, report.style_gain
    if book is None:
        return None, None
    cost = f"unseen pages cost {abs(book['value']):.2f} bits per byte {'less' if book['value'] > 0 else 'more'}"
    cost += " than for the base model"
    if book["value"] <= 0:
        return f"It did not learn the book: {cost}.", False
    if book["low"] <= 0:
        bounds = f"{book['low']:.2f} to {book['high']:.2f}"
        return f"It is not certain that it learned the book: {cost} (interval of the gain {bounds}).", False
    if style is None:
        return (f"{cost.capitalize()}; whether it learned more than the book's language is not known without enough "
                "general text of that language."), None  # fmt: skip
    if style["low"] <= 0:
        general = report.control_gain["value"]
        change = f"{abs(general):.2f} {'less' if general > 0 else 'more'}"
        return (
            f"It is not certain that it learned anything of this book alone: {cost}, and general text {change}.",
            False,
        )
    return f"It learned the book: {cost}.", True


def _copy_limit(report: Report) -> float:
    return default_copy_rate((report.copy_rate or {}).get("reference", {}).get("8") or 0.0)


def _judge_copying(report: Report) -> tuple[str | None, bool | None]:
    if report.copy_rate is None:
        return None, None
    rate, longest = report.copy_rate["finetuned"]["8"] or 0.0, report.longest_copy["finetuned"]["tokens"]
    own = report.copy_rate.get("reference", {}).get("8")
    copies = rate > _copy_limit(report)
    author = "" if own is None else f"; the author's own unseen pages have {own:.1%}"
    return (f"It copies {'much' if copies else 'little'}: {rate:.1%} of its tokens lie in n-grams of 8 or more tokens "
            f"of the training text, the longest span has {longest} tokens{author}."), copies  # fmt: skip


def _judge_memorization(report: Report) -> tuple[str | None, bool | None]:
    if report.extraction is None:
        return None, None
    train, validation = (report.extraction["finetuned"][split] for split in ("train", "validation"))
    memorized = train["exact_match"] >= MEMORIZES and train["exact_match"] > validation["exact_match"]
    case = (f"given the beginnings of {train['prefixes']} training blocks, it continues {train['exact_match']:.0%} of "
            f"them word for word for {train['tokens']} tokens")  # fmt: skip
    most = max(train["extractable"], key=int)
    share, base = (report.extraction[name]["train"]["extractable"][most] for name in ("finetuned", "base"))
    case += f"; {int(most):,} samples each are likely to hold {share:.0%} of them (the base model's {base:.0%})"
    if memorized:
        return f"It recites: {case}. Do not share it.", True
    hidden = share >= MEMORIZES and share > base
    return f"It does not recite{' at once, but can be made to' if hidden else ''}: {case}.", False


def _judge_forgetting(report: Report) -> tuple[str | None, bool | None]:
    percent = report.forgetting_percent
    if percent is None:
        return None, None
    amount = ("nothing" if percent <= 0 else "hardly anything" if percent < FORGETS_LITTLE
              else "little" if percent < FORGETS_MUCH else "much")  # fmt: skip
    change = f"{abs(percent):.1f}% {'more' if percent >= 0 else 'fewer'} bits than before"
    language = ", which is of another language than the book," if report.other_language else ""
    return f"It forgot {amount}: general text{language} costs {change}.", percent >= FORGETS_MUCH


def _judge_decay(report: Report) -> tuple[str, bool | None]:
    """Compare the last quarter of the samples with the first; what the author's own rises by does not count."""
    columns = report.by_quarter or {}
    if "finetuned" not in columns or min(columns["finetuned"]["tokens"]) < MIN_QUARTER:
        return "", None
    clauses = []
    for key, what in (("repeated_4grams", "repeated 4-grams"), ("copy_rate", "copied tokens")):
        ends = {name: (column[key][0], column[key][-1]) for name, column in columns.items() if None not in column[key]}
        first, last = ends.get("finetuned", (0.0, 0.0))
        author_first, author_last = ends.get("reference", (0.0, 0.0))
        if last - first - max(0.0, author_last - author_first) >= DECAYS:
            author = f" (author {author_first:.1%} to {author_last:.1%})" if "reference" in ends else ""
            clauses.append(f"{what} rise from {first:.1%} to {last:.1%}{author}")
    return f"It decays from the first quarter of its samples to the last: {_join(clauses)}.", bool(clauses)


def _join(names: list[str], word: str = "and") -> str:
    """Enumerate: ["words", "spelling", "sense"] -> "words, spelling and sense"."""
    return f" {word} ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
