"""The verdict: the figures of a report in sentences, and the thresholds that they are judged by."""

from dataclasses import replace

from utils.evaluation.memorization import default_copy_rate
from utils.evaluation.report import Report

FORGETS_LITTLE, FORGETS_MUCH = 1, 20  # percent more bits for general text
MEMORIZES = 0.1  # of the training blocks continued verbatim
LOOPS = 0.1  # of the samples


def judge(report: Report) -> Report:
    """Return the report with its verdict, the most important sentence first, and flags; None: not measured."""
    judged = {
        "learned_the_book": _judge_gain(report),
        "copies": _judge_copying(report),
        "memorized": _judge_memorization(report),
        "forgot": _judge_forgetting(report),
    }
    sentences = [sentence for sentence, _ in judged.values() if sentence]
    if report.other_book:
        sentences.insert(0, "A control: the validation text is of another book than the model was trained on.")
    loops = (report.repetition or {}).get("finetuned", {}).get("loops") or 0
    if loops >= LOOPS:
        sentences.append(f"{loops:.0%} of its samples end in a loop; a higher --temperature helps.")
    if report.max_copy:
        limit = report.max_copy
        sentences.append(f"--max-copy {limit['tokens']} restricted the choice of {limit['acted']:,} of the "
                         f"{limit['generated']:,} tokens of both models.")  # fmt: skip
    return replace(report, verdict=sentences, flags={name: flag for name, (_, flag) in judged.items()})


def _judge_gain(report: Report) -> tuple[str | None, bool | None]:
    """Claim no more than the likelihood of unseen pages supports."""
    book, style = report.book_gain, report.style_gain
    if book is None:
        return None, None
    cost = f"unseen pages cost {abs(book['value']):.2f} bits per byte {'less' if book['value'] > 0 else 'more'}"
    cost += " than for the base model"
    if book["low"] <= 0:
        bounds = f"{book['low']:.2f} to {book['high']:.2f}"
        return f"It did not learn the book: {cost} (interval of the gain {bounds}).", False
    if style and style["low"] <= 0:
        general = report.control_gain["value"]
        change = f"{abs(general):.2f} {'less' if general > 0 else 'more'}"
        return f"It learned nothing of this book alone: {cost}, and general text {change}.", False
    return f"It learned the book: {cost}.", True


def _judge_copying(report: Report) -> tuple[str | None, bool | None]:
    if report.copy_rate is None:
        return None, None
    rate, longest = report.copy_rate["finetuned"]["8"] or 0.0, report.longest_copy["finetuned"]["tokens"]
    own = report.copy_rate.get("reference", {}).get("8")
    copies = rate > default_copy_rate(own or 0.0)
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
    return f"It recites: {case}. Do not share it." if memorized else f"It does not recite: {case}.", memorized


def _judge_forgetting(report: Report) -> tuple[str | None, bool | None]:
    percent = report.forgetting_percent
    if percent is None:
        return None, None
    amount = "much" if percent >= FORGETS_MUCH else "little" if percent >= FORGETS_LITTLE else "nothing"
    change = f"{abs(percent):.1f}% {'more' if percent >= 0 else 'fewer'} bits than before"
    return f"It forgot {amount}: general text costs {change}.", percent >= FORGETS_MUCH
