"""Vision encoders: frozen networks that turn pixels into patch features.

Contract: :class:`VisionEncoder`, built by a :class:`VisionEncoderConfig`. Backends: timm,
open_clip and transformers; several encoders may be fused. Each backend separates class and
register tokens from patches by what it knows of its own model, and brings the model's own
preprocessing.
"""

from mmpeft.encoder.contract import (
    VisionEncoder,
    VisionEncoderConfig,
    fuse_on_coarsest_grid,
    weights_hash,
)
from mmpeft.encoder.fused import FusedEncoder, FusedEncoderConfig
from mmpeft.encoder.open_clip import OpenClipEncoder, OpenClipEncoderConfig
from mmpeft.encoder.timm import TimmEncoder, TimmEncoderConfig
from mmpeft.encoder.transformers import TransformersEncoder, TransformersEncoderConfig

__all__ = [
    "FusedEncoder",
    "FusedEncoderConfig",
    "OpenClipEncoder",
    "OpenClipEncoderConfig",
    "TimmEncoder",
    "TimmEncoderConfig",
    "TransformersEncoder",
    "TransformersEncoderConfig",
    "VisionEncoder",
    "VisionEncoderConfig",
    "fuse_on_coarsest_grid",
    "weights_hash",
]
