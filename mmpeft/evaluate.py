"""Score a bridge on a vision task, beside controls that show whether it looks at the picture.

``majority`` answers each question with its commonest training answer. ``image_withheld`` asks the
same model without the picture, ``image_shuffled`` with the picture of another row.
"""

import json
import random
import time
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

from mmpeft.checkpoint import find_checkpoint, load
from mmpeft.data import check_chat
from mmpeft.prefix import Prompt, SharedPrompts
from mmpeft.task import Task, parts, pictures, words

SCHEMA = "mmpeft.eval/1"


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
    """Accuracy of greedy replies on the task's test split.

    Args:
        samples: that many rows, drawn with ``seed``; ``None`` takes all.
        share_prefix: run the common starts of prompts once, see :mod:`mmpeft.prefix`; off, every
            row is computed from its first token.

    Returns:
        the report (see ``docs/json.md``) and the items, one dict a row.
    """
    numbers, rows, chats = draw_rows(task, samples, seed)
    sharing = share_prefix and SharedPrompts(model, processor)

    def score(prompts, name):
        replies = generate_replies(
            model, processor, prompts, task.max_new_tokens, batch_size, name, sharing
        )
        return replies, task.score(replies, rows)

    prompts = [chat[:-1] for chat in chats]
    began = time.perf_counter()
    replies, right = score(prompts, "bridge")
    _, withheld = score([_with_picture(prompt, None) for prompt in prompts], "image withheld")
    _, shuffled = score(_shuffle_pictures(prompts, seed), "image shuffled")
    seconds = time.perf_counter() - began
    majority = task.score(_majority_answers(task, chats), rows)
    controls = {"majority": majority, "image_withheld": withheld, "image_shuffled": shuffled}

    types = [task.question_type(row) for row in rows]
    report = {"schema": SCHEMA, "task": task.name, "seed": seed, **_summary(right, controls)}
    report["by_type"] = {
        kind: _summary(*_only(right, controls, [t == kind for t in types]))
        for kind in sorted(set(types))
    }
    report["seconds"], report["replies_per_second"] = seconds, 3 * len(rows) / seconds
    items = [
        {
            "row": number,
            "type": kind,
            "question": words(*prompt),
            "reference": words(chat[-1]),
            "reply": reply,
            "right": bool(is_right),
        }
        for number, kind, prompt, chat, reply, is_right in zip(
            numbers, types, prompts, chats, replies, right, strict=True
        )
    ]
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
    """Accuracy on test rows without the controls: ``{"n", "accuracy", "ci95"}``."""
    _, rows, chats = draw_rows(task, samples, seed)
    prompts = [chat[:-1] for chat in chats]
    replies = generate_replies(model, processor, prompts, task.max_new_tokens, 64, None)
    summary = _summary(task.score(replies, rows), {})
    return {key: summary[key] for key in ("n", "accuracy", "ci95")}


def generate_replies(
    model, processor, prompts, max_new_tokens, batch_size, name, sharing=True
) -> list[str]:
    """Greedy replies to chats, in the order of ``prompts``.

    Args:
        name: what the progress bar says; ``None`` shows none.
        sharing: run the common starts of the prompts once, see :mod:`mmpeft.prefix`; a
            :class:`~mmpeft.prefix.SharedPrompts` of an earlier call also knows its pictures.
    """
    bar = tqdm(total=len(prompts), desc=name, unit="reply", disable=name is None)
    if sharing is True:
        sharing = SharedPrompts(model, processor)
    with bar:
        if not sharing or not sharing.possible():
            return _row_by_row(model, processor, prompts, max_new_tokens, batch_size, bar.update)
        places: dict = {}
        encoded = [Prompt.of(processor, prompt, places) for prompt in prompts]
        written = sharing.replies(encoded, max_new_tokens, batch_size, bar.update)
    texts = processor.post_process_image_text_to_text(written)
    return [text.strip() for text in texts]


@torch.inference_mode()
def _row_by_row(model, processor, prompts, max_new_tokens, batch_size, done) -> list[str]:
    """Every prompt from its first token on, batched by length of text."""
    order = sorted(range(len(prompts)), key=lambda i: len(words(*prompts[i])))
    replies = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        inputs = processor.apply_chat_template(
            [prompts[i] for i in batch], add_generation_prompt=True, tokenize=True,
            return_dict=True, return_tensors="pt", padding=True,
        ).to(model.device)  # fmt: skip
        generated = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = generated[:, inputs["input_ids"].shape[1] :]
        for i, reply in zip(batch, processor.post_process_image_text_to_text(new), strict=True):
            replies[i] = reply.strip()
        done(len(batch))
    return replies


def _summary(right, controls) -> dict:
    from statsmodels.stats.proportion import proportion_confint

    n = len(right)
    low, high = proportion_confint(sum(right), n, method="wilson")
    return {
        "n": n,
        "accuracy": sum(right) / n,
        "ci95": [float(low), float(high)],
        "controls": {name: sum(scores) / n for name, scores in controls.items()},
    }


def _only(right, controls, keep):
    def pick(scores):
        return [score for score, kept in zip(scores, keep, strict=True) if kept]

    return pick(right), {name: pick(scores) for name, scores in controls.items()}


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
    model, processor = load(run)
    report, items = evaluate(model, processor, task, **options)
    folder = Path(run) / "eval"
    if find_checkpoint(run) == Path(run):  # a bare checkpoint: leave it as it is
        return report
    folder.mkdir(exist_ok=True)
    (folder / f"{task.name}.json").write_text(json.dumps(report, indent=2) + "\n")
    lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    (folder / f"{task.name}.items.jsonl").write_text(lines)
    return report


def render(report: dict) -> str:
    """The report as a table."""
    header = ("", "n", "accuracy", "95% CI", "majority", "withheld", "shuffled")
    lines = ["{:<8}{:>7}{:>10}{:>16}{:>10}{:>10}{:>10}".format(*header)]
    for name, part in {**report["by_type"], "all": report}.items():
        low, high = part["ci95"]
        controls = "".join(f"{value:>10.1%}" for value in part["controls"].values())
        interval = f"{low:.1%} - {high:.1%}"
        lines.append(f"{name:<8}{part['n']:>7}{part['accuracy']:>10.1%}{interval:>16}{controls}")
    lines.append(f"{report['seconds']:.0f} s, {report['replies_per_second']:.1f} replies/s")
    return f"{report['task']}\n" + "\n".join(lines)
