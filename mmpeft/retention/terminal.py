"""A retention report as plain text, verdict first, worst first."""

ORDER = ("degraded", "inconclusive", "not_judgeable", "retained")  # worst first
CLAIMS = {  # what a verdict says about a mode; {margin} in points
    "degraded": "the bridge answers worse than its base",
    "inconclusive": "a loss of {margin} points is neither shown nor ruled out",
    "not_judgeable": "the base itself answers no better than chance",
    "retained": "a loss of {margin} points or more is ruled out",
}
BY_PROOF = "the two sides are the same function"
COLUMNS = ("task", "mode", "n", "base %", "bridge %", "delta", "95% interval", "gained", "lost",
           "McNemar p", "visible drop", "verdict")  # fmt: skip
HEALTH = {  # column: (field, a share)
    "replies": ("replies", False),
    "mean tokens": ("mean_tokens", False),
    "median": ("median_tokens", False),
    "3 or fewer %": ("short", True),
    "empty %": ("empty", True),
    "repeated %": ("repetition", True),
    "unfinished %": ("unfinished", True),
}
LEGEND = """\
mode: text, no image in the chat; with_image, the task after an irrelevant photograph; after_image,
  the task as second turn after an exchange about an image. The base gets the same words, no image.
delta, interval: points, bridge - base, same items; exact: the same function, nothing to estimate
gained, lost: answers that flipped; visible drop: the smallest loss this n shows with 80% power,
  uncorrected
verdict: margin {margin} points, one-sided 95%; of single tasks Holm-corrected over those of a mode
all: the judgeable tasks of a mode, pooled; the verdict on top is theirs
"""


def render(report: dict) -> str:
    """The report ("mmpeft.retain/2", fields: tasks/retention/README.md), ending in a newline."""
    sections = [
        [f"{mode}: {headline(body, report['margin'])}" for mode, body in report["modes"].items()],
        not_everywhere(report),
        _proof(report),
        _align([COLUMNS, *(cells(row) for row in worst_first(report))], "<<>>>>>>>>><"),
        _health(report),
        _titled("Format against knowledge", format_lines(report)),
        _titled("Calibration, mean over tasks, base -> bridge", _calibration(report)),
        _titled("Rolling text in bits, lower is better", perplexity_lines(report)),
        _titled("Picture in, adapter off: score and its distance to the base", _controls(report)),
        _dial(report["dial"]),
        _titled("Skipped", [f"{row['task']}: {row['reason']}" for row in report["skipped"]]),
        LEGEND.format(margin=f"{100 * report['margin']:g}").splitlines(),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


def points(share: float) -> str:
    """A difference of shares in percentage points, signed."""
    return f"{100 * share:+z.1f}"


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def dash(value, form=str) -> str:
    """`form(value)`, or "-" where a report holds null."""
    return "-" if value is None else form(value)


def interval(row: dict) -> str:
    """The 95% interval of a row, in points."""
    if row.get("exact"):
        return "exact"
    return dash(row["ci95"], lambda ends: f"[{points(ends[0])}, {points(ends[1])}]")


def headline(mode: dict, margin: float) -> str:
    """One line: verdict, pooled difference, what the verdict claims."""
    word, overall = mode["verdict"].replace("_", " ").upper(), mode["overall"]
    claim = CLAIMS[mode["verdict"]].format(margin=f"{100 * margin:g}")
    if overall is None or mode["verdict"] == "not_judgeable":
        return f"{word}: {claim}"
    if overall["exact"]:
        return f"{word} by proof: {BY_PROOF}"
    low, high = overall["ci95"]
    ends = f"95% CI {points(low)} to {points(high)}"
    if mode["verdict"] == "degraded" and high >= 0:  # the verdict is one-sided, the interval not
        ends += f", one-sided at most {points(overall['bounds95'][1])}"
    return f"{word} {points(overall['delta'])} points ({ends}): {claim}"


def not_everywhere(report: dict) -> list[str]:
    """Modes that are not degraded as a whole, and the tasks on which they are."""
    lines = []
    for mode, body in report["modes"].items():
        worse = [row["name"] for row in worst_first(report)
                 if row["mode"] == mode and row["verdict"] == "degraded"]  # fmt: skip
        if worse and body["verdict"] != "degraded":
            lines.append(f"Not everywhere: {mode} is degraded on {', '.join(worse)}.")
    return lines


def worst_first(report: dict) -> list[dict]:
    """All tasks, and the pooled row ("all") of every mode: by verdict, then by difference."""
    modes = list(report["modes"])
    pooled = [
        {**body["overall"], "name": "all", "mode": mode, "pooled": True}
        for mode, body in report["modes"].items()
        if body["overall"] is not None
    ]

    def badness(row):
        place = ORDER.index(row["verdict"]), row["delta"]
        return *place, modes.index(row["mode"]), "pooled" in row, row["name"]

    return sorted([*report["tasks"], *pooled], key=badness)


def cells(row: dict) -> tuple[str, ...]:
    """A row of `worst_first` under COLUMNS."""
    flips = row["flips"] or {"gained": None, "lost": None}
    return (
        row["name"], row["mode"], str(row["n"]), percent(row["base"]), percent(row["bridge"]),
        points(row["delta"]), interval(row), dash(flips["gained"]), dash(flips["lost"]),
        dash(row["mcnemar_p"], "{:.3g}".format), dash(row["smallest_detectable_drop"], percent),
        row["verdict"],
    )  # fmt: skip


def health_rows(report: dict) -> list[tuple[str, ...]]:
    """Generation health under mode, side and HEALTH."""
    return [
        (mode, side, *(_health_cell(body["health"][side][field], share)
                       for field, share in HEALTH.values()))
        for mode, body in report["modes"].items() if body["health"]
        for side in ("base", "bridge")
    ]  # fmt: skip


def format_lines(report: dict) -> list[str]:
    """What each side knows by likelihood but does not say in words, one line a task and mode."""
    return [
        f"{mode}, {row['task']}: {row['bridge']['knowledge_only']} of {row['bridge']['n']} known "
        f"by likelihood but no longer said in words (base {row['base']['knowledge_only']})"
        for mode, body in report["modes"].items()
        for row in body["format_and_knowledge"] or []
    ]


def perplexity_lines(report: dict) -> list[str]:
    """Tasks that score running text; no verdict rests on them."""
    return [
        f"{row['mode']}, {row['name']} ({row['metric']}, {row['n']} documents): "
        f"{row['base']:.4g} -> {row['bridge']:.4g} ({row['delta']:+z.4f})"
        for row in report.get("perplexities", [])
    ]


def certified_line(certified: dict) -> str:
    """How a mode by proof was checked: the bridge's other answers are the base's."""
    ran = f"the bridge ran {certified['batches']} of {certified['of']} batches"
    return f"{ran}, equal bit for bit; the others are taken from the base"


def dial_modes(dial: dict) -> list[str]:
    """Modes with a judgeable task at some scale."""
    held = [mode for point in dial["points"] for mode, body in point["modes"].items() if body]
    return list(dict.fromkeys(held))


def dial_rows(dial: dict) -> list[tuple[str, ...]]:
    """The dial as a table, header first: the scale, the vision score, every mode measured."""
    modes = dial_modes(dial)
    header = ["scale", "vision %", "95% interval"]
    for mode in modes:
        header += [f"{mode} delta", "95% interval", "verdict"]
    rows = [tuple(header)]
    for point in dial["points"]:
        row, vision = [f"{point['scale']:g}"], point["vision"]
        if vision is None:
            row += ["-", "-"]
        else:
            low, high = vision["ci95"]
            value = vision[vision.get("metric", "accuracy")]
            row += [percent(value), f"[{percent(low)}, {percent(high)}]"]
        for mode in modes:
            text = point["modes"].get(mode)
            row += [points(text["delta"]), interval(text), text["verdict"]] if text else ["-"] * 3
        rows.append(tuple(row))
    return rows


def largest_retained(dial: dict) -> str:
    scale = dial["largest_retained"]
    return "no scale is retained" if scale is None else f"largest retained scale: {scale:g}"


def _proof(report: dict) -> list[str]:
    sides, gate, deltas = report["sides"], report["gate"], report["max_abs_dlogit"]
    lines = [
        f"Sides ({sides['kind']}): base {sides['base']['name']}, bridge {sides['bridge']['name']}, "
        + ("no gate" if gate is None else f"gate {gate!r}"),
        "Largest difference of any logit between the two:",
        "  text {}   text after an irrelevant image {}   image questions {}".format(
            *(dash(deltas[name], "{:.4g}".format) for name in ("text", "irrelevant_image", "image"))
        ),
    ]
    for mode, body in report["modes"].items():
        if body["certified"]:
            lines.append(f"  {mode}: {certified_line(body['certified'])}")
    return lines + _prose(report)


def _prose(report: dict) -> list[str]:
    """Bits per byte and KL in words; KL is null where the sides do not share a tokenizer."""
    bpb, kl = report["bits_per_byte"], report["kl"]
    tokens = report["provenance"].get("text", {}).get("tokens")
    lines = ["Prose" + (f" ({tokens} tokens)" if tokens else "") + ":"]
    if bpb:
        lines.append(f"  bits per byte {bpb['base']:.4f} -> {bpb['bridge']:.4f}")
    if kl:
        lines.append(
            f"  KL mean {kl['mean']:.4g}, p95 {kl['p95']:.4g}, max {kl['max']:.4g} nats per token, "
            f"same top token {100 * report['top1_agreement']:.2f}%"
        )
        parts = kl["by_position"]
        ends = [f"{part['mean']:.4g} at positions {part['from']} to {part['to']}"
                for part in (parts[:1] + parts[1:][-1:])]  # fmt: skip
        lines += [f"  KL mean {', '.join(ends)}"] if ends else []
    return lines if len(lines) > 1 else []


def _health(report: dict) -> list[str]:
    rows = health_rows(report)
    header = ("mode", "side", *HEALTH)
    table = _align([header, *rows], "<<" + ">" * len(HEALTH))
    return ["Generation health", *table] if rows else []


def _health_cell(value, share: bool) -> str:
    return dash(value, percent if share else lambda number: f"{number:.4g}")


def _calibration(report: dict) -> list[str]:
    lines = []
    for mode in report["modes"]:
        held = [row["calibration"] for row in report["tasks"]
                if row["mode"] == mode and row["calibration"]]  # fmt: skip
        if held:
            mean = {
                (side, name): sum(body[side][name] for body in held) / len(held)
                for side in ("base", "bridge") for name in ("ece", "brier")
            }  # fmt: skip
            lines.append(
                f"{mode}: ECE {mean['base', 'ece']:.3f} -> {mean['bridge', 'ece']:.3f}, "
                f"Brier {mean['base', 'brier']:.3f} -> {mean['bridge', 'brier']:.3f} "
                f"({len(held)} task{'s' if len(held) > 1 else ''})"
            )
    return lines


def _controls(report: dict) -> list[str]:
    lines = []
    for mode in report["modes"]:
        said = [
            f"{row['name']} {percent(row['image_control']['score'])} "
            f"({points(row['image_control']['delta'])})"
            for row in report["tasks"]
            if row["mode"] == mode and row["image_control"]
        ]
        if said:
            lines.append(f"{mode}: {', '.join(said)}")
    return lines


def _dial(dial: dict | None) -> list[str]:
    if dial is None:
        return []
    rows = dial_rows(dial)
    title = "Dial, the scale of the adapter"
    title += f"; vision: {dial['vision_task']}" if dial["vision_task"] else ""
    return [title, *_align(rows, ">" * len(rows[0])), largest_retained(dial)]


def _titled(title: str, lines: list[str]) -> list[str]:
    return [title, *(f"  {line}" for line in lines)] if lines else []


def _align(rows: list[tuple[str, ...]], sides: str) -> list[str]:
    """`sides`: "<" or ">" for each column."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{c:{s}{w}}" for c, s, w in zip(row, sides, widths, strict=True)).rstrip()
        for row in rows
    ]
