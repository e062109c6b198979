"""docs/reproduction.md says what docs/results/*.csv hold: the ``cells.csv`` of `mmpeft compare`."""

import csv
import statistics
from pathlib import Path

from mmpeft.compare.table import students
from mmpeft.retention.plots import minus

DOCS = Path(__file__).parents[1] / "docs"
NAMES = {
    "connector_only": "connector alone",
    "full": "full",
    "lora_mlp": "LoRA, MLP, r 10",
    "dylora": "DyLoRA, attention, r 16",
    "ia3": "(IA)³",
    "bottleneck": "parallel bottleneck, 27",
    "bottleneck_parallel": "parallel bottleneck, 27",
    "bitfit": "BitFit, biases added",
    "llama_adapter": "LLaMA-Adapter, 20 tokens a layer",
}
RETENTION = [("retention_text", 100, "+z.1f"), ("retention_prose", -100, "+z.1f")]


def shown(values, factor=1.0, form="z.3f", mean_only=False) -> str:
    """``0.568 (0.466 to 0.670)``: the mean and Student's t over seeds."""
    unit = "%" if factor == -100 else ""  # prose: a cost
    values = [factor * value for value in values]
    mean = format(statistics.mean(values), form) + unit
    low, high = (format(end, form.lstrip("+")) for end in students(values))
    return minus(mean if mean_only else f"{mean} ({low} to {high})")


def methods(name: str) -> dict[str, list[dict]]:
    """The cells of each method by seed, numbers as numbers."""
    found = {}
    with (DOCS / f"results/{name}.csv").open() as file:
        for row in csv.DictReader(file):
            label = row.pop("method")
            found.setdefault(label, []).append({key: float(value) for key, value in row.items()})
    return {label: sorted(cells, key=lambda one: one["seed"]) for label, cells in found.items()}


def column(cells: list[dict], name: str, less: list[dict] | None = None) -> list[float]:
    assert [one["seed"] for one in cells] == [0, 1, 2]
    if less is None:
        return [one[name] for one in cells]
    return [one[name] - base[name] for one, base in zip(cells, less, strict=True)]


def e2e() -> list[str]:
    """The table of the other methods on E2E."""
    cells = methods("table1_e2e")
    return [
        "| " + " | ".join([
            NAMES[label], f"{int(own[0]['adapter_parameters']):,}", shown(column(own, "bleu")),
            shown(column(own, "meteor"), mean_only=True),
            shown(column(own, "rouge_l"), mean_only=True),
            shown(column(own, "cider"), form="z.2f", mean_only=True),
            "" if label == "full" else shown(column(own, "bleu", cells["full"]), form="+z.3f"),
            *(shown(column(own, *one[:1]), *one[1:]) for one in RETENTION),
        ]) + " |"
        for label, own in cells.items()
    ]  # fmt: skip


def test_the_page_has_the_numbers_of_the_cells():
    page = (DOCS / "reproduction.md").read_text()
    missing = [line for line in e2e() if line not in page]
    assert not missing, "\n".join(["docs/reproduction.md lacks:", *missing])
