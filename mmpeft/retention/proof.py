"""The gate proof: how far any logit moves when the adapter is switched on."""

import hashlib
import json

from tqdm import tqdm

from mmpeft.retention.sides import RetentionError, both_logits, positions

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
    model, processor, conversations: list[list[dict]], what: str, batch_size: int = 4
) -> float:
    """max |logit(bridge) - logit(base)| over all real positions and the whole vocabulary.

    Both sides see the same batch, so an exact 0 is an exact 0.
    """
    most = 0.0
    starts = range(0, len(conversations), batch_size)
    for start in tqdm(starts, desc=f"gate proof: {what}", unit="batch", leave=False):
        batch = processor.apply_chat_template(
            conversations[start : start + batch_size],
            add_generation_prompt=True,  # so that the position a reply starts from is looked at
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
        ).to(model.device)
        batch["position_ids"] = positions(batch["attention_mask"])
        base, bridge = both_logits(model, dict(batch), what)
        for row, mask in enumerate(batch["attention_mask"].bool()):
            change = bridge[row, mask].float() - base[row, mask].float()
            most = max(most, change.abs().max().item())
    return most


def prove(model, processor, image_prompts: list[list[dict]], irrelevant_image) -> dict[str, float]:
    """`{"text", "irrelevant_image", "image"}`: what the adapter does to the logits of each.

    Raises:
        RetentionError: the adapter changes nothing even on `image_prompts`.
    """
    deltas = {
        "text": max_abs_dlogit(model, processor, text_conversations(), "text prompts"),
        "irrelevant_image": max_abs_dlogit(
            model, processor, text_conversations(irrelevant_image), "prompts with a photograph"
        ),
        "image": max_abs_dlogit(model, processor, image_prompts, "image prompts"),
    }
    if deltas["image"] == 0:
        raise RetentionError(
            "the adapter is inactive: on image prompts its logits equal the base bit for bit, so "
            "a comparison would measure the base against itself. Load the trained adapter (a fresh "
            "LoRA starts at zero) and leave it enabled."
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
