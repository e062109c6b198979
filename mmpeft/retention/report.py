"""Put proof, prose and suite together, and keep the report."""

import hashlib
import json
import platform
import random
import time
from importlib.metadata import version
from itertools import islice, pairwise
from pathlib import Path

import mmpeft
from mmpeft import durable
from mmpeft.checkpoint import is_run_folder, load
from mmpeft.images import load_frames, load_image
from mmpeft.retention.compare import Comparison, compare_sides
from mmpeft.retention.modes import MODES, Exchange
from mmpeft.retention.page import render_page
from mmpeft.retention.proof import prompts_sha256, prove
from mmpeft.retention.sides import BridgeSides, RetentionError, Sides, open_sides
from mmpeft.retention.statistics import MARGIN
from mmpeft.retention.store import ENGINE
from mmpeft.retention.suite import Suite
from mmpeft.retention.terminal import render
from mmpeft.retention.text import PROSE_TOKENS, compare_text, embedded_text
from mmpeft.task import pictures as pictures_of
from mmpeft.task import words

SCHEMA = "mmpeft.retain/2"
IMAGE_PROMPTS = 16  # rows of the vision task that show the adapter at work
EXCHANGES = 4  # pictures and exchanges that stand before the text tasks
PACKAGES = ("lm_eval", "torch", "transformers", "peft")
# what was said about the starter photographs, for models without a vision task of their own
SPOKEN = {
    "china.jpg": ("What building is this?", "It is a temple with a tiled roof, in Beijing."),
    "flower.jpg": ("What do you see?", "A pink dahlia in full bloom, with green leaves behind it."),
}


def retain(
    model,
    processor=None,
    *,
    image_prompts: list[list[dict]] = (),
    irrelevant_image=None,
    suite: str | list[str] = "embedded",
    suite_folder: str | Path | None = None,
    data_dir: str | Path | None = None,
    modes: list[str] | None = None,
    samples: int | None = None,
    seed: int = 0,
    margin: float = MARGIN,
    text: str | None = None,
    prose_tokens: int = PROSE_TOKENS,
    cache: str | Path | None = None,
) -> tuple[dict, list[dict]]:
    """Compare a tuned model with its base on text.

    Args:
        model, processor: a bridge and its processor; or a `Sides` (see :mod:`.sides`) alone.
        image_prompts: complete chats about an image, from the bridge's vision task. The adapter
            must show an effect on them, and they precede the text in mode "after_image".
        irrelevant_image: path or picture put before the text in mode "with_image"; default:
            photographs from the starter assets.
        suite: lm-eval groups or tasks; `suite_folder` adds a folder of YAML files to ours,
            `data_dir` is where tasks that read local data find it.
        modes: which of "text", "with_image", "after_image"; default: all the model can do.
        samples: items of each task, chosen by `seed` (None: all).
        margin: loss that still counts as retained, as a share (0.02 is two points).
        text, prose_tokens: the prose to predict (default: Python's own) and how much of it.
        cache: folder of answers already given (see :mod:`.store`); None: none are kept.

    Returns:
        The report, a JSON object of schema "mmpeft.retain/2", and the items, one dict for each
        document in each mode (fields: tasks/retention/README.md).

    Raises:
        RetentionError: the report would prove nothing (inactive adapter, NaN logits, sides that saw
            different questions or shared their answers).
        ValueError: an unknown mode, suite or task, or data that cannot be had.
    """
    start = time.perf_counter()
    sides = model if isinstance(model, Sides) else BridgeSides(model, processor)
    if sides.kind == "bridge" and not image_prompts:
        raise ValueError(
            "image_prompts is empty: without an image nobody can tell an unchanged model from an "
            "adapter that is switched off. Pass the messages of a few rows of a vision task."
        )
    if not 0 < margin < 1:
        raise ValueError(f"margin={margin}: give a loss above 0 and below 1 (100 points)")
    modes = check_modes(modes, sides)
    if prose_tokens < 1:
        raise ValueError(f"prose_tokens={prose_tokens}: give 1 or more")
    questions = Suite(suite, suite_folder, samples, seed, data_dir)  # fails at once if misspelt
    names = {side: sides.identity(side) for side in ("base", "bridge")}
    if names["base"]["sha256"] == names["bridge"]["sha256"]:
        raise RetentionError(
            f"{names['base']['name']} and {names['bridge']['name']} hold the same weights: there "
            "is nothing to compare"
        )
    pictures = photographs(irrelevant_image) if sides.sees else []
    exchanges = {mode: exchanges_of(mode, pictures, image_prompts) for mode in modes}
    prompts = [without_answer(chat) for chat in image_prompts[:IMAGE_PROMPTS]]
    deltas = prove(sides, prompts, pictures[0].picture if pictures else None)
    prose = compare_text(sides, embedded_text() if text is None else text, max_tokens=prose_tokens)
    moved = deltas["text"] > 0 or prose["max_abs_dlogit"] > 0
    found = compare_sides(
        sides, questions, exchanges, margin=margin, moved=moved, cache=cache,
        closed=not moved and (sides.gate not in (None, "none") or not sides.adapted),
    )  # fmt: skip
    report = {
        "schema": SCHEMA,
        "verdict": found.modes[modes[0]]["verdict"],
        "gate": sides.gate,
        "margin": margin,
        "sides": {"kind": sides.kind, **names},
        "max_abs_dlogit": deltas,
        "bits_per_byte": prose["bits_per_byte"],
        "kl": prose["kl"],
        "top1_agreement": prose["top1_agreement"],
        "modes": found.modes,
        "tasks": found.tasks,
        "perplexities": found.perplexities,
        "overall": found.modes[modes[0]]["overall"],
        "dial": None,
        "skipped": questions.skipped,
        "provenance": {
            "suite": {
                "names": [*questions.names, *sorted(questions.only)],
                "versions": {t: m.get("version") for t, m in questions.metadata.items()},
                "sha256": {mode: pairs_sha256(pairs) for mode, pairs in found.pairs.items()},
                "samples": samples,
                "seed": seed,
            },
            "text": {
                "name": "pydoc_data.topics" if text is None else "given",
                **prose["source"],
                "max_abs_dlogit": prose["max_abs_dlogit"],
            },
            "prompts_sha256": prompts_sha256(prompts),
            "image_prompts": len(prompts),
            "engine": {"version": ENGINE, "packed_rows": bool(sides.packs)},
            "cache": cache_use(found),
            "setting": {k: v for k, v in sides.setting("bridge").items()
                        if k in ("dtype", "device", "threads")},
            "versions": {
                "mmpeft": mmpeft.__version__,
                "python": platform.python_version(),
                **{package: version(package) for package in PACKAGES},
            },
            "seconds": round(time.perf_counter() - start, 1),
        },
    }  # fmt: skip
    return report, found.items


def retain_run(
    run, task, *, image=None, seed: int = 0, scales: list[float] | None = None, output=None,
    suite: str | list[str] = "embedded", suite_folder=None, data_dir=None, modes=None,
    samples: int | None = None, prose_tokens: int = PROSE_TOKENS, margin: float = MARGIN,
    cache=None,
) -> dict:  # fmt: skip
    """Load a run, measure its retention, and keep the report in the run folder.

    Args:
        task: the vision task whose test rows serve as image prompts.
        image: path of the irrelevant picture (default: starter photographs).
        scales: also turn the dial, on the same tasks and modes (see :mod:`.dial`).
        output: where to write instead of `RUN/retain`; a bare checkpoint is left as it is.
        suite, suite_folder, data_dir, modes, samples, prose_tokens, margin, cache: see
            :func:`retain`.
    """
    from mmpeft.retention.dial import check_scales, turn

    if scales is not None:
        check_scales(scales)
    rows = task.rows("test")
    chosen = random.Random(seed).sample(range(len(rows)), min(IMAGE_PROMPTS, len(rows)))
    image_prompts = [task.messages(rows[number]) for number in chosen]
    picture = None if image is None else load_image(image, "irrelevant image")
    model, processor = load(run)
    report, items = retain(
        BridgeSides(model, processor, str(run)), image_prompts=image_prompts,
        irrelevant_image=picture, suite=suite, suite_folder=suite_folder, data_dir=data_dir,
        modes=modes, samples=samples, prose_tokens=prose_tokens, seed=seed, margin=margin,
        cache=cache,
    )  # fmt: skip
    if output is None and is_run_folder(run):
        output = Path(run) / "retain"
    if output is not None:
        write(report, items, output)
    if scales is not None:
        pictures = photographs(picture)
        report["dial"] = turn(
            model, processor, task, scales, Suite(suite, suite_folder, samples, seed, data_dir),
            {mode: exchanges_of(mode, pictures, image_prompts) for mode in report["modes"]},
            seed=seed, margin=margin, cache=cache,
        )  # fmt: skip
        if output is not None:
            write(report, items, output)  # again, with the dial
    return report


def retain_pair(base: str, tuned: str, *, image=None, output=None, dtype="auto", **options) -> dict:
    """Compare two models of anybody's making: base and peft adapter, or two full checkpoints.

    Args:
        base, tuned: folders, hub names or `starter:NAME`; `tuned` may be a peft adapter of `base`,
            a causal LM, or a VLM that transformers loads as an image-text-to-text model.
        image, output, options: see :func:`retain_run`, :func:`retain`.
    """
    irrelevant_image = None if image is None else load_image(image, "irrelevant image")
    sides = open_sides(base, tuned, dtype)
    report, items = retain(sides, irrelevant_image=irrelevant_image, **options)
    if output is not None:
        write(report, items, output)
    return report


def check_modes(modes: list[str] | None, sides: Sides) -> list[str]:
    """The modes to measure, in their own order."""
    possible = [mode for mode in MODES if mode == "text" or sides.sees]
    if not sides.chats:
        possible = [mode for mode in possible if mode != "after_image"]
    for mode in modes or ():
        if mode not in MODES:
            raise ValueError(f"mode {mode!r} is unknown; choose among {', '.join(MODES)}.")
        if mode not in possible:
            lacks = "a tuned model that sees" if not sides.sees else "a chat template"
            raise ValueError(f"mode {mode!r} needs {lacks}.")
    return [mode for mode in possible if not modes or mode in modes]


def exchanges_of(mode: str, pictures: list[Exchange], image_prompts) -> list[Exchange]:
    """What stands before the prompts of a mode."""
    if mode == "text":
        return []
    if mode == "with_image":
        return [Exchange(one.picture) for one in pictures]
    found = filter(None, map(exchange_of, image_prompts))
    return list(islice(found, EXCHANGES)) or pictures


def exchange_of(chat: list[dict]) -> Exchange | None:
    """From a chat of a vision task: a picture (of a clip, a frame), the question, the answer."""
    for turn, reply in pairwise(chat):
        if turn["role"] == "user" and (seen := pictures_of(turn)):
            if seen[0]["type"] == "video":
                (picture,) = load_frames(seen[0]["video"], 1, "clip of an image prompt")
            else:
                picture = load_image(seen[0]["image"], "image prompt")
            return Exchange(picture, words(turn), words(reply))
    return None


def without_answer(chat: list[dict]) -> list[dict]:
    return chat[:-1] if chat[-1]["role"] == "assistant" else chat


def photographs(given=None) -> list[Exchange]:
    """Real photographs that have nothing to do with any prompt."""
    if given is not None:
        return [Exchange(load_image(given, "irrelevant image"), "What do you see?", "A picture.")]
    from mmpeft import starter

    folder = starter.path("photographs")
    return [Exchange(load_image(folder / name, name), *said) for name, said in SPOKEN.items()]


def pairs_sha256(pairs: dict) -> str:
    """Hash of all documents and prompts of a mode, in order."""
    asked = [[task, [one.sha256 for one, _ in items]] for task, items in pairs.items()]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def cache_use(found: Comparison) -> dict:
    """How many batches were answered from the cache, computed, or found damaged."""
    return {
        "reused_batches": sum(store.reused for store in found.stores),
        "computed_batches": sum(store.computed for store in found.stores),
        "recovered_lines": sum(store.damaged for store in found.stores),
    }


def write(report: dict, items: list[dict], folder: str | Path) -> list[Path]:
    """Write the report as JSON, text and page, and its items; a reader never sees half a file."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    bodies = {
        "items.jsonl": "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items),
        "report.json": json.dumps(report, indent=2, allow_nan=False) + "\n",
        "report.txt": render(report),
        "report.html": render_page(report, items),
    }
    for name, body in bodies.items():
        durable.write(folder / name, body)
    return [folder / name for name in bodies]
