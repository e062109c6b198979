"""What a trial forward shows of an LLM that its modules and names do not tell."""

from typing import NamedTuple

import torch
from torch import Size, Tensor, nn

NOT_CALLED = (
    "this LLM reads the weights there without calling the layer, so an adapter would not act"
)
NO_TENSOR = "the layer returns more than a tensor, to which this method cannot add"


@torch.no_grad()
def probe(language_model: nn.Module, tokens: int = 8) -> Tensor | None:
    """Logits of a few tokens; ``None`` where there are no weights yet.

    Not compiled: compiled layers do not look for new hooks.
    """
    table = language_model.get_input_embeddings().weight
    if table.device.type == "meta":
        return None
    ids = torch.arange(tokens, device=table.device)[None] * 7 % len(table)
    with torch.compiler.set_stance("force_eager"):
        return language_model(input_ids=ids, use_cache=False).logits


def is_base_when_off(wrapped, before: Tensor) -> bool:
    """Whether a ``PeftModel`` that is switched off gives what the LLM gave to :func:`probe`."""
    with wrapped.disable_adapter():
        return torch.equal(before, probe(wrapped))


def find_unserved(language_model: nn.Module, whole: bool = False) -> dict[str, str]:
    """Paths of modules with weights that an adapter would be around in vain, and why.

    - Those whose parent runs without calling them: it reads their weights itself (convolutions and
      step sizes of state space layers). Experts that no token went to are not among them, for
      nothing calls an expert's layers but the expert.
    - Linear layers that return more than a tensor (routers to experts), unless the adapter stands
      for the ``whole`` module.

    Empty where there are no weights yet.
    """
    seen = _calls(language_model, counts=(8,))
    found = {}
    for path, module in language_model.named_modules():
        if path in seen:
            adds_to = [] if whole or not isinstance(module, nn.Linear) else seen[path]
            if not all(call.gives_tensor for call in adds_to):
                found[path] = NO_TENSOR
        elif path.rpartition(".")[0] in seen and any(True for _ in module.parameters(False)):
            found[path] = NOT_CALLED
    return found


def find_tokens_third(language_model: nn.Module) -> set[str]:
    """Paths of modules that see tokens at dimension 2: some LLMs' norms, and convolutions.

    ``(B, heads, T, d)`` and ``(B, C, T)``. A shape does not tell, for there may be as many tokens
    as heads. Tries it: the second dimension of other inputs grows with the tokens. Empty where
    there are no weights yet.
    """
    found = set()
    for path, calls in _calls(language_model, counts=(2, 3)).items():
        shapes = [call.shape for call in calls]
        ranks = {None if shape is None else len(shape) for shape in shapes}
        if ranks <= {3, 4} and len({shape[1] for shape in shapes}) == 1:
            found.add(path)
    return found


class _Call(NamedTuple):
    shape: Size | None  # of the first argument
    gives_tensor: bool


def _calls(language_model: nn.Module, counts) -> dict[str, list[_Call]]:
    """The calls of each module, for rows of so many tokens."""
    seen: dict[str, list] = {}

    def look(path, args, output):
        shape = args[0].shape if args and isinstance(args[0], Tensor) else None
        seen.setdefault(path, []).append(_Call(shape, isinstance(output, Tensor)))

    hooks = [
        module.register_forward_hook(lambda _, args, output, path=path: look(path, args, output))
        for path, module in language_model.named_modules()
    ]
    try:
        for count in counts:
            probe(language_model, count)
    finally:
        for hook in hooks:
            hook.remove()
    return seen
