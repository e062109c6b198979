"""Greedy replies of one side to a batch of prompts."""

import torch
from transformers import StoppingCriteria

from mmpeft.data import join_images
from mmpeft.language_model import context_length
from mmpeft.model import IMAGE_INPUTS
from mmpeft.retention.sides import RetentionError, Sides

LIMIT = 256  # new tokens where a task names no limit, as in lm-eval
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@torch.inference_mode()
def write(sides: Sides, side: str, prompts: list[tuple], options: dict) -> list[tuple]:
    """(text, token ids without the end, ended by itself) for each (opening or None, token ids).

    Args:
        options: lm-eval's `generation_kwargs`: `until` and a limit of new tokens.

    Raises:
        RetentionError: the task samples, or a prompt leaves no room for the reply.
    """
    if options.get("do_sample") or options.get("temperature"):
        raise RetentionError(
            "a task asks for sampled replies; only greedy ones can be paired (do_sample: false)"
        )
    stops = options.get("until") or []
    stops = [stops] if isinstance(stops, str) else [stop for stop in stops if stop]
    limit = next((options[name] for name in LIMITS if options.get(name)), LIMIT)
    with sides.on(side) as model:
        device = model.get_input_embeddings().weight.device
        pad = sides.tokenizer.pad_token_id or 0
        inputs = _padded(sides, prompts, pad)
        width = inputs["input_ids"].shape[1]
        longest = context_length(model.config)
        if longest is not None and width + limit > longest:
            raise RetentionError(
                f"a prompt of {width} tokens and a reply of {limit} do not fit the model's context "
                f"of {longest}; nothing is cut"
            )
        own = model.generation_config.eos_token_id
        ends = {sides.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
        # the model's own settings may ask for sampling or penalties; what is None here is theirs
        settings = type(model.generation_config)(
            max_new_tokens=limit, do_sample=False, num_beams=1, repetition_penalty=1.0,
            no_repeat_ngram_size=0, min_new_tokens=0, eos_token_id=sorted(ends) or None,
            bos_token_id=model.generation_config.bos_token_id,
            pad_token_id=min(ends, default=pad),  # a row that stopped early ends where it stopped
        )  # fmt: skip
        inputs = {key: value.to(device) for key, value in inputs.items()}
        written = model.generate(
            **inputs, generation_config=settings,
            stopping_criteria=[_Stop(sides.tokenizer, stops, width)] if stops else None,
        )[:, width:]  # fmt: skip
    return [_reply(sides.tokenizer, row, ends, stops, limit) for row in written.tolist()]


class _Stop(StoppingCriteria):
    """Ends a row whose reply holds a stop string; transformers' own also reads the prompt."""

    def __init__(self, tokenizer, stops: list[str], width: int):
        self.tokenizer, self.stops, self.width = tokenizer, stops, width
        self.tail = max(len(stop.encode()) for stop in stops) + 1  # tokens, at least a byte each

    def __call__(self, input_ids, scores, **_):
        tails = self.tokenizer.batch_decode(input_ids[:, self.width :][:, -self.tail :])
        held = [any(stop in tail for stop in self.stops) for tail in tails]
        return torch.tensor(held, device=input_ids.device)


def _reply(
    tokenizer, ids: list[int], ends: set, stops: list[str], limit: int
) -> tuple[str, list[int], bool]:
    end = next((i for i, token in enumerate(ids) if token in ends), None)
    ids = ids[:end]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    found = [text.index(stop) for stop in stops if stop in text]
    return text[: min(found)] if found else text, ids, bool(found) or len(ids) < limit


def _padded(sides: Sides, prompts: list[tuple], pad: int) -> dict[str, torch.Tensor]:
    """One batch, padded on the left; pictures one after the other."""
    rows = []
    for opening, ids in prompts:
        row = sides.look(opening.before, opening.picture) if opening is not None else {}
        seen = row.pop("input_ids", torch.zeros(1, 0, dtype=torch.long)).cpu()
        sequences = {"input_ids": torch.cat([seen, torch.tensor([ids], dtype=torch.long)], dim=1)}
        sequences["attention_mask"] = torch.ones_like(sequences["input_ids"])
        for key, value in list(row.items()):
            if key not in IMAGE_INPUTS and value.shape == seen.shape:  # token types and the like
                own = row.pop(key).cpu()
                sequences.setdefault(
                    key, torch.cat([own, torch.zeros(1, len(ids), dtype=own.dtype)], dim=1)
                )
        rows.append((sequences, row))
    width = max(sequences["input_ids"].shape[1] for sequences, _ in rows)
    fill = {"input_ids": pad}
    batch = {
        key: torch.cat([
            torch.nn.functional.pad(s[key], (width - s[key].shape[1], 0), value=fill.get(key, 0))
            for s, _ in rows
        ])
        for key in rows[0][0]
    }  # fmt: skip
    pictures = [row for _, row in rows]
    others = [key for key in pictures[0] if key not in IMAGE_INPUTS]
    batch |= {key: torch.cat([row[key] for row in pictures]) for key in others}
    return batch | join_images(pictures)  # of different sizes, too
