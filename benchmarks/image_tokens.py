"""Time and memory of a training step against the number of image tokens; the connector decides it.

    python benchmarks/image_tokens.py --out docs/image_tokens.png

One picture of 384 pixels is 24 x 24 patches; averaging f x f of them leaves 576 / f^2 tokens.
Each point is a process of its own: a batch of pictures with a question and an answer each, forward
and backward through connector and LoRA, the encoder's pass apart. Memory is the peak of the process
over what it held before the first step (read from /proc, so this needs Linux).
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

FACTORS = (1, 2, 3, 4, 6, 12)


def megabytes(key: str) -> float:
    """``VmRSS`` (held now) or ``VmHWM`` (the peak) of this process."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{key}:\s+(\d+)", status)[1]) / 1024


def measure(factor: int, batch_size: int, repeats: int) -> dict:
    """Medians of one number of tokens, in this process."""
    import torch
    from peft import LoraConfig
    from PIL import Image

    from mmpeft import BridgeForConditionalGeneration, BridgeProcessor, adapters
    from mmpeft.connectors.pool import PoolConnectorConfig
    from mmpeft.data import Collator
    from mmpeft.encoder import TimmEncoderConfig
    from mmpeft.packing import share_prefix

    model = BridgeForConditionalGeneration.from_parts(
        TimmEncoderConfig("starter:efficientnet-lite0", image_size=384, layers=[3]),
        PoolConnectorConfig(factor=factor),
        "starter:smollm2-135m-instruct",
        adapter=LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
        dtype="bfloat16",
    )
    adapters.set_trainable(model, connector=True, adapter=True)
    model.train()
    processor = BridgeProcessor.from_model(model)
    noise = torch.randint(0, 256, (384, 384, 3), dtype=torch.uint8).numpy()
    chat = [
        {"role": "user", "content": [{"type": "image", "image": Image.fromarray(noise)},
                                     {"type": "text", "text": "What do you see? " * 4}]},
        {"role": "assistant", "content": "A picture of many small dots in all colours."},
    ]  # fmt: skip
    row, pictures = processor.encode_chat(chat)
    sample = share_prefix([row]) | processor.image_inputs(pictures)
    batch = Collator(processor.tokenizer.pad_token_id)([sample] * batch_size)
    pixel_values = batch.pop("pixel_values")
    held = megabytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again here
    steps, encodes = [], []
    for repeat in range(repeats + 1):
        began = time.perf_counter()
        features = model.encode_images(pixel_values)
        encoded = time.perf_counter()
        model(**batch, image_features=features).loss.backward()
        model.zero_grad()
        if repeat:  # the first round warms up
            encodes.append(encoded - began)
            steps.append(time.perf_counter() - encoded)
    return {
        "image tokens": model.layout.resolutions[0].tokens,
        "text tokens": len(row["labels"]) - model.layout.resolutions[0].tokens,
        "encode, ms an image": 1000 * statistics.median(encodes) / batch_size,
        "step, ms an image": 1000 * statistics.median(steps) / batch_size,
        "memory, MB an image": (megabytes("VmHWM") - held) / batch_size,
    }


def draw(points: list[dict], path: Path) -> None:
    """Time and memory over the number of image tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    tokens = [point["image tokens"] for point in points]
    for axes, key in zip(figure.subplots(1, 2), ("step, ms an image", "memory, MB an image"),
                         strict=True):  # fmt: skip
        axes.plot(tokens, [point[key] for point in points], "o-")
        axes.set(xlabel="image tokens", ylabel=key, xlim=(0, None), ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch_size", type=int, default=4, help="pictures a step (4)")
    parser.add_argument("--repeats", type=int, default=5, help="steps timed (5)")
    parser.add_argument("--out", type=Path, default=Path("image_tokens.png"), help="picture")
    parser.add_argument("--factor", type=int, help="measure this one and print it as JSON")
    arguments = parser.parse_args()
    if arguments.factor:
        print(json.dumps(measure(arguments.factor, arguments.batch_size, arguments.repeats)))
        return
    points = []
    for factor in FACTORS:
        options = ["--batch_size", str(arguments.batch_size), "--repeats", str(arguments.repeats)]
        command = [sys.executable, __file__, "--factor", str(factor), *options]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        points.append(json.loads(done.stdout.splitlines()[-1]))
        print("  ".join(f"{key}: {value:.0f}" for key, value in points[-1].items()), flush=True)
    draw(points, arguments.out)


if __name__ == "__main__":
    main()
