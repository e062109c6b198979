"""Speed of `mmpeft eval`'s replies against the loop one would write, on the same questions.

    python benchmarks/evaluation.py [RUN] [--samples N] [--repeats N] [--json]

The loop takes one question at a time: `apply_chat_template`, `generate`, decode. *shared* is
`mmpeft.evaluate.generate_replies` as `mmpeft eval` calls it, *batched* the same without sharing
(`--no_sharing`): what it gains on the loop is due to batches of 64 alone. All answer questions of
easy-VQA, in turns; figures are medians. *one an image* asks one question on each of N pictures,
*all on an image* every question on as many pictures as it takes. A prompt that occurs twice is
answered once by *shared*; how many are distinct is reported. Then all answer once more in float32,
where every reply has to be the same; in the run's own type rounding may change a few.

Without RUN a bridge is built of the starter models: untrained, its speed is that of a trained one
with replies of full length, its answers are worth nothing. Nothing else may run on the machine.
"""

import argparse
import json
import random
import statistics
import time

import torch

from mmpeft.evaluate import draw_rows, generate_replies
from mmpeft.tasks.easy_vqa import EasyVQA


def build(run: str | None):
    """(model, processor) of a run, or of the starter models."""
    from mmpeft import BridgeForConditionalGeneration, BridgeProcessor, load

    if run is not None:
        return load(run)
    from peft import LoraConfig

    from mmpeft.connectors.mlp import MLPConnectorConfig
    from mmpeft.encoder import TimmEncoderConfig

    model = BridgeForConditionalGeneration.from_parts(
        TimmEncoderConfig("starter:efficientnet-lite0", image_size=64, layers=[2, 3, 4]),
        MLPConnectorConfig(), "starter:smollm2-135m-instruct",
        adapter=LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], r=16),
        gate="sample", dtype="bfloat16",
    ).eval()  # fmt: skip
    return model, BridgeProcessor.from_model(model)


def questions(task: EasyVQA, samples: int) -> dict[str, list]:
    """About ``samples`` prompts, one an image, and as many that are all of an image."""
    _, rows, chats = draw_rows(task, None, 0)
    by_image = {}
    for row, chat in zip(rows, chats, strict=True):
        by_image.setdefault(task.group(row), []).append(chat[:-1])
    images = random.Random(0).sample(list(by_image.values()), min(samples, len(by_image)))
    one, every = [own[0] for own in images], []
    for own in images:
        every += own if len(every) < samples else []
    return {"one an image": one, "all on an image": every}


@torch.inference_mode()
def loop(model, processor, prompts, max_new_tokens: int) -> list[str]:
    """One row at a time."""
    replies = []
    for prompt in prompts:
        inputs = processor.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        ).to(model.device)  # fmt: skip
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = ids[:, inputs["input_ids"].shape[1] :]
        replies.append(processor.post_process_image_text_to_text(new)[0].strip())
    return replies


def batched(model, processor, prompts, max_new_tokens: int) -> list[str]:
    return generate_replies(model, processor, prompts, max_new_tokens, 64, None, sharing=False)


def shared(model, processor, prompts, max_new_tokens: int) -> list[str]:
    return generate_replies(model, processor, prompts, max_new_tokens, 64, None)


ENGINES = (loop, batched, shared)


def differing(one: list[str], other: list[str]) -> int:
    return sum(a != b for a, b in zip(one, other, strict=True))


def differ_from_loop(replies: dict) -> int:
    return max(differing(replies[loop], replies[engine]) for engine in (batched, shared))


def measure(model, processor, prompts, max_new_tokens: int, repeats: int) -> dict:
    """Items a second of each engine (medians), ratios to the loop, and replies that differ."""
    given = (model, processor, prompts, max_new_tokens)
    for engine in ENGINES:  # what is prepared once for all
        engine(model, processor, prompts[:4], max_new_tokens)
    seconds, replies = {engine: [] for engine in ENGINES}, {}
    for _ in range(repeats):
        for engine in ENGINES:
            began = time.perf_counter()
            replies[engine] = engine(*given)
            seconds[engine].append(time.perf_counter() - began)
    rate = {engine: len(prompts) / statistics.median(own) for engine, own in seconds.items()}
    return {
        "items": len(prompts),
        "distinct": len(set(map(repr, prompts))),
        **{f"{engine.__name__}_per_second": rate[engine] for engine in ENGINES},
        "batched_ratio": rate[batched] / rate[loop],
        "shared_ratio": rate[shared] / rate[loop],
        "differing": differ_from_loop(replies),
    }


def render(report: dict) -> str:
    lines = [
        f"{report['run']}, {report['dtype']}, {report['device']}, {report['threads']} threads; "
        f"medians of {report['repeats']}",
        "",
        f"  {'questions':16s}{'items':>6s}{'distinct':>9s}{'loop/s':>8s}{'batched/s':>17s}"
        f"{'shared/s':>16s}  replies that differ, in float32",
    ]
    for name, row in report["questions"].items():
        lines.append(
            f"  {name:16s}{row['items']:6d}{row['distinct']:9d}{row['loop_per_second']:8.2f}"
            f"{row['batched_per_second']:9.2f} ({row['batched_ratio']:4.1f}x)"
            f"{row['shared_per_second']:8.2f} ({row['shared_ratio']:4.1f}x)"
            f"{row['differing']:6d}, {row['differing_float32']}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict:
    """Measure and print.

    Raises AssertionError: a reply in float32 is not the loop's.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", metavar="RUN", help="run or checkpoint folder")
    parser.add_argument("--samples", type=int, default=64, help="questions of each kind (64)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each engine (3)")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")
    given = parser.parse_args(arguments)

    task = EasyVQA()
    model, processor = build(given.run)
    report = {
        "run": given.run or "starter models, untrained",
        "dtype": str(model.language_model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "threads": torch.get_num_threads(),
        "repeats": given.repeats,
        "questions": {},
    }
    asked = questions(task, given.samples)
    for name, prompts in asked.items():
        report["questions"][name] = measure(
            model, processor, prompts, task.max_new_tokens, given.repeats
        )
    model.language_model.float()
    for name, prompts in asked.items():
        replies = {e: e(model, processor, prompts, task.max_new_tokens) for e in ENGINES}
        report["questions"][name]["differing_float32"] = differ_from_loop(replies)
    print(json.dumps(report) if given.json else render(report))
    wrong = {n: row["differing_float32"] for n, row in report["questions"].items()}
    assert not any(wrong.values()), f"replies in float32 that are not the loop's: {wrong}"
    return report


if __name__ == "__main__":
    main()
