"""Random and hostile inputs: each is refused in one clear line, or comes out unchanged.

    python -m tests.fuzz --examples 100000 --seed 0

``tests/test_hostile.py`` runs a few of each kind with every test run.
"""

from importlib import import_module

KINDS = {
    name: lambda name=name: import_module(f"{__name__}.{name}")
    for name in ("pictures", "chats", "rows")
}
