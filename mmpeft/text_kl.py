"""KL to the base on text: the bridge is held to what its own LLM says, adapter off.

The forward divergence KL(base || bridge) of the next token, as in learning without forgetting (Li
and Hoiem 2016, arXiv 1606.09282, section 3), where old and new model share their weights: the base
is the same LLM with its adapter switched off. It is taken

- in rows without an image, of replay or of any other text: with an image there is no answer of the
  base to hold on to;
- where a token is learned, which is where the LLM speaks: what a user writes is never generated,
  and how the base would go on with it does not matter;

and averaged over these positions, so that its weight means the same whatever their share.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmpeft.speed import compiled

CHUNK = 256  # positions whose float32 logits exist at a time


def check(config, gate: str) -> None:
    """Refuse a recipe whose KL to the base has nothing to act on.

    Args:
        config: the :class:`~mmpeft.config.RunConfig`.
        gate: of the bridge.

    Raises:
        ValueError: it trains no adapter, has no text, or its gate keeps text from the adapter.
    """
    if config.align is not None and config.align.kl_weight:
        raise ValueError(
            f"align.kl_weight is {config.align.kl_weight}, but stage align does not train the "
            "adapter, which alone could leave the base; set instruct.kl_weight."
        )
    if config.instruct is None or not config.instruct.kl_weight:
        return
    name = f"instruct.kl_weight is {config.instruct.kl_weight}"
    if gate != "none":
        raise ValueError(
            f"{name}, but under gate {gate!r} text never reaches the adapter and stays the base's "
            "to the bit; set the weight to 0, or model.gate to none."
        )
    if config.data.replay is None:
        raise ValueError(
            f"{name}, but data.replay, whose rows of text are to be held to the base, is not set; "
            "set it (mmpeft replay writes one), or the weight to 0."
        )


class TextKL:
    """The KL term of a stage; the bridge adds it to its loss in training, as ``text_kl``.

    Attributes:
        weight: of the term in the loss.
        positions: number of positions of the whole optimizer step, over all micro-batches;
            ``None`` takes those of the batch.
        seen: ``[nats, positions]`` since the last :meth:`take`.
    """

    def __init__(self, weight: float):
        self.weight, self.positions, self.seen = weight, None, torch.zeros(2)

    def count(self, batches: list[dict]) -> int:
        """How many positions of collated batches the term is taken at."""
        total = 0
        for batch in batches:
            labels = batch["labels"]
            text = text_positions(batch.get("mm_token_type_ids"), labels, batch.get("packed"))
            total += int((supervised(labels) & text).sum())
        return total

    @torch.no_grad()
    def ask_base(self, bridge, call: dict, learned: Tensor, types: Tensor | None, hidden: bool):
        """What the base makes of the text of a batch.

        Args:
            bridge: the model.
            call: its language model's inputs.
            learned: ``(B, T)`` bool, where the next token is learned.
            types: ``(B, T)``, 1 at image positions; ``None`` is text alone.
            hidden: give what the vocabulary projection sees, not the logits.

        Returns:
            which of the learned positions are of text, ``(n,)`` bool, and the base's logits there
            ``(m, V)``, or what is projected to them ``(m, D)``; ``None`` where there are none.
        """
        text = text_positions(types, learned, call.get("packed"))
        chosen = text[learned]  # (n,)
        if not chosen.any():
            return None
        own, positions = _text_alone(call, text, learned)
        # without compiled layers: with the adapter off they would be compiled a second time
        plain = compiled(bridge, False)
        with bridge.disable_adapter(), plain, bridge._project_only(positions, hidden) as seen:
            logits = bridge.language_model(**own).logits
        return chosen, seen[0] if hidden else logits[0]

    def term(self, chosen: Tensor, base: Tensor, states: Tensor, project=None) -> Tensor:
        """The weighted divergence, a share of that of the step.

        Args:
            chosen, base: as :meth:`ask_base` gives them.
            states: of the bridge at the learned positions, ``(n, V)`` or ``(n, D)``.
            project: the vocabulary projection, for ``(n, D)``.
        """
        total = summed_kl_in_chunks(states[chosen], base, project)
        share = torch.stack([total.detach(), torch.full_like(total, len(base))])
        self.seen = self.seen.to(share.device) + share
        return self.weight * total / (self.positions or len(base))

    def take(self) -> Tensor:
        """``[nats, positions]`` since the last call."""
        seen, self.seen = self.seen, torch.zeros_like(self.seen)
        return seen


def supervised(labels: Tensor) -> Tensor:
    """``(B, T)`` bool: where the next token is learned."""
    return F.pad(labels[:, 1:] != -100, (0, 1))


def text_positions(types: Tensor | None, like: Tensor, packed=None) -> Tensor:
    """``(B, T)`` bool: what belongs to samples without an image.

    Args:
        types: ``(B, T)``, 1 at image positions, or ``None``.
        like: ``(B, T)``.
        packed: the :class:`~mmpeft.packing.PackedRow`, where several samples are in the row.
    """
    if types is None:
        return torch.ones_like(like, dtype=torch.bool)
    images = types == 1
    if packed is not None:
        return ~packed.spread(images)
    return ~images.any(1, keepdim=True).expand_as(images)


def _text_alone(call: dict, text: Tensor, learned: Tensor) -> tuple[dict, Tensor]:
    """The language model's inputs of the samples of text, and where they are learned from."""
    own, packed = dict(call), call.get("packed")
    names = ("inputs_embeds", "position_ids")
    if packed is None:
        rows = text[:, 0]
        for name in (*names, "attention_mask"):
            own[name] = None if call[name] is None else call[name][rows]
        return own, learned[rows]
    columns, own["packed"] = text[0], packed.part(text)
    for name in names:
        own[name] = None if call[name] is None else call[name][:, columns]
    return own, learned[:, columns]


def summed_kl(bridge: Tensor, base: Tensor) -> Tensor:
    """Nats of KL(base || bridge) over all positions, of logits ``(n, V)``; in float32."""
    bridge, base = (logits.float().log_softmax(-1) for logits in (bridge, base))
    return F.kl_div(bridge, base, reduction="sum", log_target=True)


def summed_kl_in_chunks(bridge: Tensor, base: Tensor, project=None, chunk: int = CHUNK) -> Tensor:
    """As :func:`summed_kl`, ``chunk`` positions at a time; the backward computes them once more.

    Args:
        project: the LLM's output embeddings, where ``bridge`` and ``base`` are ``(n, D)``.
    """

    def nats(ours, theirs):
        return summed_kl(*((ours, theirs) if project is None else map(project, (ours, theirs))))

    return sum(
        checkpoint(nats, *part, use_reentrant=False)
        for part in zip(bridge.split(chunk), base.split(chunk), strict=True)
    )
