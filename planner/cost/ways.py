"""Into how many parts an op is cut, choice by choice."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Ways:
    """Into how many parts each operand, each result and the work is cut, and how many kernels it takes; one entry per
    choice."""

    operands: list[np.ndarray]
    results: list[np.ndarray]
    work: np.ndarray
    launches: np.ndarray | float = 1.0
