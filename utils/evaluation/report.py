"""The report: the content of report.json, and its score table. Measures nothing."""

from dataclasses import dataclass, field
from typing import Any

from utils.evaluation.memorization import COVERED_LETTERS, COVERED_WORDS

FORMAT = 1
NAMES = {"base": "base model", "finetuned": "fine-tuned model", "reference": "author (reference)"}
INTERVAL = "{value:.3f} [{low:.3f}, {high:.3f}]"
MOST_SAMPLES = "10000"  # per block, in the table
MANY = "share of blocks, with 10,000 samples each"


@dataclass(frozen=True)
class Report:
    """Content of report.json; a field that is None was not measured, and is absent there.

    A column is base, finetuned or reference (the author's own text). An interval is {value, low, high}.
    """

    verdict: list[str] = field(default_factory=list)
    flags: dict[str, bool | None] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)  # a sentence for each measure that was not possible
    unspaced: bool = False  # the script has no spaces between words
    other_language: bool = False  # the general text is of another language than the book
    other_book: bool = False  # the data is of another book than the model
    settings: dict[str, Any] = field(default_factory=dict)
    books: list[dict] = field(default_factory=list)
    n_samples: int = 0
    shown_ngram: int = 0  # tokens of the shortest copied span that is marked
    scores: dict[str, dict] = field(default_factory=dict)  # by "book" or "control", then column
    book_gain: dict[str, float] | None = None  # intervals, bits per byte
    control_gain: dict[str, float] | None = None
    style_gain: dict[str, float] | None = None
    forgetting: dict[str, float] | None = None  # interval, percent
    forgetting_percent: float | None = None
    extraction: dict[str, dict] | None = None  # by column, then split
    copy_rate: dict[str, dict] | None = None  # by column, then n-gram length
    longest_copy: dict[str, dict] | None = None
    repetition: dict[str, dict] | None = None
    by_quarter: dict[str, dict] | None = None  # by column: copying and repetition in each quarter of the texts
    lengths: dict[str, dict] | None = None
    counts: dict[str, dict] | None = None
    coverage: dict[str, dict] | None = None  # of the book's words by spans in the texts
    delta: dict[str, float] | None = None
    cosine_delta: dict[str, float] | None = None
    unknown_words: dict[str, float] | None = None  # share of the words
    reader_auc: dict[str, dict] | None = None  # intervals, by column
    intervals: dict[str, dict] | None = None  # of the measures above, by column: [low, high]
    reader: str | None = None  # name of the model that reads
    reader_is_base: bool = True
    parts: dict[str, dict] | None = None  # by column, then words, spelling, sense: the gap closed, intervals
    gap_closed: dict[str, dict | None] | None = None  # by column: that of the weakest part
    judged: dict[str, dict] = field(default_factory=dict)  # texts from elsewhere, by file
    words: list[dict] | None = None
    words_compared: int | None = None
    texts_compared: int | None = None
    max_copy: dict[str, int] | None = None
    training: dict[str, Any] = field(default_factory=dict)
    texts: list[dict] = field(default_factory=list)
    sources: list[dict] = field(default_factory=list)
    quiz: list[dict] = field(default_factory=list)  # of single snippets
    quiz_pairs: list[dict] = field(default_factory=list)
    quiz_intervals: list[list[float]] = field(default_factory=list)
    card_metadata: str = ""

    @property
    def said_of_unknown(self) -> str:
        """What is said of unknown words."""
        return "do not stand in the book" if self.other_language else "stand in neither book nor general text"

    def to_dict(self) -> dict[str, Any]:
        """Return the content of report.json."""
        return {"format": FORMAT} | {name: value for name, value in vars(self).items() if value is not None}


def list_columns(report: Report) -> dict[str, str]:
    """Return the headings of the score table's columns: the usual ones, and each judged file."""
    return NAMES | {f"judged/{name}": name for name in report.judged}


def list_scores(report: Report) -> list[dict[str, str]]:
    """Return the scores as rows of label, hint and one text per column."""
    rows, columns = [], list_columns(report)
    for label, hint, form, values in _list_figures(report):
        cells = dict.fromkeys(columns, "")
        for name, value in values.items():
            if value is not None and name in columns:
                cells[name] = INTERVAL.format(**value) if isinstance(value, dict) else form.format(value)
        if any(cells.values()):
            rows.append({"label": label, "hint": hint, **cells})
    return rows


def list_quarters(report: Report) -> list[dict[str, Any]]:
    """Return copying and repetition by position as rows of label and one text per quarter."""
    measures = {"copy_rate": "tokens in n-grams of 8+", "repeated_4grams": "repeated 4-grams"}
    return [
        {"label": f"{label}: {NAMES[name]}", "quarters": [f"{share:.1%}" for share in quarters[key]]}
        for key, label in measures.items()
        for name, quarters in (report.by_quarter or {}).items()
        if None not in quarters[key]
    ]


def _list_figures(report: Report) -> list[tuple[str, str, str, dict[str, Any]]]:
    """List label, hint, format and values by column, numbers or intervals, of all measures."""

    def pick(figures: dict | None, *keys: str) -> dict:
        for key in keys:
            figures = {name: column[key] for name, column in (figures or {}).items() if column and key in column}
        return figures or {}

    judged = {f"judged/{name}": figures for name, figures in report.judged.items()}
    bounds = {key: {name: dict(zip(("low", "high"), ends, strict=True)) for name, ends in columns.items()}
              for key, columns in (report.intervals or {}).items()}  # fmt: skip
    delta, cosine = (
        {name: {"value": value, **bounds[key][name]} for name, value in (getattr(report, key) or {}).items()}
        for key in ("delta", "cosine_delta")
    )
    shares = (report.parts or {}) | pick(judged, "parts")
    book, control = report.scores.get("book"), report.scores.get("control")
    train, validation = pick(report.extraction, "train"), pick(report.extraction, "validation")
    own = {key: f"the book has {value:.1f}" for key, value in (report.lengths or {}).get("book", {}).items() if value}
    texts, words = ((report.counts or {}).get(key, {}) for key in ("texts", "words"))
    lower, nearer, found = (
        "lower is better",
        "words; nearer to the author is better",
        "share, found in the training text",
    )
    gain = "bits per byte less than the base model"
    shortest = COVERED_LETTERS if report.unspaced else COVERED_WORDS
    return [
        ("validation text: loss, nats per token", lower, "{:.4f}", pick(book, "eval/loss")),
        ("validation text: perplexity", lower, "{:.2f}", pick(book, "eval/perplexity")),
        ("validation text: bits per byte", lower, "{:.4f}", pick(book, "eval/bits_per_byte")),
        ("general text: bits per byte", lower, "{:.4f}", pick(control, "eval/bits_per_byte")),
        ("gain on validation text", gain, "", {"finetuned": report.book_gain}),
        ("gain on general text", gain, "", {"finetuned": report.control_gain}),
        ("style gain", "bits per byte, difference of these gains", "", {"finetuned": report.style_gain}),
        ("forgetting", "% more bits for general text", "", {"finetuned": report.forgetting}),
        ("Burrows' Delta", nearer, "", delta | pick(judged, "delta")),
        ("cosine Delta", nearer, "", cosine),
        ("unknown words", f"share; {report.said_of_unknown}", "{:.2%}",
         (report.unknown_words or {}) | pick(judged, "unknown_words")),
        ("reader's AUC against the book", "0.5: cannot be told apart", "",
         (report.reader_auc or {}) | pick(judged, "reader_auc")),
        ("gap closed: words", "share, by Delta", "", pick(shares, "words")),
        ("gap closed: spelling", "share, by unknown words", "", pick(shares, "spelling")),
        ("gap closed: sense", "share, by the reader", "", pick(shares, "sense")),
        ("gap closed", "share, of the weakest part", "", (report.gap_closed or {}) | pick(judged, "gap_closed")),
        ("tokens in n-grams of 8+", found, "{:.2%}", pick(report.copy_rate, "8") | pick(judged, "copy_rate")),
        ("tokens in n-grams of 16+", found, "{:.2%}", pick(report.copy_rate, "16")),
        ("tokens in n-grams of 32+", found, "{:.2%}", pick(report.copy_rate, "32")),
        ("longest copied span", "tokens", "{:,}", pick(report.longest_copy, "tokens")),
        ("longest copied span, in words", "words", "{:,}", pick(report.coverage, "longest_words")),
        ("book covered by the samples", f"share of words, in spans of {shortest}+", "{:.2%}",
         pick(report.coverage, "covered")),
        ("continued verbatim, training", "share of blocks", "{:.0%}", pick(train, "exact_match")),
        ("tokens before a difference, training", "mean", "{:.2f}", pick(train, "mean_matched")),
        ("extractable, training", MANY, "{:.0%}", pick(train, "extractable", MOST_SAMPLES)),
        ("log probability, training", "nats per token", "{:.2f}", pick(train, "mean_log_prob")),
        ("continued verbatim, validation", "share of blocks", "{:.0%}", pick(validation, "exact_match")),
        ("tokens before a difference, validation", "mean", "{:.2f}", pick(validation, "mean_matched")),
        ("extractable, validation", MANY, "{:.0%}", pick(validation, "extractable", MOST_SAMPLES)),
        ("log probability, validation", "nats per token", "{:.2f}", pick(validation, "mean_log_prob")),
        ("repeated 4-grams", "share", "{:.1%}", pick(report.repetition, "repeated_4grams")),
        ("distinct tokens", "share", "{:.1%}", pick(report.repetition, "distinct_1")),
        ("distinct pairs", "share", "{:.1%}", pick(report.repetition, "distinct_2")),
        ("samples that end in a loop", "share", "{:.1%}", pick(report.repetition, "loops")),
        ("words per sentence", own.get("sentence_words", ""), "{:.1f}", pick(report.lengths, "sentence_words")),
        ("words per paragraph", own.get("paragraph_words", ""), "{:.1f}", pick(report.lengths, "paragraph_words")),
        ("texts", "different ones", "{:,}", texts | pick(judged, "n_texts")),
        ("words", "in these texts", "{:,}", words | pick(judged, "n_words")),
    ]  # fmt: skip
