"""Where files that can be made again are kept."""

import os
from pathlib import Path


def cache_home() -> Path:
    """`$MMPEFT_HOME`, else `$XDG_CACHE_HOME/mmpeft`, else `~/.cache/mmpeft`."""
    if home := os.environ.get("MMPEFT_HOME"):
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mmpeft"
