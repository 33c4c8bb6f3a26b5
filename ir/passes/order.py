"""The passes that every local program goes through before a backend runs it, in order."""

from __future__ import annotations

from .coalesce import Coalesce
from .contract import Pass

PASSES: tuple[Pass, ...] = (Coalesce(),)
