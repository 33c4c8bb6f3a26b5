"""The passes that local programs go through before a backend runs them, in order."""

from __future__ import annotations

from .bucket import Bucket
from .coalesce import Coalesce
from .contract import Pass

PASSES: tuple[Pass, ...] = (Coalesce(),)
TORCH_PASSES: tuple[Pass, ...] = (
    *PASSES,
    Bucket(),
)  # XLA joins by itself what is larger than `Coalesce` takes
