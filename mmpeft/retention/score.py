"""Log-likelihoods of many answers from one side, by the plan of plan.py."""

import copy
import hashlib
import json
import math
from dataclasses import dataclass, field

import torch

from mmpeft.language_model import context_length
from mmpeft.retention.plan import HEADER_TOKENS, Batch, Question, plan
from mmpeft.retention.sides import RetentionError, Sides, check_finite, positions

CHUNK = 32  # positions whose logits (CHUNK, V) are read in float32 at a time, from a CPU's cache
TRIALS, TRIAL_TOKENS = 8, 16  # questions that packed rows are tried on, and tokens of their parts
# mean difference per token, in nats, that rounding can make between packed and plain rows
TOLERANCE = {torch.float32: 0.005, torch.bfloat16: 0.25, torch.float16: 0.05}


@dataclass(frozen=True)
class Opening:
    """What stands before all questions of a mode: words and a picture. Text mode has none."""

    before: str
    picture: object = field(compare=False)  # known by its hash
    sha256: str


def batch_key(batch: Batch, opening: Opening | None) -> str:
    """Hash of everything a batch feeds the model, and of what is read from it."""
    rows = [[row.tokens, row.parents, [[q.answer, cols] for q, cols in row.reads]]
            for row in batch.rows]  # fmt: skip
    opened = [opening.before, opening.sha256] if opening else None
    return hashlib.sha256(json.dumps([opened, batch.header, rows]).encode()).hexdigest()


def score(sides: Sides, side: str, questions, opening=None, store=None, bar=None) -> dict:
    """{question: (log-likelihood, is the greedy continuation)} for every distinct question."""
    batches = planned(sides, questions, opening)
    answers: dict[Question, tuple[float, bool]] = {}
    starts = {}  # KV caches of opening and header
    for batch in batches:
        key = batch_key(batch, opening)
        found = store.get(key) if store is not None else None
        if found is None:
            found = run(sides, side, batch, opening, starts)
            if store is not None:
                store.put(key, found)
        answers |= {q: (a[0], a[1]) for q, a in zip(batch.questions, found, strict=True)}
        if bar is not None:
            bar.update(len(batch.questions))
    return answers


def planned(sides: Sides, questions, opening=None) -> list[Batch]:
    """The batches of these questions. Models that cannot run packed rows get plain ones.

    Decided on the base, so that both sides run the same batches.
    """
    batches = plan(questions)
    if sides.packs is None and batches:
        sides.window = getattr(sides.text_config("base"), "sliding_window", None)
        sides.packs = _agrees(sides, questions)
    if sides.packs and not _slides(sides, batches, opening):
        return batches
    if opening is not None:
        raise RetentionError(
            "this architecture cannot continue from a picture kept in its KV cache (its own rows "
            "disagree with plain ones), so only --modes text can be measured"
        )
    return plan(questions, share=False)


def _slides(sides: Sides, batches: list[Batch], opening) -> bool:
    """Some sequence is longer than a sliding window, which a 4-D mask would ignore."""
    if sides.window is None:
        return False
    longest = max((max(row.depths) + 1 for b in batches for row in b.rows), default=0)
    if opening is not None:
        longest += sides.look(opening.before, opening.picture)["input_ids"].shape[1]
    return longest >= sides.window


def _agrees(sides: Sides, questions) -> bool:
    """Packed rows and headers give the log-likelihoods of plain rows, on the ends of questions."""
    # the ends: what is tried here is the architecture, and long contexts would take long
    ends = sorted({Question(q.context[-TRIAL_TOKENS:], q.answer[:TRIAL_TOKENS]) for q in questions})
    some = ends[:: math.ceil(len(ends) / TRIALS)]
    # other starts, so that the rows branch even if these questions do not
    some += [Question((q.answer[-1], *q.context[1:]), q.answer) for q in some]
    header = (some[0].tokens * HEADER_TOKENS)[:HEADER_TOKENS]
    behind = [Question(header + q.context, q.answer) for q in some[:: max(1, len(some) // 4)]]

    def ask(batches):
        found, starts = {}, {}
        for batch in batches:
            answers = run(sides, "base", batch, None, starts)
            found |= dict(zip(batch.questions, answers, strict=True))
        return found

    plain = ask(plan(some + behind, share=False))
    try:
        packed = ask(plan(some) + plan(behind, behind_header=1))
    except (ValueError, RuntimeError, TypeError):  # no 4-D masks, no KV cache, ...
        return False
    off = [abs(packed[q][0] - plain[q][0]) / len(q.answer) for q in plain]
    return sum(off) / len(off) <= TOLERANCE[getattr(torch, sides.dtype())]


@torch.inference_mode()
def run(sides: Sides, side: str, batch: Batch, opening, starts: dict) -> list[list]:
    """[log-likelihood, greedy] for each question of the batch, in order."""
    with sides.on(side) as model:
        start = (side, opening, batch.header)
        if start not in starts:
            starts.clear()  # headers come in order: the last one is not needed any more
            starts[start] = encode_start(sides, model, opening, batch.header)
        past, behind = starts[start]
        device = model.get_input_embeddings().weight.device
        tensors, columns = lay_out(batch, behind)
        read = torch.zeros_like(tensors["input_ids"], dtype=torch.bool)  # (B, T)
        for row, cols in enumerate(columns):
            read[row, cols] = True
        inputs = {key: value.to(device) for key, value in tensors.items()}
        mask, config = inputs["attention_mask"], model.config.get_text_config()
        if mask.dim() == 4 and config._attn_implementation == "eager":  # adds the mask as it is
            dtype = model.get_input_embeddings().weight.dtype
            shut = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
            inputs["attention_mask"] = shut
        _check_length(inputs["position_ids"], context_length(config), batch)
        if past is not None:
            inputs["past_key_values"] = copy.deepcopy(past)
            inputs["past_key_values"].batch_repeat_interleave(len(batch.rows))
        with project_only(model, read.to(device)):
            logits = model(
                **inputs, **sides.options(len(batch.rows), opening is not None),
                use_cache=past is not None,
            ).logits[0]  # (n, V), row by row  # fmt: skip
    norm, best = _normalise(logits, f"{side} on the suite")
    return _answers(batch, read, logits, norm, best)


def encode_start(sides, model, opening, header):
    """KV cache of one row with the opening and the header, and its length."""
    if opening is None and not header:
        return None, 0
    past, length = None, 0
    if opening is not None:
        inputs = sides.look(opening.before, opening.picture)
        length = inputs["input_ids"].shape[1]
        past = model(**inputs, use_cache=True).past_key_values
    if header:
        ids = torch.tensor([header], device=model.get_input_embeddings().weight.device)
        at = torch.arange(length, length + len(header), device=ids.device)[None]
        mask = torch.ones(1, length + len(header), dtype=torch.long, device=ids.device)
        past = model(
            input_ids=ids, attention_mask=mask, position_ids=at, past_key_values=past,
            use_cache=True, **sides.options(1, opening is not None),
        ).past_key_values  # fmt: skip
    return past, length + len(header)


def lay_out(batch: Batch, behind: int) -> tuple[dict, list[list[int]]]:
    """Tensors of a batch behind `behind` cached tokens, and the columns read in each row."""
    width = max(len(row.tokens) for row in batch.rows)
    shape = (len(batch.rows), width)
    ids, at = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    offset = behind - len(batch.header)  # depths count the header, not the opening
    for i, row in enumerate(batch.rows):
        ids[i, : len(row.tokens)] = torch.tensor(row.tokens)
        at[i, : len(row.tokens)] = torch.tensor(row.depths) + offset
    plain = behind == 0 and all(
        row.parents == list(range(-1, len(row.parents) - 1)) for row in batch.rows
    )
    if plain:
        mask = torch.tensor([[1] * len(r.tokens) + [0] * (width - len(r.tokens))
                             for r in batch.rows])  # fmt: skip
        at = positions(mask)
    else:
        own = torch.eye(width, dtype=torch.bool).repeat(len(batch.rows), 1, 1)  # padding: itself
        for i, row in enumerate(batch.rows):
            own[i, : len(row.tokens), : len(row.tokens)] = row.visible()
        before = torch.ones(len(batch.rows), width, behind, dtype=torch.bool)
        mask = torch.cat([before, own], dim=-1)[:, None]  # (B, 1, T, behind + T)
    columns = [sorted({c for _, cols in row.reads for c in cols}) for row in batch.rows]
    return {"input_ids": ids, "position_ids": at, "attention_mask": mask}, columns


class project_only:
    """Inside, the vocabulary projection sees the marked positions (B, T) only: (1, n, V)."""

    def __init__(self, model, read):
        self.model, self.read = model, read

    def __enter__(self):
        self.hook = self.model.get_output_embeddings().register_forward_pre_hook(
            lambda _, args: (args[0][self.read].unsqueeze(0),)
        )

    def __exit__(self, *_):
        self.hook.remove()


def _normalise(logits: torch.Tensor, what: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each position of logits (n, V): their logsumexp (n,), and the first highest one's index.

    Raises RetentionError: a logit is NaN or infinite; `what` names the batch.
    """
    sums, norms, best = [], [], []
    for part in logits.split(CHUNK):
        part = part.float()
        sums.append(part.sum(-1))  # not finite if any logit is not: one pass, where isfinite has 4
        norms.append(part.logsumexp(-1))
        best.append(part.max(-1).indices)  # argmax takes twice the time
    check_finite(torch.cat(sums), what)
    return torch.cat(norms), torch.cat(best)


def _answers(batch: Batch, read: torch.Tensor, logits, norm, best) -> list[list]:
    number = (read.flatten().cumsum(0) - 1).view_as(read)  # (B, T): row of logits
    rows, targets, lengths = [], [], []
    for i, row in enumerate(batch.rows):
        for question, cols in row.reads:
            rows += number[i, cols].tolist()
            targets += question.answer
            lengths.append(len(question.answer))
    rows = torch.tensor(rows, device=logits.device)
    targets = torch.tensor(targets, device=logits.device)
    chosen = (logits[rows, targets].float() - norm[rows]).cpu()
    greedy = (best[rows] == targets).cpu()
    return [
        [value.double().sum().item(), bool(all_best.all())]
        for value, all_best in zip(chosen.split(lengths), greedy.split(lengths), strict=True)
    ]


def _check_length(at: torch.Tensor, longest: int | None, batch: Batch) -> None:
    if longest is not None and int(at.max()) >= longest:
        raise RetentionError(
            f"a suite item of {int(at.max()) + 1} tokens is longer than the model's context of "
            f"{longest} and is never cut; leave the item out or choose another model"
        )
