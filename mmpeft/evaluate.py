"""Score a bridge on a task, beside controls that show whether it looks at the picture.

``majority`` answers each question with its commonest training answer. ``image_withheld`` asks the
same model without the picture, ``image_shuffled`` with the picture of another row. Where no row has
a picture there are no controls.
"""

import json
import random
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from mmpeft.checkpoint import is_run_folder, load
from mmpeft.data import check_chat, row_groups
from mmpeft.prefix import Prompt, try_sharing
from mmpeft.task import Metric, Task, parts, pictures, words

SCHEMA = "mmpeft.eval/1"
RESAMPLES = 1000  # of the groups of rows, for the interval of a score that is no share
ENCODED = 16  # batches of prompts encoded at a time: meanwhile frames of their clips are in memory


def evaluate(
    model,
    processor,
    task: Task,
    *,
    samples: int | None = 1000,
    seed: int = 0,
    batch_size: int = 64,
    share_prefix: bool = True,
) -> tuple[dict, list[dict]]:
    """Accuracy, or what the task has instead, of greedy replies on its test split.

    Args:
        samples: that many rows, drawn with ``seed``; ``None`` takes all.
        share_prefix: run the common starts of prompts once, see :mod:`mmpeft.prefix`; off, every
            row is computed from its first token.

    Returns:
        the report (see ``docs/json.md``) and the items, one dict a row.
    """
    numbers, rows, chats = draw_rows(task, samples, seed)
    prompts = [chat[:-1] for chat in chats]
    seeing = any(pictures(*prompt) for prompt in prompts)
    controls = {}
    if seeing and not task.streaming:  # before the replies: there may be no train split
        controls["majority"] = task.metrics(_majority_answers(task, chats), rows)
    sharing = share_prefix and try_sharing(model, processor)

    def score(prompts, name):
        replies = generate_replies(
            model, processor, prompts, task.max_new_tokens, batch_size, name, sharing,
            lambda i: task.where(rows[i], numbers[i]),
        )  # fmt: skip
        return replies, task.metrics(replies, rows)

    began = time.perf_counter()
    replies, metrics = score(prompts, "bridge")
    if seeing:
        withheld = [_with_picture(prompt, None) for prompt in prompts]
        _, controls["image_withheld"] = score(withheld, "image withheld")
        _, controls["image_shuffled"] = score(_shuffle_pictures(prompts, seed), "image shuffled")
    seconds = time.perf_counter() - began

    types = np.array([task.question_type(row) for row in rows])
    groups = row_groups(task, rows)
    report = {"schema": SCHEMA, "task": task.name, "seed": seed}
    report |= _summary(metrics, controls, groups, seed)
    report["by_type"] = {
        kind: _summary(metrics, controls, groups, seed, types == kind)
        for kind in sorted(set(types))
    }
    report["seconds"] = seconds
    report["replies_per_second"] = (3 if seeing else 1) * len(rows) / seconds
    items = [
        {
            "row": number,
            "type": kind,
            "question": words(*prompt),
            "reference": words(chat[-1]),
            "reply": reply,
        }
        for number, kind, prompt, chat, reply in zip(
            numbers, types.tolist(), prompts, chats, replies, strict=True
        )
    ]
    for name, metric in metrics.items():
        for item, value in zip(items, metric.rows, strict=True):
            if name == "accuracy":
                item["right"] = bool(value)
            elif np.ndim(value) == 0:  # a score of the whole has none of a row
                item.setdefault("scores", {})[name] = value
    return report, items


def draw_rows(task: Task, samples: int | None, seed: int, split: str = "test"):
    """A seeded choice of a split: row numbers, rows and their chats, checked."""
    everything = task.rows(split)
    numbers = list(range(len(everything)))
    if samples is not None and samples < len(numbers):
        numbers = sorted(random.Random(seed).sample(numbers, samples))
    rows = [everything[number] for number in numbers]
    chats = [task.messages(row) for row in rows]
    for number, row, chat in zip(numbers, rows, chats, strict=True):
        check_chat(chat, task.where(row, number))
    return numbers, rows, chats


def score_rows(model, processor, task: Task, *, samples: int | None, seed: int = 0) -> dict:
    """The mean score of test rows without the controls: ``{"n", "metric", NAME, "ci95"}``.

    ``metric`` is NAME, that of the score: ``accuracy``, or what the task has instead.
    """
    numbers, rows, chats = draw_rows(task, samples, seed)
    prompts = [chat[:-1] for chat in chats]
    replies = generate_replies(
        model, processor, prompts, task.max_new_tokens, 64, None,
        where=lambda i: task.where(rows[i], numbers[i]),
    )  # fmt: skip
    score, name = Task.metrics(task, replies, rows), task.score_name  # and no other of its metrics
    found = _summary(score, {}, row_groups(task, rows), seed)["metrics"][name]
    return {"n": len(rows), "metric": name, name: found["value"], "ci95": found["ci95"]}


def generate_replies(
    model, processor, prompts, max_new_tokens, batch_size, name, sharing=True,
    where: Callable[[int], str] | None = None,
) -> list[str]:  # fmt: skip
    """Greedy replies to chats, in the order of ``prompts``.

    Args:
        name: what the progress bar says; ``None`` shows none.
        sharing: run the common starts of the prompts once, see :mod:`mmpeft.prefix`; what
            :func:`~mmpeft.prefix.try_sharing` gave, used again, also knows its pictures.
        where: names a prompt by its number, for error messages.
    """
    bar = tqdm(total=len(prompts), desc=name, unit="reply", disable=name is None)
    if sharing is True:
        sharing = try_sharing(model, processor)
    given = processor, prompts, max_new_tokens, batch_size, where, bar.update
    written = _shared(sharing, *given) if sharing else _in_batches(model, *given)
    replies = [""] * len(prompts)
    with bar:
        for numbers, ids in written:
            texts = processor.post_process_image_text_to_text(ids)
            for number, text in zip(numbers, texts, strict=True):
                replies[number] = text.strip()
    return replies


def _shared(sharing, processor, prompts, max_new_tokens, batch_size, where, done):
    """Yield numbers of prompts and the ids of their replies; what they share runs once."""
    order, size = _by_picture(prompts), ENCODED * batch_size
    for first in range(0, len(order), size):
        numbers, places = order[first : first + size], {}
        with _named(where, numbers, processor, prompts):
            written = sharing.replies(
                [Prompt.of(processor, prompts[i], places) for i in numbers],  # no longer kept
                max_new_tokens, batch_size, done,
            )  # fmt: skip
        yield numbers, written


@torch.inference_mode()
def _in_batches(model, processor, prompts, max_new_tokens, batch_size, where, done):
    """The same with every prompt from its first token on, batched by length of text."""
    order = sorted(range(len(prompts)), key=lambda i: len(words(*prompts[i])))
    for first in range(0, len(order), batch_size):
        numbers = order[first : first + batch_size]
        with _named(where, numbers, processor, prompts):
            inputs = _encode(processor, [prompts[i] for i in numbers]).to(model.device)
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        done(len(numbers))
        yield numbers, ids[:, inputs["input_ids"].shape[1] :]


def _encode(processor, prompts):
    return processor.apply_chat_template(
        prompts, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        padding=True,
    )  # fmt: skip


@contextmanager
def _named(where, numbers, processor, prompts):
    """Inside, an error that one of the prompts makes by itself begins with the name of its row."""
    try:
        yield
    except (ValueError, FileNotFoundError):
        for number in numbers if where is not None else ():
            try:
                _encode(processor, [prompts[number]])
            except (ValueError, FileNotFoundError) as error:
                raise type(error)(f"{where(number)}: {error}") from None
        raise


def _by_picture(prompts) -> list[int]:
    """Numbers of the prompts, in a row those about the same pictures, and of them those alike."""
    met: dict = {}

    def key(number):
        parts = pictures(*prompts[number])
        sources = [v if isinstance(v, (str, Path)) else id(v) for p in parts for v in p.values()]
        return met.setdefault(tuple(sources), len(met)), words(*prompts[number])

    return sorted(range(len(prompts)), key=key)


def _summary(metrics, controls, groups, seed, keep=slice(None)) -> dict:
    """Every metric over the rows that ``keep`` chooses; accuracy by itself, too."""
    found = {}
    for name, metric in metrics.items():
        rows = np.asarray(metric.rows, float)[keep]
        others = {control: given[name] for control, given in controls.items() if name in given}
        found[name] = {
            "value": float(metric.of(rows)),
            "ci95": _interval(rows, metric, groups[keep], seed),
            "controls": {
                control: float(other.of(np.asarray(other.rows, float)[keep]))
                for control, other in others.items()
            },
        }
    report = {"n": len(rows)}
    if "accuracy" in found:
        report |= {("accuracy" if k == "value" else k): v for k, v in found["accuracy"].items()}
    return report | {"metrics": found}


def _interval(rows: np.ndarray, metric: Metric, groups: np.ndarray, seed: int) -> list[float]:
    """95%: Wilson's of :func:`effective_rows` for a share, else over redrawn groups of rows.

    Percentiles; of a single group, nothing is redrawn: both ends are the score.

    Args:
        groups: number of each row's group, see :func:`~mmpeft.data.row_groups`.
    """
    from statsmodels.stats.proportion import proportion_confint

    if metric.share:
        n = effective_rows(rows, groups)
        return [float(end) for end in proportion_confint(rows.mean() * n, n, method="wilson")]
    order = np.argsort(groups, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)
    random, n = np.random.default_rng(seed), len(members)
    redrawn = [
        metric.of(rows[np.concatenate([members[i] for i in random.integers(n, size=n)])])
        for _ in range(RESAMPLES)
    ]
    return [float(end) for end in np.percentile(redrawn, (2.5, 97.5))]


def effective_rows(rows: np.ndarray, groups: np.ndarray) -> float:
    """How many independent rows would tell a share as well as these, which are alike in groups.

    Rows over the design effect, the variance with groups over that without, and corrected for how
    few groups there are (Korn and Graubard, Survey Methodology 24, 1998; that Wilson's interval
    holds with it: Dean and Pagano, J. Survey Statistics and Methodology 3, 2015). Never more than
    there are rows; where all are right, or all wrong, no variance is seen: one of each group.

    Args:
        rows: 0 or 1, ``(rows,)``.
        groups: number of each row's group, ``(rows,)``.
    """
    from scipy.stats import t

    apart = rows - rows.mean()
    sums = np.bincount(np.unique(groups, return_inverse=True)[1], apart)
    n, count = len(rows), len(sums)
    if count == 1 or not apart.any():
        return float(count)
    effect = (count / (count - 1) * (sums**2).sum()) / (n / (n - 1) * (apart**2).sum())
    few = t.ppf(0.975, n - 1) / t.ppf(0.975, count - 1)
    return float(min(n, n / effect * few**2)) if effect else float(n)


def _with_picture(prompt, picture):
    """The prompt with every image and clip replaced, or removed when ``picture`` is ``None``."""
    return [
        message
        | {
            "content": [
                picture if part["type"] in ("image", "video") else part
                for part in parts(message)
                if part["type"] not in ("image", "video") or picture is not None
            ]
        }
        for message in prompt
    ]


def _shuffle_pictures(prompts, seed):
    """Every prompt with the picture of another prompt, never its own if there is another."""
    seeing = [i for i, prompt in enumerate(prompts) if pictures(*prompt)]
    images = [pictures(*prompts[i])[0] for i in seeing]
    pool = images.copy()
    random.Random(seed).shuffle(pool)
    for i in range(len(pool)):  # swap away what landed on its own picture
        if pool[i] == images[i]:
            for j in range(len(pool)):
                if pool[j] != images[i] and images[j] != pool[i]:
                    pool[i], pool[j] = pool[j], pool[i]
                    break
    draw = random.Random(seed)
    for i, own in enumerate(images):  # a picture of more than half of the prompts
        if pool[i] == own and (different := [image for image in images if image != own]):
            pool[i] = draw.choice(different)
    others = dict(zip(seeing, pool, strict=True))
    return [
        _with_picture(prompt, others[i]) if i in others else prompt
        for i, prompt in enumerate(prompts)
    ]


def _majority_answers(task, chats) -> list[str]:
    """The commonest training answer to each question; of all questions if it is a new one."""
    by_question, overall = {}, Counter()
    for row in task.rows("train"):
        chat = task.messages(row)
        by_question.setdefault(words(*chat[:-1]), Counter())[words(chat[-1])] += 1
        overall[words(chat[-1])] += 1
    return [by_question.get(words(*chat[:-1]), overall).most_common(1)[0][0] for chat in chats]


def evaluate_run(run, task: Task, **options) -> dict:
    """Load a run, evaluate it, and keep report and items in the run folder."""
    folder = Path(run) / "eval"
    kept = is_run_folder(run)  # a bare checkpoint, or a name of the hub, is left as it is
    if kept:
        folder.mkdir(exist_ok=True)  # before the work
    model, processor = load(run)
    report, items = evaluate(model, processor, task, **options)
    if not kept:
        return report
    (folder / f"{task.name}.json").write_text(json.dumps(report, indent=2) + "\n")
    lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    (folder / f"{task.name}.items.jsonl").write_text(lines)
    return report


def render(report: dict) -> str:
    """The report as a table."""
    parts = {**report["by_type"], "all": report}
    lines = _accuracies(parts) if "accuracy" in report else _metrics(parts)
    lines.append(f"{report['seconds']:.0f} s, {report['replies_per_second']:.1f} replies/s")
    return f"{report['task']}\n" + "\n".join(lines)


def _accuracies(parts: dict) -> list[str]:
    columns = {"majority": "majority", "image_withheld": "withheld", "image_shuffled": "shuffled"}
    columns = {name: columns[name] for name in parts["all"]["controls"]}
    header = ("", "n", "accuracy", "95% CI")
    lines = ["{:<8}{:>7}{:>10}{:>16}".format(*header)]
    lines[0] += "".join(f"{name:>10}" for name in columns.values())
    for name, part in parts.items():
        low, high = part["ci95"]
        controls = "".join(f"{part['controls'][column]:>10.1%}" for column in columns)
        interval = f"{low:.1%} - {high:.1%}"
        lines.append(f"{name:<8}{part['n']:>7}{part['accuracy']:>10.1%}{interval:>16}{controls}")
    return lines


def _metrics(parts: dict) -> list[str]:
    controls = next(iter(parts["all"]["metrics"].values()))["controls"]
    lines = ["{:<12}{:>7}  {:<9}{:>8}{:>18}".format("", "n", "metric", "value", "95% CI")]
    lines[0] += "".join(f"{name:>16}" for name in controls)
    for name, part in parts.items():
        for metric, found in part["metrics"].items():
            low, high = found["ci95"]
            line = f"{name:<12}{part['n']:>7}  {metric:<9}{found['value']:>8.4f}"
            others = "".join(f"{value:>16.4f}" for value in found["controls"].values())
            lines.append(f"{line}{f'{low:.4f} - {high:.4f}':>18}{others}")
    return lines
