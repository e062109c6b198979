"""docs/reproduction.md says what docs/results/*.csv hold: the ``cells.csv`` of `mmpeft compare`."""

import csv
import statistics
from pathlib import Path

import pytest

from mmpeft.compare.table import students
from mmpeft.retention.plots import minus

DOCS = Path(__file__).parents[1] / "docs"
NAMES = {
    "full": "full",
    "lora_attention": "LoRA, attention, r 16",
    "lora_mlp": "LoRA, MLP, r 10",
    "dylora": "DyLoRA, attention, r 16",
    "ia3": "(IA)³",
    "bottleneck": "parallel bottleneck, 27",
    "bitfit": "BitFit, biases added",
    "llama_adapter": "LLaMA-Adapter, 20 tokens a layer",
    "prefix": "prefix, 20 tokens a layer",
    "prompt": "prompt, 20 tokens",
    "prefix_2e-2": "prefix, at 2e-2 in place of 5e-3",
    "prompt_5e-2": "prompt, at 5e-2 in place of 1e-2",
}
ON_PICTURES = {  # with the adapter's learning rate
    "connector_only": ("connector alone", ""),
    "full": ("full", "1e-4"),
    "lora_attention": ("LoRA, attention, r 16", "1e-3"),
    "lora_mlp": ("LoRA, MLP, r 10", "1e-3"),
    "lora_attention_3e-3": ("LoRA, attention, r 16", "3e-3"),
    "dylora": ("DyLoRA, attention, r 16", "1e-3"),
    "ia3": ("(IA)³", "5e-3"),
    "ia3_2e-2": ("(IA)³", "2e-2"),
    "bottleneck_parallel": ("parallel bottleneck, 27", "1e-3"),
    "bottleneck_5e-3": ("parallel bottleneck, 27", "5e-3"),
    "bitfit": ("BitFit, biases added", "1e-3"),
    "bitfit_1e-2": ("BitFit, biases added", "1e-2"),
    "llama_adapter": ("LLaMA-Adapter", "5e-3"),
    "prefix": ("prefix, 20 tokens a layer", "5e-3"),
    "prompt": ("prompt, 20 tokens", "1e-2"),
}
OF_GENERATION = [
    ("bleu", 1, "z.3f"), ("meteor", 1, "z.3f"), ("rouge_l", 1, "z.3f"), ("cider", 1, "z.2f")
]  # fmt: skip
RETENTION = [("retention_text", 100, "+z.1f"), ("retention_prose", -100, "+z.1f")]


def shown(values, factor=1.0, form="z.3f", mean_only=False) -> str:
    """``0.568 (0.466 to 0.670)``: the mean and Student's t over seeds, of one seed itself."""
    unit = "%" if factor == -100 else ""  # prose: a cost
    values = [factor * value for value in values]
    mean = format(statistics.mean(values), form) + unit
    if len(values) == 1:
        return minus(mean)
    low, high = (format(end, form.lstrip("+")) for end in students(values))
    return minus(mean if mean_only else f"{mean} ({low} to {high})")


def methods(name: str, axis: str = "method") -> dict[str, list[dict]]:
    """The cells of each label on an axis by seed, numbers as numbers."""
    found = {}
    with (DOCS / f"results/{name}.csv").open() as file:
        for row in csv.DictReader(file):
            label = row.pop(axis)
            numbers = {key: float(value) for key, value in row.items() if value}
            found.setdefault(label, []).append(numbers)
    return {label: sorted(cells, key=lambda one: one["seed"]) for label, cells in found.items()}


def column(cells: list[dict], name: str, less: list[dict] | None = None) -> list[float]:
    """A number of every seed, less that of the same seed."""
    before = {one["seed"]: one[name] for one in less or ()}
    assert [one["seed"] for one in cells] in ([0], [0, 1, 2])
    return [one[name] - (before[one["seed"]] if less else 0) for one in cells if name in one]


def table1(name: str, metrics: list[tuple]) -> list[str]:
    """The other methods of Table 1: ``(metric, factor, form)``, the first with its intervals."""
    cells = methods(name)
    (first, factor, form), *others = metrics
    kept = [one for one in RETENTION if one[0] in cells["full"][0]]
    return [
        "| " + " | ".join([
            NAMES[label], f"{int(own[0]['adapter_parameters']):,}",
            shown(column(own, first), factor, form),
            *(shown(column(own, *one[:1]), *one[1:], mean_only=True) for one in others),
            "" if label == "full"
            else shown(column(own, first, cells["full"]), factor, f"+{form}"),
            *(shown(column(own, *one[:1]), *one[1:]) for one in kept),
        ]) + " |"
        for label, own in cells.items()
    ]  # fmt: skip


def e2e() -> list[str]:
    """The table of the other methods on E2E."""
    return table1("table1_e2e", OF_GENERATION)


def webnlg() -> list[str]:
    """The table of the other methods on WebNLG."""
    return table1("table1_webnlg", OF_GENERATION)


def coqa() -> list[str]:
    """The table of the other methods on CoQA."""
    return table1("table1_coqa", [("f1", 1, "z.3f"), ("em", 1, "z.3f")])


def gsm8k() -> list[str]:
    """The table of the other methods on GSM8K."""
    return table1("table1_gsm8k", [("accuracy", 100, "z.1f"), ("strict", 100, "z.1f")])


def vision(name: str = "vision") -> list[str]:
    """The table of methods and learning rates on pictures."""
    cells = methods(name)
    alone = cells["connector_only"]
    text, prose = RETENTION
    planes = [text, ("retention_after_image", *text[1:]), prose]
    return [
        "| " + " | ".join([
            *ON_PICTURES[label], str(len(own)), shown(column(own, "accuracy"), 100, "z.1f"),
            "" if own is alone or len(own) > len(alone)
            else shown(column(own, "accuracy", alone), 100, "+z.1f"),
            *("not measured" if one[0] not in own[0] else "0, by proof" if not any(of_words)
              else shown(of_words, *one[1:])
              for one in planes for of_words in [column(own, one[0])]),
        ]) + " |"
        for label, own in sorted(cells.items(), key=lambda item: list(ON_PICTURES).index(item[0]))
    ]  # fmt: skip


def vision_longer() -> list[str]:
    """The table of twice the steps."""
    return vision("vision_1600")


def figure1() -> list[str]:
    """The table of shares of E2E and ranks."""
    lines = []
    for share, cells in methods("figure1", "fraction").items():
        ranks = [[one for one in cells if one["rank"] == rank] for rank in (2, 8, 32)]
        bleu = [shown(column(own, "bleu")) for own in ranks]
        gained = shown(column(ranks[-1], "bleu", ranks[0]), form="+z.3f")
        lines.append(f"| {share} | {' | '.join(bleu)} | {gained} |")
    return lines


@pytest.mark.parametrize("table", [e2e, webnlg, coqa, gsm8k, vision, vision_longer, figure1])
def test_the_page_has_the_numbers_of_the_cells(table):
    page = (DOCS / "reproduction.md").read_text()
    missing = [line for line in table() if line not in page]
    assert not missing, "\n".join(["docs/reproduction.md lacks:", *missing])
