"""Files opened, and their rows read by several processes."""

import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import NamedTuple

from tqdm import tqdm

from mmpeft.checks import Problem
from mmpeft.data_check.scan import Found, RowProblem, scan
from mmpeft.formats import RowError, open_rows

RANGE = 250  # rows that a process takes at a time
ALONE = 500  # rows up to which starting processes takes longer than it saves
_work: tuple = ()  # in a worker process: what `_scan` takes, but for the place


class Source(NamedTuple):
    """One file.

    Attributes:
        file: as it was named.
        use: ``"train"`` or ``"eval"``.
        rows: as ``open_rows`` gives them; empty where a bad row kept it from being opened.
        found: what they hold.
    """

    file: str
    use: str
    rows: object
    found: Found


def read(
    files: list[tuple[str, str]], options: dict, processor, limit: int, workers: int | None
) -> list[Source]:
    """Open files, given with their uses, and read each of their rows once.

    Raises:
        ValueError, OSError: a file that cannot be opened at all, or a process that died.
    """
    opened = [_open(file, options) for file, _ in files]
    rows = [[] if isinstance(one, Found) else one for one in opened]
    ranges = [
        (number, start, min(start + RANGE, len(one)))
        for number, one in enumerate(rows)
        for start in range(0, len(one), RANGE)
    ]
    parts: dict[int, list[Found]] = {
        number: [one] if isinstance(one, Found) else [] for number, one in enumerate(opened)
    }
    total = sum(map(len, rows))
    questions = any(use == "eval" for _, use in files)
    work = (rows, processor, questions, limit)
    with tqdm(total=total, desc="checking", unit="row", unit_scale=True) as bar:
        for (number, *_), part in zip(
            ranges, _scanned(work, ranges, _processes(workers, total)), strict=True
        ):  # fmt: skip
            parts[number].append(part)
            bar.update(part.rows)
    return [
        Source(file, use, rows[number], Found.joined(parts[number], limit))
        for number, (file, use) in enumerate(files)
    ]


def _open(file: str, options: dict):
    """The rows; or, where one is too bad to tell what the file holds, that as what was found."""
    try:
        return open_rows(file, **options)
    except RowError as error:
        found = Found(0)
        found.add(
            RowProblem("row", error.where, Problem(error.field, error.problem, error.remedy)), 1
        )
        return found


def _processes(workers: int | None, rows: int) -> int:
    if workers is not None and workers < 0:
        raise ValueError(f"--workers is {workers}; it must be 0 or more.")
    if workers is None:
        known = hasattr(os, "sched_getaffinity")  # a container may be given fewer than there are
        cores = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
        workers = cores if rows > ALONE else 0
    return workers if workers > 1 else 0


def _scanned(work: tuple, ranges: list[tuple], workers: int):
    """What each range holds, in order."""
    if not workers:
        yield from map(partial(_scan, *work), ranges)
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the processes are parallel
    pool = ProcessPoolExecutor(workers, initializer=_begin, initargs=work)
    try:
        yield from pool.map(_scan_in_worker, ranges)
    except BrokenProcessPool:
        raise ValueError(
            "a process that checked rows died, perhaps for lack of memory; --workers 0 checks "
            "without further processes, and shows how far it comes."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _scan(rows: list, processor, questions: bool, limit: int, place: tuple[int, int, int]) -> Found:
    number, start, stop = place
    return scan(rows[number], start, stop, processor, questions, limit)


def _begin(*work) -> None:
    global _work
    _work = work


def _scan_in_worker(place: tuple[int, int, int]) -> Found:
    return _scan(*_work, place)
