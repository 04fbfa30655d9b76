"""metrics.jsonl of a run that was killed, and values that are no numbers."""

import json
import math

import pytest

from utils.training.metrics import METRICS, MetricsLog, read_metrics

ROWS = [{"step": 0, "eval/loss": 4.0}, {"step": 1, "train/loss": 3.5}, {"step": 2, "train/loss": 3.0},
        {"step": 2, "eval/loss": 3.2}, {"step": 3, "train/loss": 2.9}]  # fmt: skip


@pytest.mark.parametrize(("step", "evaluated_step", "kept"), [(3, 2, 5), (2, 2, 4), (2, 0, 3), (1, 0, 2), (0, -1, 0)])
def test_lines_of_work_that_is_done_again_are_dropped(tmp_path, step, evaluated_step, kept):
    """Training lines after the step, and evaluations after the last one that is known."""
    (tmp_path / METRICS).write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    MetricsLog(tmp_path, step, evaluated_step).close()
    assert read_metrics(tmp_path) == ROWS[:kept]


def test_lines_after_a_damaged_one_are_dropped(tmp_path):
    (tmp_path / METRICS).write_text(json.dumps(ROWS[0]) + '\n{"step": 1, "train/l\n' + json.dumps(ROWS[2]) + "\n")
    assert read_metrics(tmp_path) == ROWS[:1]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_never_written(tmp_path, value):
    log = MetricsLog(tmp_path, 0, -1)
    log.write(1, {"train/loss": 3.5})
    with pytest.raises(ValueError, match="not JSON compliant"):
        log.write(2, {"train/loss": value})
    assert read_metrics(tmp_path) == [{"step": 1, "train/loss": 3.5}]
