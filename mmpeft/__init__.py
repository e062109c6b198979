"""mmpeft gives any text LLM eyes, and proves it kept its words."""

import importlib
from pathlib import Path

__version__ = "0.1.0"

# A checkout keeps connectors/, tasks/, configs/ and demos/ beside this package;
# a wheel maps them inside it. Either way they are imported as mmpeft.connectors and so on.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "connectors").is_dir():
    __path__.append(str(_checkout))

_EXPORTS = {
    "BridgeConfig": "mmpeft.model",
    "BridgeForConditionalGeneration": "mmpeft.model",
    "BridgeProcessor": "mmpeft.processing",
    "Connector": "mmpeft.connector",
    "ConnectorConfig": "mmpeft.connector",
    "Task": "mmpeft.task",
    "VisionEncoder": "mmpeft.encoder",
    "VisionEncoderConfig": "mmpeft.encoder",
    "load": "mmpeft.checkpoint",
    "load_image": "mmpeft.images",
    "retain": "mmpeft.retention",
}
__all__ = ["__version__", "starter", *_EXPORTS]


def __getattr__(name: str):
    """Import a public name on first use, so that ``import mmpeft`` stays instant."""
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    if name == "starter":
        return importlib.import_module("mmpeft.starter")
    raise AttributeError(f"module 'mmpeft' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
