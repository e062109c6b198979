"""Start-up, memory and time a sample of a data set against its number of rows.

    python benchmarks/dataset.py
    python benchmarks/dataset.py --sizes 1000 100000 1000000 --json

A JSONL file of chats is made: every row asks about one of a few pictures in its own words and is
answered in other words. Each size is measured in a process of its own. Start-up is the time from
the file to a data set that is ready to train on, every row checked; memory is by how much the
process grew in that time, and again by the samples drawn (read from /proc, so this needs Linux).
"""

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIZES = (1_000, 10_000, 100_000)
SAMPLES = 300
PICTURES = 8
WORDS = [
    "the", "a", "one", "two", "small", "large", "red", "green", "blue", "old", "bright", "round",
    "square", "left", "right", "above", "behind", "stands", "lies", "moves", "shows", "holds",
    "looks", "like", "picture", "corner", "middle", "shape", "line", "surface",
]  # fmt: skip


def write_rows(path: Path, rows: int, seed: int = 0) -> None:
    """A JSONL file of ``rows`` chats about a few pictures of noise, which lie beside it."""
    import numpy as np
    from PIL import Image

    draw = random.Random(seed)
    for number in range(PICTURES):
        noise = np.random.default_rng(number).integers(0, 256, (96, 96, 3), np.uint8)
        Image.fromarray(noise).save(path.parent / f"{number}.png")

    def sentence(words: int) -> str:
        return " ".join(draw.choices(WORDS, k=words))

    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            image = {"type": "image", "image": f"{number % PICTURES}.png"}
            question = {"type": "text", "text": f"What is {sentence(draw.randint(4, 12))}?"}
            chat = [
                {"role": "user", "content": [image, question]},
                {"role": "assistant", "content": sentence(draw.randint(4, 24)) + "."},
            ]
            file.write(json.dumps({"messages": chat}) + "\n")


def megabytes() -> float:
    """Memory that this process holds now."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


def measure(path: Path, samples: int = SAMPLES) -> dict:
    """The figures of one file, in this process."""
    from mmpeft.data import ConversationDataset
    from mmpeft.image_processing import BridgeImageProcessor
    from mmpeft.language_model import load_tokenizer
    from mmpeft.processing import BridgeProcessor
    from mmpeft.tasks.messages import Messages

    images = BridgeImageProcessor(
        size={"height": 64, "width": 64}, resample=3, image_mean=[0.5] * 3, image_std=[0.5] * 3,
        fit="stretch", resolutions=[[64, 64, 4]], cut_tiles=False,
    )  # fmt: skip
    tokenizer = load_tokenizer("starter:smollm2-135m-instruct", None)
    processor = BridgeProcessor(images, tokenizer, chat_template=tokenizer.chat_template)
    few = path.with_name("few.jsonl")  # what is imported and compiled at the first row stays out
    with path.open(encoding="utf-8") as file:
        few.write_text(file.readline())
    for _ in ConversationDataset(Messages(train=str(few)), "train", processor):
        pass

    held = megabytes()
    began = time.perf_counter()
    dataset = ConversationDataset(Messages(train=str(path)), "train", processor)
    started = time.perf_counter() - began
    grown = megabytes() - held
    times = []
    for index in random.Random(0).choices(range(len(dataset)), k=samples):
        began = time.perf_counter()
        dataset[index]
        times.append(time.perf_counter() - began)
    return {
        "rows": len(dataset),
        "file_mb": path.stat().st_size / 1e6,
        "start_s": started,
        "start_mb": grown,
        "samples_mb": megabytes() - held - grown,
        "sample_ms": 1000 * statistics.median(times),
    }


def cost_by_rows(sizes=SIZES, samples: int = SAMPLES) -> list[dict]:
    """Cost of data sets of these sizes, each in a fresh process.

    Returns:
        for each size ``rows``, ``file_mb`` (10^6 bytes), ``start_s`` (seconds), ``start_mb`` and
        ``samples_mb`` (growth of the process in MiB by the start and by ``samples`` random
        samples), ``sample_ms`` (median milliseconds a sample).
    """
    points = []
    for rows in sizes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.jsonl"
            write_rows(path, rows)
            command = [sys.executable, __file__, "--file", str(path), "--samples", str(samples)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            points.append(json.loads(done.stdout.splitlines()[-1]))
    return points


def table(points: list[dict]) -> str:
    """The points of :func:`cost_by_rows` as a Markdown table."""
    lines = [
        "| rows | file, MB | start-up, s | memory: start, MiB | samples, MiB | a sample, ms |",
        "|---|---|---|---|---|---|",
    ]
    for p in points:
        lines.append(
            f"| {p['rows']:,} | {p['file_mb']:.1f} | {p['start_s']:.2f} | {p['start_mb']:.1f} | "
            f"{p['samples_mb']:.1f} | {p['sample_ms']:.2f} |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of rows")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="samples timed (300)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--file", type=Path, help="measure this file and print it as JSON")
    arguments = parser.parse_args()
    if arguments.file:
        print(json.dumps(measure(arguments.file, arguments.samples)))
        return
    points = cost_by_rows(arguments.sizes, arguments.samples)
    print(json.dumps(points) if arguments.json else table(points))


if __name__ == "__main__":
    main()
