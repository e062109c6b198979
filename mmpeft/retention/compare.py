"""Ask both sides in every mode, pair the answers, and judge them."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from mmpeft.retention import measures
from mmpeft.retention.engine import SideLM, certify
from mmpeft.retention.modes import Exchange, Mode
from mmpeft.retention.sides import RetentionError, Sides
from mmpeft.retention.statistics import MARGIN, compare, decide
from mmpeft.retention.store import Store
from mmpeft.retention.suite import Item, Suite, pair

ROW_KINDS = {
    "multiple_choice": "choice", "loglikelihood": "likelihood", "generate_until": "generation",
    "loglikelihood_rolling": "perplexity",
}  # fmt: skip


@dataclass
class Comparison:
    """What was found. Keys of the dicts are modes."""

    tasks: list[dict] = field(default_factory=list)  # rows of the report
    modes: dict[str, dict] = field(default_factory=dict)
    perplexities: list[dict] = field(default_factory=list)
    items: list[dict] = field(default_factory=list)  # lines of items.jsonl
    stores: list[Store] = field(default_factory=list)
    pairs: dict[str, dict[str, list[tuple[Item, Item]]]] = field(default_factory=dict)


def compare_sides(
    sides: Sides,
    suite: Suite,
    exchanges: dict[str, list[Exchange]],
    *,
    margin: float = MARGIN,
    closed: bool = False,
    moved: bool | None = None,
    generated: bool = True,
    control: bool = True,
    cache: Path | None = None,
    stores: dict[str, Store] | None = None,
) -> Comparison:
    """Both sides on the suite in every mode of `exchanges`.

    Args:
        exchanges: the pictures of each mode to be measured; those of mode "text" are none.
        closed: the proof found the gate shut on text, so a sample of batches certifies mode text.
        moved: whether the proof saw any logit move on text; equal answers throughout would then
            mean that the sides share them. None: no proof was made.
        generated: also ask the tasks that generate.
        control: also ask the adapter-off side with the picture, where there is one.
        cache: folder that keeps the answers; None keeps them for this call only.
        stores: a store of one's own for some sides.

    Raises:
        RetentionError: the sides answered different questions, or one answered for both.
    """
    result = Comparison()
    control = control and sides.kind == "bridge" and sides.adapted
    names = ["base", "bridge"] + ["control"] * control
    answers: dict[tuple[str, str], dict[str, list[Item]]] = {}
    lms: dict[tuple[str, str], SideLM] = {}
    certified = {}
    for side in names:  # side by side: two checkpoints never share the memory
        store = (stores or {}).get(side) or Store(cache, sides.setting(side))
        result.stores.append(store)
        for name, pictures in exchanges.items():
            if side == "control" and not pictures:
                continue
            mode = Mode(name, pictures, sides.render)
            lm = lms[side, name] = SideLM(sides, side, mode, store)
            if side == "bridge" and name == "text" and closed:
                certified[name] = certify(lms["base", name])
                lm.copied = lms["base", name] if certified[name] else None
            answers[side, name] = suite.ask(lm, generated=generated and side != "control")
    for name in exchanges:
        pairs = pair(answers["base", name], answers["bridge", name])
        exact = certified.get(name) is not None
        if name == "text" and moved and not exact:
            refuse_shared(pairs)
        rows = [row for task, items in pairs.items()
                if (row := _row(suite, task, name, items, margin, exact, result))]  # fmt: skip
        decide(rows, margin)
        for row in rows:
            seen = answers.get(("control", name), {}).get(row["name"])
            row["image_control"] = seen and _control(pairs[row["name"]], seen)
        overall = _overall(suite, pairs, rows, margin, exact)
        result.tasks += rows
        result.pairs[name] = pairs
        result.modes[name] = {
            "verdict": overall["verdict"] if overall else "not_judgeable",
            "overall": overall,
            "certified": certified.get(name),
            "health": _health(suite, pairs),
            "format_and_knowledge": _format_and_knowledge(suite, pairs),
            "picture": [exchange.sha256 for exchange in exchanges[name]] or None,
        }
        result.items += [_line(name, one, other) for items in pairs.values()
                         for one, other in items]  # fmt: skip
    return result


def refuse_shared(pairs: dict[str, list[tuple[Item, Item]]]) -> None:
    """Logits moved on text, so log-likelihoods that are all the same come from one side."""
    told = [(one, other) for items in pairs.values() for one, other in items if one.loglikelihoods]
    if told and all(one.loglikelihoods == other.loglikelihoods for one, other in told):
        raise RetentionError(
            "base and bridge gave the same log-likelihoods to the bit although their logits on "
            "text differ: one side's answers were used for both. Remove the cache folder, or use "
            "--no_cache."
        )


def _row(suite, task, mode, items, margin, exact, result) -> dict | None:
    kind, metadata = suite.kinds[task], suite.metadata[task]
    base, bridge = ([side.score for side in sides] for sides in zip(*items, strict=True))
    about = {
        "name": task, "mode": mode, "kind": ROW_KINDS[kind], "version": metadata.get("version"),
        "metric": suite.metrics[task],
    }  # fmt: skip
    if ROW_KINDS[kind] == "perplexity":
        units = [one.units for one, _ in items]
        mean = [float(np.average(scores, weights=units)) for scores in (base, bridge)]
        result.perplexities.append({
            **about, "n": len(base), "base": mean[0], "bridge": mean[1], "delta": mean[1] - mean[0],
        })  # fmt: skip
        return None
    if any(score not in (0, 1) for score in base + bridge):
        about["kind"] = "graded"
    row = compare(
        base, bridge, chance=_chance(metadata, [one for one, _ in items]), margin=margin,
        clusters=[one.cluster for one, _ in items], exact=exact,
    )  # fmt: skip
    calibration = None
    if kind == "multiple_choice" and all(side.gold is not None for pair in items for side in pair):
        calibration = {
            name: measures.calibration([pair[i] for pair in items])
            for i, name in enumerate(("base", "bridge"))
        }
    return {**about, **row, "calibration": calibration, "image_control": None}


def _chance(metadata: dict, items: list[Item]) -> float:
    if "chance" in metadata:
        return float(metadata["chance"])
    if items[0].choices:
        return sum(1 / len(item.choices) for item in items) / len(items)
    return 0.0


def _overall(suite, pairs, rows, margin, exact) -> dict | None:
    """All judgeable right-or-wrong tasks pooled; items that ask the same form a cluster."""
    base, bridge, clusters, chances = [], [], [], []
    for row in rows:
        if not row["judgeable"] or row["kind"] == "graded":
            continue
        items = pairs[row["name"]]
        base += [one.score for one, _ in items]
        bridge += [other.score for _, other in items]
        clusters += _clusters(suite, pairs, row["name"])
        chances += [row["chance"]] * len(items)
    if not base:
        return None
    return compare(
        base, bridge, chance=sum(chances) / len(chances), margin=margin, clusters=clusters,
        exact=exact,
    )  # fmt: skip


def _clusters(suite, pairs, task: str) -> list[str]:
    """Those of a task's items; one that asks another task's in its words is in that one's."""
    items = [one for one, _ in pairs[task]]
    twin = suite.metadata[task].get("same_items_as")
    if twin is None:
        return [f"{task}/{item.cluster}" for item in items]
    theirs = {one.doc_id: one.cluster for one, _ in pairs.get(twin, ())}
    named = "cluster" in suite.metadata[task]
    return [
        f"{twin}/{theirs.get(item.source, item.cluster if named else item.source)}"
        for item in items
    ]


def _control(items: list[tuple[Item, Item]], seen: list[Item]) -> dict:
    score = sum(item.score for item in seen) / len(seen)
    return {"score": score, "delta": score - sum(one.score for one, _ in items) / len(items)}


def _health(suite, pairs) -> dict | None:
    written = [items for task, items in pairs.items() if suite.kinds[task] == "generate_until"]
    if not written:
        return None
    return {
        name: measures.health([pair[i] for items in written for pair in items])
        for i, name in enumerate(("base", "bridge"))
    }


def _format_and_knowledge(suite, pairs) -> list[dict]:
    found = []
    for task in pairs:
        twin = suite.metadata[task].get("same_items_as")
        if twin in pairs:
            known = {pair[0].doc_id: pair for pair in pairs[twin]}
            asked = [pair for pair in pairs[task] if pair[0].source in known]
            if asked:
                found.append({"task": twin, "generated_by": task} | {
                    name: measures.format_and_knowledge(
                        [known[pair[0].source][i] for pair in asked],
                        [replace(pair[i], doc_id=pair[i].source) for pair in asked],
                    )
                    for i, name in enumerate(("base", "bridge"))
                })  # fmt: skip
    return found


def _line(mode: str, one: Item, other: Item) -> dict:
    sides = {
        name: {key: asdict(item)[key] for key in ("score", "chosen", "loglikelihoods", "reply")}
        for name, item in (("base", one), ("bridge", other))
    }
    return {
        "mode": mode, "task": one.task, "doc_id": one.doc_id, "prompt": one.prompt,
        "choices": one.choices, "gold": one.gold, **sides,
    }  # fmt: skip
