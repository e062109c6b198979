"""What reversible training (MEFT, arXiv 2306.00477) could save beyond activation checkpointing.

    python -m benchmarks.activation_memory

Reversible layers keep the activations of one layer and recompute the rest from the output, layer by
layer, in the backward pass. Activation checkpointing keeps every layer's input besides, and
recomputes as much. What reversible training can save at most is therefore those inputs: layers x
positions x width. This prints them beside the peak of a step of the starter LLM with LoRA, without
and with checkpointing, each in a process of its own: the peak over what the process held before the
first step (read from /proc, so this needs Linux), and the time of a step.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.image_tokens import megabytes

POSITIONS = (512, 2048)


def measure(positions: int, checkpointing: bool, repeats: int) -> dict:
    """Medians of one setting, in this process."""
    import torch

    from benchmarks.scaling import bridge, sample
    from mmpeft.data import Collator

    model = bridge()
    if checkpointing:
        model.activation_checkpointing_enable()
    generator = torch.Generator().manual_seed(0)
    samples = [sample(16, 256, generator) for _ in range(positions // 256)]
    batch = Collator(0, packing=True, pad_to_multiple_of=32)(samples)
    width = model.get_input_embeddings().weight.shape[1]
    embeds = (torch.randn(16 * len(samples), width) * 0.1).requires_grad_()
    held = megabytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again here
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        model(**batch, image_embeds=embeds).loss.backward()
        model.zero_grad()
        seconds.append(time.perf_counter() - began)
    text = model.config.get_text_config()
    inputs = text.num_hidden_layers * batch["input_ids"].shape[1] * width
    return {
        "positions": batch["input_ids"].shape[1],
        "checkpointing": checkpointing,
        "peak_mb": megabytes("VmHWM") - held,
        "layer_inputs_mb": inputs * model.dtype.itemsize / 2**20,
        "seconds": statistics.median(seconds[1:]),
    }


def table(rows: list[dict]) -> str:
    """A line a length: peaks, times, and the most that reversible layers could save."""
    lines = [
        "| positions | peak, MiB | with checkpointing | step, with / without | layer inputs, MiB "
        "(the most reversible layers save) |",
        "|---|---|---|---|---|",
    ]
    for plain, kept in zip(rows[::2], rows[1::2], strict=True):
        lines.append(
            f"| {plain['positions']} | {plain['peak_mb']:.0f} | {kept['peak_mb']:.0f} | "
            f"{kept['seconds'] / plain['seconds']:.2f} | {kept['layer_inputs_mb']:.0f} |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3, help="steps timed (3)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--one", nargs=2, metavar=("POSITIONS", "CHECKPOINTING"),
                        help="measure this setting and print it as JSON")  # fmt: skip
    arguments = parser.parse_args()
    if arguments.one:
        positions, checkpointing = map(int, arguments.one)
        print(json.dumps(measure(positions, bool(checkpointing), arguments.repeats)))
        return
    rows = []
    for positions in POSITIONS:
        for checkpointing in (0, 1):
            one = ["--one", str(positions), str(checkpointing)]
            options = ["--repeats", str(arguments.repeats), *one]
            command = [sys.executable, "-m", "benchmarks.activation_memory", *options]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    print(json.dumps(rows) if arguments.json else table(rows))


if __name__ == "__main__":
    main()
