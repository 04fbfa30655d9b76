"""Whether validation text is unseen: the n-grams a model was trained on are kept in its folder as hashes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from utils.errors import UserError
from utils.evaluation.ngrams import OVERLAP_TOKENS, keep_one_in, sample_ngrams
from utils.storage import diff_settings, replacing

TRAINING_NGRAMS = "training_ngrams.safetensors"
SPLIT_SETTINGS = ("books", "encoding", "clean", "seed", "val_split", "val_path")
SAME_BOOK_SHARE = 0.1  # of its training n-grams; an edited copy shares more with the model's book, another book less
OTHER_BOOK_SHARE = 0.01  # of its validation n-grams that another book may share: a licence, a quotation


def save_training_ngrams(folder: Path, train: Sequence) -> None:
    """Save the hashes of the n-grams of training ids in a run's folder; of a large text, a sample."""
    one_in = keep_one_in(len(train))
    with replacing(folder / TRAINING_NGRAMS) as partial:
        hashes = np.unique(sample_ngrams(train, one_in))
        partial.write_bytes(save({"hashes": hashes, "one_in": np.array([one_in], np.uint64)}))


def count_seen_ngrams(folder: Path, segments: list[np.ndarray]) -> tuple[int, int]:
    """Return how many n-grams of the segments' token ids a model was trained on, and of how many."""
    path = folder / TRAINING_NGRAMS
    try:
        record = load_file(path)
        hashes, one_in = record["hashes"], int(record["one_in"][0])
    except (OSError, SafetensorError, LookupError) as error:
        raise UserError(f"{path} cannot be read ({error}); train the model again to compare it on this data") from None
    ngrams = np.concatenate([np.zeros(0, np.uint64), *(sample_ngrams(ids, one_in) for ids in segments)])
    return int(np.isin(ngrams, hashes).sum()), len(ngrams)


def is_known_training_text(folder: Path, recorded: dict, data) -> bool:
    """Return whether prepared data has the text that a model was trained on; also if the model does not say so."""
    try:
        return not check_unseen(folder, recorded, data)
    except UserError:  # some of it is validation text there
        return False


def check_unseen(folder: Path, recorded: dict, data) -> bool | None:
    """Refuse validation text that a model was trained on; return whether it is of another book, None if not known.

    Args:
        recorded: the model's run_config.json; {} without one.
        data: Blocks, whose validation text is counted if there is some.
    """
    try:
        if recorded["settings"]["data_sha256"] == data.sha256:
            return False
        settings = {"clean": None} | recorded["data"]["settings"]  # which older runs do not name
        split = {name: settings[name] for name in SPLIT_SETTINGS}
    except (KeyError, TypeError):  # the config of another program
        return None
    if diff_settings(data.manifest["settings"], split) is None:
        return False  # the same split, in other blocks
    (n_seen, n_ngrams), (n_seen_train, n_train) = (
        count_seen_ngrams(folder, ids) for ids in (data.segments("validation"), [data.ids("train")])
    )
    is_other_book = n_seen_train < SAME_BOOK_SHARE * n_train
    if n_seen > (OTHER_BOOK_SHARE * n_ngrams if is_other_book else 0):
        kept = f"--val-path {' '.join(split['val_path'])}" if split["val_path"] else f"--val-split {split['val_split']}"
        if split["clean"] != data.manifest["settings"].get("clean"):
            kept += f" --clean {split['clean']}" if split["clean"] else " and without --clean"
        raise UserError(
            f"data: {data.folder} is another split than the model's: {n_seen:,} of {n_ngrams:,} {OVERLAP_TOKENS}-token "
            f"n-grams of its validation text were trained on; prepare it with --seed {split['seed']} {kept}, "
            "or train again"
        )
    return is_other_book
