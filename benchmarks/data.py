"""Opening and checking a JSONL file of chats without pictures: rows a second, and memory.

    python -m benchmarks data
    python -m benchmarks data --rows 100000 --workers 0 2 --json

A file of a million rows is made, each with a question and an answer of its own. A process of its
own opens it and draws rows; then, for each number of workers, one checks it as `mmpeft data check`
does. Memory is by how much the process grew at most (read from /proc, so this needs Linux). Beside
rows a second of the clock there are those of the processors' time, which other work on the machine
changes less. Nothing else should run on the machine.
"""

import argparse
import contextlib
import json
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from benchmarks.dataset import WORDS, megabytes

DRAWN = 1000


def write_rows(path: Path, rows: int, seed: int = 0) -> None:
    """A JSONL file of chats without pictures, no two alike."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for number in tqdm(range(rows), desc="writing", unit="row", unit_scale=True):
            question = " ".join(draw.choices(WORDS, k=draw.randint(4, 12)))
            answer = " ".join(draw.choices(WORDS, k=draw.randint(4, 24)))
            messages = [{"role": "user", "content": f"What is {question} of {number}?"},
                        {"role": "assistant", "content": f"{answer}."}]  # fmt: skip
            file.write(json.dumps({"messages": messages}) + "\n")


def opening(path: str) -> dict:
    """Seconds and MiB of opening, and microseconds of a row drawn at random."""
    from mmpeft.formats import open_rows

    few = Path(path).with_name("few.jsonl")  # what is imported for the first row stays out
    with Path(path).open() as file:
        few.write_text(file.readline())
    open_rows(few)
    held, began = megabytes(), time.perf_counter()
    rows = open_rows(path)
    opened = time.perf_counter() - began
    grown = megabytes() - held
    began = time.perf_counter()
    for index in random.Random(0).choices(range(len(rows)), k=DRAWN):
        rows[index]
    drawn = time.perf_counter() - began
    return {"seconds": opened, "mb": grown, "row_us": 1e6 * drawn / DRAWN,
            "mb_after_rows": megabytes() - held}  # fmt: skip


def checking(path: str, workers: int) -> dict:
    """Rows a second of a check, opening included."""
    from mmpeft.data_check import check_data

    held, began, used = megabytes(), time.perf_counter(), processor_seconds()
    report = check_data([path], workers=workers).report
    seconds, used = time.perf_counter() - began, processor_seconds() - used
    if report["errors"]:
        raise RuntimeError(f"the rows are good, but: {report['errors'][0]}")
    return {
        "workers": workers,
        "seconds": seconds,
        "rows_per_second": report["rows"] / seconds,
        "rows_per_processor_second": report["rows"] / used,
        "mb": most_megabytes() - held,
    }


def most_megabytes() -> float:
    """The most memory that this process ever held; that of `getrusage` counts its parent's."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def processor_seconds() -> float:
    """Time that processors spent on this process and on its children that ended."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(sum(resource.getrusage(kind)[:2]) for kind in kinds)


def bench(rows: int, workers: list[int]) -> dict:
    """The report that ``--json`` prints."""
    from mmpeft.run_folder import environment

    with tempfile.TemporaryDirectory(prefix="mmpeft-data-") as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, rows)

        def measured(*more) -> dict:
            command = [sys.executable, "-m", "benchmarks", "data", "--file", str(path), *more]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            return json.loads(done.stdout.splitlines()[-1])

        return {
            "schema": "mmpeft.bench.data/1",
            "rows": rows,
            "file_mb": path.stat().st_size / 1e6,
            "opening": measured(),
            "checking": [measured("--workers", str(number)) for number in workers],
            "environment": environment(),
        }


def render(report: dict) -> str:
    opened = report["opening"]
    lines = [
        f"{report['rows']:,} rows, {report['file_mb']:.0f} MB",
        f"opening: {opened['seconds']:.2f} s, {opened['mb']:.0f} MiB; a row {opened['row_us']:.0f} "
        f"us, after {DRAWN:,} of them {opened['mb_after_rows']:.0f} MiB",
        f"{'workers':>8}{'seconds':>10}{'rows/s':>12}{'rows/CPU s':>12}{'MiB':>10}",
    ]
    lines += [
        f"{row['workers']:>8}{row['seconds']:>10.1f}{row['rows_per_second']:>12,.0f}"
        f"{row['rows_per_processor_second']:>12,.0f}{row['mb']:>10.0f}"
        for row in report["checking"]
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the file (1000000)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="processes (0 2)")
    parser.add_argument("--output", default="benchmarks/results", help="folder of the results")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, only that")
    parser.add_argument("--file", help=argparse.SUPPRESS)  # measure this one, in this process
    arguments = parser.parse_args()
    if arguments.file:
        given = "--workers" in sys.argv
        measured = checking(arguments.file, *arguments.workers) if given else None
        print(json.dumps(measured or opening(arguments.file)))
        return
    with contextlib.redirect_stdout(sys.stderr):
        report = bench(arguments.rows, arguments.workers)
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "data.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report) if arguments.json else render(report))


if __name__ == "__main__":
    main()
