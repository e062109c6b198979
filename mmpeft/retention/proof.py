"""The gate proof: how far any logit moves when the adapter is switched on."""

import hashlib
import json

import torch
from tqdm import tqdm

from mmpeft.retention.sides import RetentionError, Sides, paired_logits, positions

PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Explain in simple words why the sky is blue.",
    "Translate into German: The house is old.",
    "List three animals that live in the forest.",
    "How many days does a week have?",
    "Give me a recipe for pancakes.",
    "Who wrote the play Hamlet?",
    "Correct the mistake: She go to school every day.",
    "Is the following sentence happy or sad? I lost my best friend.",
    "Write a Python function that adds two numbers.",
    "Summarize: The meeting was moved from Monday to Friday because of the storm.",
)


def text_conversations(image=None) -> list[list[dict]]:
    """The text prompts as conversations, each with `image` before the words if one is given."""
    seen = [{"type": "image", "image": image}] if image is not None else []
    return [
        [{"role": "user", "content": [*seen, {"type": "text", "text": prompt}] if seen else prompt}]
        for prompt in PROMPTS
    ]


def max_abs_dlogit(
    sides: Sides, conversations: list[list[dict]], what: str, batch_size: int = 4
) -> float:
    """max |logit(bridge) - logit(base)| over all real positions and the whole vocabulary.

    Both sides see the same batch, so an exact 0 is an exact 0.
    """
    starts = range(0, len(conversations), batch_size)
    batches = [_encode(sides, conversations[start : start + batch_size]) for start in starts]
    most = 0.0
    bar = tqdm(total=len(batches), desc=f"gate proof: {what}", unit="batch", leave=False)
    for batch, (base, bridge) in zip(batches, paired_logits(sides, batches, what), strict=True):
        for row, mask in enumerate(batch["attention_mask"].bool()):
            change = bridge[row, mask].float() - base[row, mask].float()
            most = max(most, change.abs().max().item())
        bar.update()
    bar.close()
    return most


def _encode(sides: Sides, conversations: list[list[dict]]) -> dict:
    if not sides.chats:
        words = [conversation[0]["content"] for conversation in conversations]
        batch = sides.tokenizer(words, return_tensors="pt", padding=True)
        return {key: batch[key] for key in ("input_ids", "attention_mask")} | {
            "position_ids": positions(batch["attention_mask"])
        }
    batch = sides.chat.apply_chat_template(
        conversations,
        add_generation_prompt=True,  # so that the position a reply starts from is looked at
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
    )
    return {**batch, "position_ids": positions(batch["attention_mask"])}


def picture_effect(sides: Sides, picture) -> float:
    """max |change of the next word's logits| that a picture makes to the tuned side."""
    with sides.on("bridge") as model:
        seen = sides.look("", picture)
        device = seen["input_ids"].device
        words = torch.tensor(
            [sides.tokenizer.encode("\n" + PROMPTS[0], add_special_tokens=False)], device=device
        )
        past = model(**seen, use_cache=True).past_key_values
        mask = torch.ones(1, seen["input_ids"].shape[1] + words.shape[1], device=device)
        with_picture = model(input_ids=words, attention_mask=mask.long(), past_key_values=past)
        without = model(input_ids=words)
        change = with_picture.logits[0, -1].float() - without.logits[0, -1].float()
        return change.abs().max().item()


def prove(sides: Sides, image_prompts: list[list[dict]], irrelevant_image) -> dict:
    """`{"text", "irrelevant_image", "image"}`: what the tuning does to the logits of each.

    The last two are None for models without eyes. For two checkpoints, of which only the tuned one
    sees, and for a bridge without an adapter `image` is the change a picture makes to the tuned
    side, and `irrelevant_image` is None.

    Raises:
        RetentionError: the tuning shows no effect where it must: the sides are one model.
    """
    deltas = {"text": max_abs_dlogit(sides, text_conversations(), "text prompts")}
    deltas |= {"irrelevant_image": None, "image": None}
    if sides.kind == "bridge" and sides.adapted:
        deltas["irrelevant_image"] = max_abs_dlogit(
            sides, text_conversations(irrelevant_image), "prompts with a photograph"
        )
        deltas["image"] = max_abs_dlogit(sides, image_prompts, "image prompts")
    elif sides.sees:
        deltas["image"] = picture_effect(sides, irrelevant_image)
    if deltas["image"] == 0 or (deltas["image"] is None and deltas["text"] == 0):
        on = "text" if deltas["image"] is None else "image"
        raise RetentionError(
            f"the adapter is inactive: on {on} prompts the logits of the two sides are equal bit "
            "for bit, so a comparison would measure the base against itself. Load the trained "
            "adapter (a fresh LoRA starts at zero) and leave it enabled."
        )
    return deltas


def prompts_sha256(image_prompts: list[list[dict]]) -> str:
    """Hash of the words of every prompt of the proof (pictures are not part of it)."""

    def words(conversation):
        return [
            [turn["role"], turn["content"]]
            if isinstance(turn["content"], str)
            else [turn["role"], *(part.get("text", "<image>") for part in turn["content"])]
            for turn in conversation
        ]

    rows = [words(conversation) for conversation in [*text_conversations(), *image_prompts]]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
