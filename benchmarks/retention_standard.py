"""Scores of an LLM on `standard_local` by the engine of `mmpeft retain` and by lm-eval's HFLM.

    python benchmarks/retention_standard.py FOLDER         200 items a task, in float32
    python benchmarks/retention_standard.py FOLDER --json  one JSON object in place of the table

Both answer the same items through the same call of lm-eval's evaluator. In float32 no choice may
differ, but for choices whose log-likelihoods are closer than rounding. The replies to IFEval are
cut at 96 tokens, which makes their scores comparable with each other only.
"""

import argparse
import json
import statistics

from retention_speed import OneModel, Theirs, agreement, our_lm

from mmpeft.retention.sides import default_device
from mmpeft.retention.suite import Suite, pair, short

REPLY_TOKENS = 96


class Short(Suite):
    """`standard_local` with few and short replies."""

    def __init__(self, samples: int, replies: int, data_dir: str):
        super().__init__("standard_local", samples=samples, data_dir=data_dir)
        for name, chosen in self.indices.items():
            if self.kinds[short(name)] == "generate_until":
                self.indices[name] = chosen[:replies]

    def load(self):
        tasks = super().load()
        for task in tasks.values():
            if task.OUTPUT_TYPE == "generate_until":
                limit = {"max_gen_toks": REPLY_TOKENS}
                task.set_config("generation_kwargs", limit, update=True)
        return tasks


def measure(model: str, dtype: str, suite: Suite, batch_size: int) -> dict:
    """{task: items, both scores, answers or replies that differ, ...}."""
    sides = OneModel(model, dtype, default_device())
    ours, theirs = suite.ask(our_lm(sides)), suite.ask(Theirs(sides, batch_size))
    written = [task for task, items in ours.items() if items[0].reply is not None]
    rows = {}
    for task, pairs in pair(ours, theirs).items():
        if task not in written:
            rows |= agreement({task: ours[task]}, {task: theirs[task]})
            continue
        rows[task] = {
            "items": len(pairs),
            "ours": statistics.mean(one.score for one, _ in pairs),
            "theirs": statistics.mean(other.score for _, other in pairs),
            "differing": sum(one.reply != other.reply for one, other in pairs),
            "max_abs_difference": None,
        }
    return rows


def render(rows: dict) -> str:
    lines = ["  task                  items    ours    HFLM  differ  largest difference (nats)"]
    for task, row in rows.items():
        largest = row["max_abs_difference"]
        lines.append(
            f"  {task:20s} {row['items']:6d}  {row['ours']:6.1%}  {row['theirs']:6.1%}  "
            f"{row['differing']:6d}  {'(replies)' if largest is None else f'{largest:.1g}'}"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data_dir", help="folder of the files of `standard_local`")
    parser.add_argument(
        "--model", default="starter:smollm2-135m-instruct", help="causal LM: folder or hub name"
    )
    parser.add_argument("--dtype", default="float32", help="of the model (float32)")
    parser.add_argument("--samples", type=int, default=200, help="items a task (200)")
    parser.add_argument("--replies", type=int, default=8, help="items of IFEval (8)")
    parser.add_argument("--their_batch_size", type=int, default=16, help="of HFLM (16)")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")
    arguments = parser.parse_args()
    suite = Short(arguments.samples, arguments.replies, arguments.data_dir)
    rows = measure(arguments.model, arguments.dtype, suite, arguments.their_batch_size)
    print(json.dumps(rows) if arguments.json else render(rows))


if __name__ == "__main__":
    main()
