"""Worker processes: call one function on many items, with the results in the order of the items."""

import functools
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, connection, get_context, parent_process
from typing import Any

from utils.errors import EXIT_MACHINE, UserError

SMALL_TEXT = 1 << 26  # bytes; with less, the tokenizer's own threads are as fast
MAX_WORKERS = 8


def choose_workers(n_bytes: int) -> int:
    """Return the number of workers for a text: 0 for a small one, else one per core up to MAX_WORKERS."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores, MAX_WORKERS) if n_bytes > SMALL_TEXT and cores > 1 else 0


@contextmanager
def open_workers(function: Callable[[Any], Any], n_workers: int) -> Iterator[Callable[[Iterable], Iterator[tuple]]]:
    """Start worker processes; yield a map of items to (item, function(item)), in order and a few items ahead.

    With 0 workers, this process calls the function. `function` may be a closure or a bound method: workers are forked.
    UserError (exit status 3) if a worker is killed. At the end, whatever ends it, no worker is left.
    """
    if not n_workers:
        yield lambda items: ((item, function(item)) for item in items)
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork, and a worker is for one core
    pool = ProcessPoolExecutor(n_workers, get_context("fork"), _start_worker, (function,))
    try:
        yield functools.partial(_map_in_order, pool, n_workers + 2)
    except BaseException as error:
        for child in active_children():
            child.kill()
        if isinstance(error, BrokenProcessPool):
            advice = f"use less than --num-workers {n_workers}" if n_workers > 1 else "free memory and try again"
            raise UserError(f"a worker process was killed (out of memory?); {advice}", EXIT_MACHINE) from error
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _map_in_order(pool: ProcessPoolExecutor, ahead: int, items: Iterable) -> Iterator[tuple]:
    waiting = deque()
    for item in items:
        waiting.append((item, pool.submit(_call, item)))
        if len(waiting) > ahead:
            item, future = waiting.popleft()
            yield item, future.result()
    for item, future in waiting:
        yield item, future.result()


def _start_worker(function: Callable) -> None:
    global _function
    _function = function
    # A terminal's signals go to all processes; the main process ends the workers. It does so with SIGTERM, too.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    connection.wait([parent_process().sentinel])
    os._exit(1)


def _call(item: Any) -> Any:
    return _function(item)
