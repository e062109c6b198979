"""A made-up retention report with its items: every verdict, mode, kind of task and null."""

import math
import random

MODES = ("text", "with_image", "after_image")
CAPITALS = {"France": "Paris", "Italy": "Rome", "Kenya": "Nairobi", "Peru": "Lima",
            "Japan": "Tokyo", "Egypt": "Cairo", "Norway": "Oslo", "Chile": "Santiago"}  # fmt: skip

# name: (kind, metric, items, base right, (gained, lost) by open mode, verdicts by open mode)
TASKS = {
    "reading": ("choice", "acc", 196, 171, ((7, 25), (10, 31), (5, 19)),
                ("degraded", "degraded", "degraded")),
    "facts": ("choice", "acc", 218, 192, ((8, 14), (9, 21), (7, 9)),
              ("inconclusive", "degraded", "inconclusive")),
    "grammar": ("choice", "acc_norm", 400, 352, ((4, 6), (3, 4), (9, 6)),
                ("retained", "retained", "retained")),
    "arithmetic": ("choice", "acc", 60, 17, ((4, 4), (6, 8), (7, 5)),
                   ("not_judgeable", "not_judgeable", "not_judgeable")),
    "last_word": ("likelihood", "acc", 150, 66, ((6, 7), (5, 9), (8, 6)),
                  ("inconclusive", "inconclusive", "inconclusive")),
    "facts_in_words": ("generation", "exact_match", 60, 47, ((1, 15), (1, 13), (3, 4)),
                       ("degraded", "degraded", "inconclusive")),
    "summary": ("graded", "rouge", 40, 24, ((5, 5), (4, 9), (5, 5)),
                ("inconclusive", "inconclusive", "inconclusive")),
}  # fmt: skip
CHANCE = {"choice": 0.25, "likelihood": 0.0, "generation": 0.0, "graded": None}


def sample(gate: str = "sample") -> tuple[dict, list[dict]]:
    """A bridge with a dial; gate "sample": text by proof, "none": all estimates. (report, items)"""
    items = [item for mode in MODES for task in TASKS for item in _items(mode, task, gate)]
    tasks = [
        _row(mode, task, gate, [i for i in items if (i["mode"], i["task"]) == (mode, task)])
        for mode in MODES
        for task in TASKS
    ]
    verdicts = ("retained" if gate == "sample" else "degraded", "degraded", "inconclusive")
    modes = {}
    for mode, verdict in zip(MODES, verdicts, strict=True):
        counted = [r for r in tasks if r["mode"] == mode and r["judgeable"] and r["flips"]]
        exact = counted[0]["exact"]
        overall = _statistics(
            sum(row["n"] for row in counted),
            sum(row["n"] * row["base"] for row in counted),
            sum(row["flips"]["gained"] for row in counted),
            sum(row["flips"]["lost"] for row in counted),
            exact,
        )
        modes[mode] = {
            "verdict": verdict,
            "overall": {**overall, "chance": 0.27, "verdict": verdict, "judgeable": True},
            "certified": {"batches": 8, "of": 60, "answers": 120} if exact else None,
            "health": {"base": _health(), "bridge": _health(worse=verdict == "degraded")},
            "format_and_knowledge": [
                {
                    "task": "facts",
                    "generated_by": "facts_in_words",
                    "base": _known(3),
                    "bridge": _known({"retained": 3, "degraded": 12, "inconclusive": 5}[verdict]),
                }
            ],
            "picture": None if mode == "text" else ["c0ffee" + "0" * 58],
        }
    moved = float(gate == "none")
    report = {
        "schema": "mmpeft.retain/2",
        "verdict": verdicts[0],
        "gate": gate,
        "margin": 0.02,
        "sides": {
            "kind": "bridge",
            "base": {"name": "starter:smollm2-135m-instruct", "sha256": "ba5e" + "0" * 60},
            "bridge": {"name": "runs/quickstart", "sha256": "b41d6e" + "0" * 58},
        },
        "max_abs_dlogit": {"text": 29.65625 * moved, "irrelevant_image": 28.375, "image": 38.125},
        "bits_per_byte": {"base": 0.9417, "bridge": 0.9417 + 0.1046 * moved},
        "kl": {
            "mean": 0.3703 * moved,
            "p95": 1.0399 * moved,
            "max": 7.8508 * moved,
            "by_position": [
                {"from": i, "to": i + 32, "mean": (0.33 + 0.35 * math.exp(-i / 60)) * moved}
                for i in range(0, 512, 32)
            ],
        },
        "top1_agreement": 1 - 0.2795 * moved,
        "modes": modes,
        "tasks": tasks,
        "perplexities": [
            {"name": "novel", "mode": mode, "kind": "perplexity", "version": 1,
             "metric": "bits_per_byte", "n": 20, "base": 0.9511, "bridge": 1.0507, "delta": 0.0996}
            for mode in MODES[1:]
        ],
        "overall": modes["text"]["overall"],
        "dial": _dial(),
        "skipped": [{"task": "wiki", "reason": "asks for perplexities <only choices & replies>"}],
        "provenance": {
            "suite": {
                "name": "embedded", "versions": dict.fromkeys(TASKS, 2),
                "sha256": "5a17e" + "0" * 59, "samples": None, "seed": 0,
            },
            "text": {"name": "pydoc_data.topics", "sha256": "7e87" + "0" * 60, "tokens": 16384,
                     "bytes": 70123, "window": 512, "max_abs_dlogit": 31.25 * moved},
            "prompts_sha256": "9409" + "0" * 60,
            "image_prompts": 16,
            "dtype": "bfloat16",
            "device": "cpu",
            "versions": {"mmpeft": "0.2.0", "python": "3.11.9", "torch": "2.8.0"},
            "seconds": 512.3,
            "cache": {"reused_batches": 12, "computed_batches": 168, "recovered_lines": 1},
        },
    }  # fmt: skip
    return report, items


def bare() -> tuple[dict, list[dict]]:
    """Two checkpoints, one mode, and null wherever the schema allows it. (report, items)"""
    report, items = sample("none")
    tasks = [
        {**row, "mode": "text", "calibration": None, "image_control": None, "flips": None,
         "mcnemar_p": None, "chance": None, "smallest_detectable_drop": None}
        for row in report["tasks"] if row["mode"] == "after_image"
    ]  # fmt: skip
    items = [{**item, "mode": "text"} for item in items if item["mode"] == "after_image"]
    mode = {
        "verdict": "not_judgeable", "overall": None, "certified": None, "health": None,
        "format_and_knowledge": [], "picture": None,
    }  # fmt: skip
    return {
        **report,
        "verdict": "not_judgeable",
        "gate": None,
        "sides": {
            "kind": "checkpoints",
            "base": {"name": "base", "sha256": None},
            "bridge": {"name": "tuned", "sha256": None},
        },
        "max_abs_dlogit": {"text": 1.5, "irrelevant_image": None, "image": None},
        "kl": {**report["kl"], "by_position": []},
        "modes": {"text": mode},
        "tasks": tasks,
        "perplexities": [],
        "overall": None,
        "dial": None,
        "skipped": [],
    }, items


def _items(mode: str, task: str, gate: str) -> list[dict]:
    kind, _, n, right, flips, _ = TASKS[task]
    gained, lost = (0, 0) if _exact(mode, gate) else flips[MODES.index(mode)]
    chance = random.Random(task)  # the documents are those of every mode
    rows = []
    for i in range(n):
        before = i < right
        after = before != (i < lost or right <= i < right + gained)
        country = list(CAPITALS)[i % len(CAPITALS)]
        others = sorted({*CAPITALS.values()} - {CAPITALS[country]})
        choices = [CAPITALS[country], *chance.sample(others, 3)]
        chance.shuffle(choices)
        gold = choices.index(CAPITALS[country])
        row = {
            "mode": mode, "task": task, "doc_id": i, "prompt": f"The capital of {country} is",
            "choices": choices if kind == "choice" else None,
            "gold": gold if kind == "choice" else CAPITALS[country],
        }  # fmt: skip
        for side, correct in (("base", before), ("bridge", after)):
            row[side] = answer = dict.fromkeys(("score", "chosen", "loglikelihoods", "reply"))
            answer["score"] = float(correct)
            if kind == "choice":
                answer["chosen"] = gold if correct else (gold + 1) % 4
                answer["loglikelihoods"] = [-8.25 - 0.5 * c for c in range(4)]
                answer["loglikelihoods"][answer["chosen"]] = -2.5 if side == "base" else -3.125
            elif kind == "likelihood":
                answer["loglikelihoods"] = [-1.5 if correct else -6.75]
            elif kind == "generation":
                answer["reply"] = (
                    f"The capital of {country} is {CAPITALS[country]}." if correct else "yes"
                )
            else:
                answer["score"] = 0.6 if correct else 0.35
                answer["reply"] = f"{country} is a country with a capital" + "!" * (not correct)
        if kind == "generation" and i == 0:
            row["prompt"] = 'Say <b>nothing</b> & "quote" it:\n1 < 2, כן'
            row["bridge"]["reply"] = "<script>alert('hostile')</script> </details> {{ 7 * 7 }}"
        rows.append(row)
    return rows


def _exact(mode: str, gate: str) -> bool:
    return mode == "text" and gate == "sample"


def _row(mode: str, task: str, gate: str, items: list[dict]) -> dict:
    kind, metric, n, _, flips, verdicts = TASKS[task]
    exact = _exact(mode, gate)
    gained, lost = (0, 0) if exact else flips[MODES.index(mode)]
    row = _statistics(n, sum(item["base"]["score"] for item in items), gained, lost, exact)
    if kind == "graded":
        delta, spread = row["delta"] / 4, (row["ci95"][1] - row["delta"]) / 4
        row |= {"bridge": row["base"] + delta, "delta": delta, "flips": None, "mcnemar_p": None,
                "ci95": [delta - spread, delta + spread]}  # fmt: skip
    judgeable = "not_judgeable" not in verdicts
    seen = "retained" if judgeable else "not_judgeable"
    calibration = {
        "base": {"ece": 0.061, "brier": 0.184},
        "bridge": {"ece": 0.061 if exact else 0.093, "brier": 0.184 if exact else 0.251},
    }
    return {
        **row,
        "name": task,
        "mode": mode,
        "metric": metric,
        "kind": kind,
        "version": 2,
        "clusters": 49 if task == "reading" else n,
        "chance": CHANCE[kind],
        "judgeable": judgeable,
        "verdict": seen if exact else verdicts[MODES.index(mode)],
        "calibration": calibration if kind == "choice" else None,
        "image_control": (
            None if mode == "text" else {"score": row["base"] - 0.011, "delta": -0.011}
        ),
    }


def _statistics(n: int, right: float, gained: int, lost: int, exact: bool) -> dict:
    """The shape of `statistics.compare`, with a normal interval: these are not to be believed."""
    delta = (gained - lost) / n
    spread = 0 if exact else 1.96 * math.sqrt((gained + lost + 1) / n / n)
    return {
        "n": n,
        "clusters": n,
        "base": right / n,
        "bridge": right / n + delta,
        "delta": delta,
        "ci95": [delta - spread, delta + spread],
        "bounds95": [delta - spread * 0.84, delta + spread * 0.84],
        "flips": {"gained": gained, "lost": lost},
        "mcnemar_p": min(1.0, math.exp(-((gained - lost) ** 2) / (gained + lost + 1) / 2)),
        "p_degraded": 0.5,
        "p_retained": 0.5,
        "smallest_detectable_drop": spread * 1.27,
        "exact": exact,
    }


def _health(worse: bool = False) -> dict:
    return {
        "replies": 100, "mean_tokens": 4.31 if worse else 17.2,
        "median_tokens": 2.0 if worse else 14.5,
        "short": 0.61 if worse else 0.04, "empty": 0.02 if worse else 0.0,
        "repetition": 0.117 if worse else 0.013, "unfinished": 0.01,
    }  # fmt: skip


def _known(only: int) -> dict:
    return {"n": 60, "both": 50 - only, "knowledge_only": only, "words_only": 2, "neither": 8}


def _dial() -> dict:
    vision = {0.0: 0.31, 0.25: 0.702, 0.5: 0.934, 0.75: 0.962, 1.0: 0.968, 1.25: 0.966}
    deltas = {0.0: 0.0, 0.25: -0.004, 0.5: -0.011, 0.75: -0.041, 1.0: -0.078, 1.25: -0.131}
    points = []
    for scale, accuracy in vision.items():
        delta = deltas[scale]
        loss = "retained" if delta > -0.02 else "inconclusive" if delta > -0.05 else "degraded"
        spread = 0.0 if scale == 0 else 0.009 if loss == "retained" else 0.028
        points.append({
            "scale": scale,
            "vision": {"n": 1000, "accuracy": accuracy,
                       "ci95": [accuracy - 0.02, accuracy + 0.015]},
            "modes": {
                "text": {"delta": 0.0, "ci95": [0.0, 0.0], "verdict": "retained"},
                "with_image": {"delta": delta, "ci95": [delta - spread, delta + spread],
                               "verdict": loss},
            },
        })  # fmt: skip
    return {"points": points, "largest_retained": 0.5, "vision_task": "easy_vqa"}
