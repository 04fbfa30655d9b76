"""What a model was trained on, kept beside it, so that no page of it is ever taken for an unseen one.

The runs of 32 tokens are kept as hashes: enough to know a page again, not to read it.
"""

from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from utils.errors import UserError
from utils.evaluation.ngrams import keep_one_in, sample_ngrams
from utils.storage import replacing

SEEN = "training_ngrams.safetensors"
OTHER_BOOK_SHARE = 0.01  # of its runs another book may share: a licence, a quotation


def write_seen(folder: Path, train: np.ndarray) -> None:
    """Keep the hashes of all runs of training; of more than eight million tokens a sample.

    Args:
        folder: the run's.
        train: (N,) token ids of all training blocks.
    """
    one_in = keep_one_in(len(train))
    with replacing(folder / SEEN) as partial:
        hashes = np.unique(sample_ngrams(train, one_in))
        partial.write_bytes(save({"hashes": hashes, "one_in": np.array([one_in], np.uint64)}))


def count_seen(folder: Path, segments: list[np.ndarray]) -> tuple[int, int]:
    """Count the runs of 32 tokens that a model was trained on.

    Args:
        folder: of the model.
        segments: token ids of each held-out segment.
    Returns:
        How many were, and how many were looked for.
    Raises:
        UserError: there is no record, or it cannot be read.
    """
    try:
        seen = load_file(folder / SEEN)
        hashes, one_in = seen["hashes"], int(seen["one_in"][0])
    except (OSError, SafetensorError, LookupError) as error:
        raise UserError(
            f"{folder / SEEN} cannot be read, so that it is not known what was trained on: {error}"
        ) from None
    runs = np.concatenate([np.zeros(0, np.uint64), *(sample_ngrams(ids, one_in) for ids in segments)])
    return int(np.isin(runs, hashes).sum()), len(runs)


def check_unseen(folder: Path, recorded: dict, data) -> bool | None:
    """Refuse held-out text that a model was trained on.

    Args:
        folder: of the model.
        recorded: its run_config.json; {} where it has none.
        data: the Blocks whose validation text is to be called unseen.
    Returns:
        Whether the data is of another book than the model's, None where it is not known.
    Raises:
        UserError: a run of 32 tokens of it stands in what the model was trained on.
    """
    if not recorded:
        return None
    if recorded.get("settings", {}).get("data_sha256") == data.sha256:
        return False
    before, now = recorded["data"]["settings"], data.manifest["settings"]
    is_other = not set(before["books"]) & set(now["books"])
    seen, n_ngrams = count_seen(folder, data.segments("validation"))
    if seen > (OTHER_BOOK_SHARE * n_ngrams if is_other else 0):
        split = f"--seed {before['seed']}" + (f" --val-split {before['val_split']}" if before["val_split"] else "")
        raise UserError(
            f"data: {data.folder} is another split than the model's: {seen:,} of {n_ngrams:,} runs of 32 tokens "
            f"of its held-out text were trained on; prepare it as before ({split}) or train again"
        )
    return is_other
