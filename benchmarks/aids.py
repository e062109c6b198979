"""What each aid that keeps text as it was costs in training: seconds a step, side by side.

One bridge of the starter models (ViT-S/14, SmolLM2-135M with LoRA on its attention) learns easy-VQA
with several questions a picture, as ``python -m benchmarks train`` has it; the replay rows are
pydoc's prose as answers. A step has two pictures; with replay it has text rows besides, so that
what is learned of pictures is the same. Each aid runs in a process of its own, in turns of a few
steps, in changing order, so that drifts of the machine hit all alike; a ratio is the median over
neighbouring turns, and a turn before the first is not counted. What comes on top of replay is
compared with replay. Starts out of weights and data are made once: see the seconds until the first
step. Nothing else may run on the machine.
"""

import argparse
import contextlib
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from benchmarks.stacks import Setting, Stack
from benchmarks.train import easy_vqa, race, ratio

PICTURES = 2  # a step
KL = {"instruct.kl_weight": "1.0"}
LORA = "model.adapter.init_args."


def aids(replay: str, share: float) -> dict[str, dict[str, str]]:
    """Overrides of the recipe, by aid."""
    mixed = {
        "data.replay": "Messages", "data.replay.init_args.train": replay,
        "data.replay_share": str(share),
        "instruct.per_device_train_batch_size": str(round(PICTURES / (1 - share))),
    }  # fmt: skip
    start = f"{LORA}init_lora_weights"
    return {
        "nothing": {},
        "gate sample": {"model.gate": "sample"},
        "replay": mixed,
        "replay and KL": mixed | KL,
        "pissa": {start: "pissa"},
        "corda ipm": {start: "corda", f"{LORA}corda_config.corda_method": "ipm"},
        "corda kpm": mixed | {start: "corda", f"{LORA}corda_config.corda_method": "kpm"},
        "eva": {start: "eva"},
    }


def against(name: str, measured) -> str:
    """The aid that a ratio is taken to."""
    return (
        "replay" if name in ("replay and KL", "corda kpm") and "replay" in measured else "nothing"
    )


def write_replay(path: Path, rows: int, words: int) -> str:
    """Chats of text: a question, and a stretch of pydoc's prose."""
    from pydoc_data.topics import topics

    prose = itertools.cycle(" ".join(topics[name] for name in sorted(topics)).split())
    with path.open("w") as file:
        for _ in range(rows):
            answer = " ".join(itertools.islice(prose, words))
            messages = [{"role": "user", "content": "Tell me more about Python."},
                        {"role": "assistant", "content": answer}]  # fmt: skip
            file.write(json.dumps({"messages": messages}) + "\n")
    return str(path)


def bench(arguments) -> dict:
    """The report that ``--json`` prints."""
    from mmpeft.run_folder import environment

    with tempfile.TemporaryDirectory(prefix="mmpeft-aids-") as folder:
        folder, count = Path(folder), itertools.count()
        data = easy_vqa(folder / "data", arguments.images, arguments.questions)
        replay = write_replay(folder / "replay.jsonl", arguments.images, arguments.words)
        known = aids(replay, arguments.share)
        chosen = {name: known[name] for name in ("nothing", *arguments.aids) if name in known}
        stacks, first = {}, {}
        for name, overrides in tqdm(chosen.items(), desc="start", unit="aid"):
            began = time.perf_counter()
            stacks[name] = Stack(Setting(
                "ours", data, str(folder / f"{next(count)}"), arguments.image_size,
                arguments.questions, steps=100_000, dtype=arguments.dtype, images=PICTURES,
                overrides={"speed.compile": arguments.compile} | overrides,
            ))  # fmt: skip
            first[name] = time.perf_counter() - began
            stacks[name].run(arguments.steps)
        with tqdm(total=len(stacks) * arguments.turns, desc="turns", unit="turn") as bar:
            turns = race(stacks, arguments.steps, arguments.turns, bar)
        for stack in stacks.values():
            stack.close()
    return {
        "schema": "mmpeft.bench.aids/1",
        "setting": {key: value for key, value in vars(arguments).items() if key != "json"},
        "environment": environment(),
        "aids": [
            {
                "name": name,
                "seconds_a_step": statistics.median(t["seconds"] for t in own) / arguments.steps,
                "ratio": ratio(own, turns[against(name, turns)]),
                "against": against(name, turns),
                "until_first_step": first[name],
                "peak_memory_gb": own[-1]["peak_bytes"] / 1e9,
                "turns": [turn["seconds"] for turn in own],
            }
            for name, own in turns.items()
        ],
    }


def render(report: dict) -> str:
    """The report as a table."""
    lines = [f"{'aid':16}{'s a step':>10}{'ratio to':>18}{'until first, s':>16}{'peak, GB':>10}"]
    lines += [
        f"{row['name']:16}{row['seconds_a_step']:>10.3f}{row['ratio']:>8.2f}x {row['against']:>9}"
        f"{row['until_first_step']:>16.1f}{row['peak_memory_gb']:>10.2f}"
        for row in report["aids"]
    ]
    return "\n".join(lines)


def main() -> None:
    names = list(aids("", 0.5))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--aids", nargs="+", default=names, choices=names, help="which (all)")
    parser.add_argument("--images", type=int, default=64, help="pictures (64)")
    parser.add_argument("--questions", type=int, default=8, help="questions a picture (8)")
    parser.add_argument("--words", type=int, default=120, help="words of a replay row (120)")
    parser.add_argument("--share", type=float, default=0.5, help="share of replay samples (0.5)")
    parser.add_argument("--steps", type=int, default=20, help="steps of a turn (20)")
    parser.add_argument("--turns", type=int, default=5, help="turns of each (5)")
    parser.add_argument("--image_size", type=int, default=168, help="pixels a side (168)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--compile", default="off", choices=("on", "off"), help="LLM layers (off)")
    parser.add_argument("--output", default="benchmarks/results", help="folder of the results")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, only that")
    arguments = parser.parse_args()
    if not 0 < arguments.share < 1:
        parser.error(f"--share is {arguments.share}; it must lie above 0 and below 1")
    with contextlib.redirect_stdout(sys.stderr):
        report = bench(arguments)
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "aids.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report) if arguments.json else render(report))


if __name__ == "__main__":
    main()
