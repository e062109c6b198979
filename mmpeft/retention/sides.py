"""The two sides of every comparison, made from one model: adapter off (base) and on (bridge)."""

from contextlib import contextmanager, nullcontext

import torch

SIDES = ("base", "bridge")


class RetentionError(ValueError):
    """The comparison would prove nothing, so no report is made; the message says why."""


def side(model, name: str):
    """Context in which `model` is the named side."""
    if name not in SIDES:
        raise ValueError(f"side {name!r} is not one of {', '.join(SIDES)}")
    return model.disable_adapter() if name == "base" else nullcontext()


@contextmanager
def evaluation(model):
    """Eval mode without autograd, the training flag put back afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def both_logits(model, batch: dict, what: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (B, T, V) of base and bridge on the very same batch.

    Raises:
        RetentionError: a logit of a real position is NaN or infinite; `what` names the batch.
    """
    kept = batch["attention_mask"].bool()
    out = []
    for name in SIDES:
        with evaluation(model), side(model, name):
            logits = model(**batch).logits
        check_finite(logits[kept], f"{name} on {what}")
        out.append(logits)
    return out[0], out[1]


def check_finite(logits: torch.Tensor, what: str) -> None:
    if not torch.isfinite(logits).all():
        raise RetentionError(
            f"logits of the {what} are NaN or infinite: nothing measured on them would mean "
            "anything. Look at the loss of the run, or load the model in float32."
        )


def positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position ids (B, T) that count real tokens only, so that left padding changes nothing."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
