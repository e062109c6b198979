"""Connectors on the same budget: score, image tokens, trained parameters, speed.

    python benchmarks/connectors.py easy_vqa
    python benchmarks/connectors.py labels --train train.jsonl --test test.jsonl --out runs/labels

Every connector is trained with the same encoder, LLM, steps, batches and seed, and scored on the
same test rows: by the accuracy of greedy replies, or, for captions, by the mean loss of the
reference (nats a token) with its own picture and with another row's. What the loss gains from the
right picture is what the bridge sees where no two captions are alike. Rows are chats (see
tasks/messages.py).

Each run is kept in its folder with its result; a second call trains only what is missing. Speed is
measured at the end, all connectors in turn on the same batches, and should be alone on the machine.
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import torch
from tqdm import tqdm

import mmpeft
from mmpeft import adapters
from mmpeft.config import load
from mmpeft.data import Collator, ConversationDataset
from mmpeft.evaluate import generate_replies
from mmpeft.packing import share_prefix
from mmpeft.tasks.easy_vqa import EasyVQA
from mmpeft.tasks.messages import Messages
from mmpeft.train import train

RECIPE = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"
CONNECTORS = {
    "linear": ("LinearConnectorConfig", {}),
    "mlp": ("MLPConnectorConfig", {}),
    "pixel_shuffle": ("PixelShuffleConnectorConfig", {"num_layers": 2}),
    "pool": ("PoolConnectorConfig", {}),
    "c_abstractor": (
        "CAbstractorConnectorConfig",
        {"side": 2, "depth": 1, "hidden_size": 384, "position_grid": 4},
    ),
    "resampler": (
        "ResamplerConnectorConfig",
        {
            "num_query_tokens": 8, "depth": 2, "hidden_size": 384, "head_dim": 64,
            "num_attention_heads": 6, "num_key_value_heads": 2,
        },
    ),
    "abstractor": (
        "AbstractorConnectorConfig",
        {"num_query_tokens": 7, "num_hidden_layers": 2, "intermediate_size": 1024},
    ),
    "qformer": (
        "QFormerConnectorConfig",
        {
            "num_query_tokens": 8, "num_hidden_layers": 2, "hidden_size": 384,
            "num_attention_heads": 6, "intermediate_size": 1536,
        },
    ),
}  # fmt: skip
ADAPTER = {
    "class_path": "LoraConfig",
    "init_args": {
        "r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]
    },
}  # fmt: skip
COLUMNS = ("image tokens", "trained", "accuracy", "loss", "another picture", "gain", "samples/s")


def overrides(arguments, name: str) -> list[str]:
    """The recipe's keys that this benchmark sets, as on the command line."""
    cls, options = CONNECTORS[name]
    given = {
        "output_dir": str(arguments.out / name),
        "model.vision_encoder.init_args.image_size": arguments.image_size,
        "model.vision_encoder.init_args.layers": arguments.layers,
        "model.connector": json.dumps({"class_path": cls, "init_args": options}),
        "model.adapter": json.dumps(ADAPTER),
        "model.gate": "none",
        "instruct.max_steps": arguments.steps,
        "instruct.save_total_limit": 1,
        "seed": arguments.seed,
    }
    if arguments.data != "easy_vqa":
        files = {"train": str(arguments.train), "test": str(arguments.test)}
        given["data.task"] = json.dumps({"class_path": "Messages", "init_args": files})
        given["data.chats_per_sample"] = 1
        given["instruct.per_device_train_batch_size"] = arguments.batch_size
        given["align.per_device_train_batch_size"] = arguments.batch_size
    return [word for key, value in given.items() for word in (f"--{key}", str(value))]


def test_rows(arguments):
    """The task and a seeded choice of its test rows."""
    task = EasyVQA()
    if arguments.data != "easy_vqa":
        task = Messages(train=str(arguments.train), test=str(arguments.test))
    rows = list(task.rows("test"))
    return task, random.Random(0).sample(rows, min(arguments.samples, len(rows)))


@torch.inference_mode()
def losses(model, processor, chats, pictures) -> list[float]:
    """Mean loss of each chat's answer, in nats a token, with the pictures given."""
    collate, found = Collator(processor.tokenizer.pad_token_id), []
    for chat, picture in zip(tqdm(chats, desc="loss", unit="row"), pictures, strict=True):
        row, _ = processor.encode_chat(chat)
        row = share_prefix([row])
        found.append(model(**collate([row | processor.image_inputs(picture)])).loss.item())
    return found


def score(arguments, name: str) -> dict:
    """Accuracy of replies; for captions, loss with the right and with another picture."""
    model, processor = mmpeft.load(arguments.out / name)
    task, rows = test_rows(arguments)
    chats = [task.messages(row) for row in rows]
    plan = {row.part: row for row in adapters.freeze_plan(model)}
    result = {
        "connector": name,
        "image tokens": model.layout.resolutions[-1].tokens,
        "trained": plan["connector"].total,
        "samples": len(rows),
    }
    if arguments.data != "captions":
        prompts = [chat[:-1] for chat in chats]
        replies = generate_replies(model, processor, prompts, task.max_new_tokens, 64, name)
        return result | {"accuracy": statistics.mean(task.score(replies, rows))}
    pictures = [processor.encode_chat(chat)[1] for chat in chats]
    others = pictures[1:] + pictures[:1]  # the rows are in random order
    right, wrong = (losses(model, processor, chats, p) for p in (pictures, others))
    gains = [w - r for r, w in zip(right, wrong, strict=True)]
    return result | {
        "loss": statistics.mean(right),
        "another picture": statistics.mean(wrong),
        "gain": statistics.mean(gains),
        "gain_stderr": statistics.stdev(gains) / len(gains) ** 0.5,
    }


def speeds(arguments, names, repeats: int = 5) -> dict[str, float]:
    """Training samples (chats) a second: forward and backward on one batch, in turn, medians."""
    models, batches, counts = {}, {}, {}
    for name in names:
        config, _ = load(RECIPE, overrides(arguments, name))
        model, processor = mmpeft.load(arguments.out / name, is_trainable=True)
        models[name] = model.train()
        dataset = ConversationDataset(
            config.data.task, "train", processor, config.data.chats_per_sample
        )
        size = config.instruct.per_device_train_batch_size
        batches[name] = Collator(processor.tokenizer.pad_token_id)(
            [dataset[i] for i in range(size)]
        )
        counts[name] = sum(len(dataset.samples[i]) for i in range(size))
    seconds = {name: [] for name in names}
    for repeat in tqdm(range(repeats + 1), desc="speed", unit="round"):
        for name, model in models.items():
            began = time.perf_counter()
            model(**batches[name]).loss.backward()
            model.zero_grad()
            if repeat:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
    return {name: counts[name] / statistics.median(seconds[name]) for name in names}


def table(results: list[dict]) -> str:
    """The results as a table in Markdown, best first."""
    shown = {"accuracy": "{:.1%}", "samples/s": "{:.1f}", "trained": "{:,}", "image tokens": "{}"}
    columns = [c for c in COLUMNS if all(result.get(c) is not None for result in results)]

    def text(column, result):
        written = shown.get(column, "{:.3f}").format(result[column])
        return written + (f" ± {1.96 * result['gain_stderr']:.3f}" if column == "gain" else "")

    lines = ["| connector | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for result in sorted(results, key=lambda r: (-r.get("accuracy", 0), -r.get("gain", 0))):
        cells = " | ".join(text(column, result) for column in columns)
        lines.append(f"| {result['connector']} | {cells} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "data",
        choices=["easy_vqa", "labels", "captions"],
        help="captions are scored by their loss alone",
    )
    parser.add_argument("--train", type=Path, help="JSONL file of chats to train on")
    parser.add_argument("--test", type=Path, help="JSONL file of chats to score on")
    parser.add_argument("--steps", type=int, default=300, help="steps of stage instruct (300)")
    parser.add_argument("--batch_size", type=int, default=16, help="chats a step (16)")
    parser.add_argument("--image_size", type=int, default=128, help="pixels (128)")
    parser.add_argument("--layers", default="[3,4]", help="feature maps of the encoder ([3,4])")
    parser.add_argument("--samples", type=int, default=500, help="test rows (500)")
    parser.add_argument("--seed", type=int, default=0, help="of training (0)")
    parser.add_argument("--connectors", nargs="+", default=list(CONNECTORS), choices=CONNECTORS)
    parser.add_argument("--out", type=Path, help="folder of the runs (runs/connectors/DATA)")
    parser.add_argument("--no-speed", action="store_true", help="leave the speed out")
    arguments = parser.parse_args()  # fmt: skip
    arguments.out = arguments.out or Path("runs/connectors") / arguments.data

    results = []
    for name in arguments.connectors:
        kept = arguments.out / name / "score.json"
        if not kept.is_file():
            began = (arguments.out / name / "config.yaml").is_file()
            train(RECIPE, overrides(arguments, name), resume=began)
            kept.write_text(json.dumps(score(arguments, name), indent=2) + "\n")
        results.append(json.loads(kept.read_text()))
    rates = {} if arguments.no_speed else speeds(arguments, arguments.connectors)
    for result in results:
        result["samples/s"] = rates.get(result["connector"])
    (arguments.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
