"""What a training sample costs as rows, image tokens, length and batch size grow.

Forward and backward of a bridge of the starter models (SmolLM2-135M with LoRA, bfloat16) on packed
rows whose image tokens are given, in milliseconds a sample: medians. Rows of the data set: the
milliseconds that a sample takes to be read, and what starting up takes. Nothing else may run on the
machine.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import dataset

IMAGE_TOKENS = (16, 64, 144, 256, 576)
LENGTHS = (128, 256, 512, 1024, 2048)
BATCHES = (1, 4, 16, 64)
TEXT = 64  # tokens of text beside the image, where the image varies


def bridge():
    """The model, ready for packed rows, and the pixels of one picture."""
    from peft import LoraConfig

    from mmpeft import BridgeForConditionalGeneration
    from mmpeft.attention import serve_packed_rows
    from mmpeft.connectors.linear import LinearConnectorConfig
    from mmpeft.encoder import TransformersEncoderConfig

    torch.manual_seed(0)
    model = BridgeForConditionalGeneration.from_parts(
        TransformersEncoderConfig("starter:vit-small-saliency", image_size=56),
        LinearConnectorConfig(), "starter:smollm2-135m-instruct",
        adapter=LoraConfig(r=16, lora_alpha=32,
                           target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
        dtype="bfloat16",
    )  # fmt: skip
    if why_not := serve_packed_rows(model):
        raise RuntimeError(why_not)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").train()


def sample(image_tokens: int, length: int, generator) -> dict:
    """A row of random words, its image first, the last eighth of its text learned."""
    from mmpeft.packing import share_prefix

    ids = torch.randint(100, 40_000, (length,), generator=generator).tolist()
    learned = max(1, (length - image_tokens) // 8)
    row = {
        "input_ids": ids,
        "mm_token_type_ids": [1] * image_tokens + [0] * (length - image_tokens),
        "labels": [-100] * (length - learned) + ids[-learned:],
    }
    return share_prefix([row])


def cost(model, image_tokens: int, length: int, batch_size: int, repeats: int) -> float:
    """Milliseconds a sample, forward and backward."""
    from mmpeft.data import Collator

    generator = torch.Generator().manual_seed(0)
    samples = [sample(image_tokens, length, generator) for _ in range(batch_size)]
    batch = Collator(0, packing=True, pad_to_multiple_of=32)(samples)
    batch = {key: value.to(model.device) for key, value in batch.items()}
    size = model.get_input_embeddings().weight.shape[1]
    embeds = torch.randn(batch_size * image_tokens, size, device=model.device) * 0.1
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        with torch.autocast(model.device.type, torch.bfloat16):
            loss = model(**batch, image_embeds=embeds.requires_grad_()).loss
        loss.backward()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return 1000 * statistics.median(seconds[1:]) / batch_size


def measure(rows: list[int], repeats: int) -> dict:
    """The report that ``--json`` prints."""
    model = bridge()
    series = {
        "image_tokens": [(n, n, n + TEXT, 4) for n in IMAGE_TOKENS],
        "length": [(n, 16, n, 2) for n in LENGTHS],
        "batch_size": [(n, 16, 80, n) for n in BATCHES],
    }
    report = {"schema": "mmpeft.bench.scaling/1", "threads": torch.get_num_threads()}
    with tqdm(total=sum(map(len, series.values())), desc="scaling", unit="size") as bar:
        for name, sizes in series.items():
            report[name] = []
            for value, *size in sizes:
                report[name].append({"value": value, "ms": cost(model, *size, repeats)})
                bar.update()
    report["rows"] = dataset.cost_by_rows(tuple(rows))
    return report


NAMES = {
    "image_tokens": f"image tokens (with {TEXT} of text, 4 a batch)",
    "length": "tokens a sample (16 of an image, 2 a batch)",
    "batch_size": "samples a batch (of 80 tokens)",
}


def render(report: dict) -> str:
    """The report as tables."""
    lines = []
    for name, what in NAMES.items():
        lines += [f"{what:50}{'ms a sample':>12}"]
        lines += [f"{row['value']:>50}{row['ms']:>12.1f}" for row in report[name]] + [""]
    return "\n".join([*lines, dataset.table(report["rows"])])


def draw(report: dict, path: Path) -> None:
    """One panel a series, axes from 0 but logarithmic in what grows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3), layout="constrained")
    panels = figure.subplots(1, 4)
    for axes, (name, what) in zip(panels[:3], NAMES.items(), strict=True):
        axes.plot([r["value"] for r in report[name]], [r["ms"] for r in report[name]], "o-")
        axes.set(xlabel=what.partition(" (")[0])
    rows = report["rows"]
    panels[3].plot([r["rows"] for r in rows], [r["sample_ms"] for r in rows], "o-")
    panels[3].set(xlabel="rows (reading alone)", xscale="log")
    panels[2].set_xscale("log", base=2)
    panels[0].set_ylabel("ms a sample")
    for axes in panels:
        axes.set_ylim(0, 1.15 * axes.dataLim.ymax)  # from 0, with room above the points
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3, help="passes a size (3)")
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[1000, 10_000, 100_000], help="of the data set"
    )
    parser.add_argument("--output", default="benchmarks/results", help="folder of the results")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, only that")
    arguments = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):
        report = measure(arguments.rows, arguments.repeats)
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "scaling.json").write_text(json.dumps(report, indent=2) + "\n")
    draw(report, output / "scaling.png")
    print(json.dumps(report) if arguments.json else render(report))


if __name__ == "__main__":
    main()
