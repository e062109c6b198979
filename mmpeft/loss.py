"""Cross-entropy over the learned tokens, without logits that nobody needs."""

import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Nats over all tokens: ``logits`` (n, V), ``targets`` (n,); computed in float32."""
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def summed_loss_in_chunks(project, hidden: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """As :func:`summed_loss` of ``project(hidden)``, with ``chunk`` positions' logits at a time.

    The backward computes them once more, so memory does not grow with the number of positions.

    Args:
        project: the LLM's output embeddings, ``(n, D)`` to ``(n, V)``.
        hidden: ``(n, D)``.
    """
    return sum(
        checkpoint(lambda h, t: summed_loss(project(h), t), *part, use_reentrant=False)
        for part in zip(hidden.split(chunk), targets.split(chunk), strict=True)
    )
