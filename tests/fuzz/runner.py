"""Many inputs of one kind, by number, and what came of them."""

import time
from collections import Counter
from random import Random

READ, REFUSED = "read", "refused"
REFUSALS = (ValueError, FileNotFoundError)


def refusal(error: Exception) -> str:
    """``REFUSED``, after a look at the words: one line, not too long, that says something."""
    words = str(error)
    assert len(words.splitlines()) == 1 and 10 < len(words) < 1000, repr(words)
    words.encode()  # printable everywhere
    return REFUSED


def run(kind, examples: int, seed: int) -> dict:
    """Try ``examples`` inputs of a module with ``make(random)`` and ``check(input) -> outcome``.

    Input ``n`` is ``make(Random(f"{seed}.{n}"))``, so that one can be made again.

    Returns:
        counts by outcome and the seconds it took.

    Raises:
        RuntimeError: ``check`` let something through; it says which input.
    """
    counts, began = Counter(), time.monotonic()
    for number in range(examples):
        example = kind.make(Random(f"{seed}.{number}"))
        try:
            counts[kind.check(example)] += 1
        except Exception as error:
            name = kind.__name__.rpartition(".")[2]
            raise RuntimeError(f"{name}: input {seed}.{number} failed: {example!r}") from error
    return {
        "examples": examples, **counts, "seed": seed,
        "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip
