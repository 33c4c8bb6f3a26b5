"""Optimizers by name, each behind clipping by the global norm.

Published settings are passed in by the model that was trained with them.
"""

from __future__ import annotations

import optax


def clipped_adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b2: float = 0.95,
    weight_decay: float = 0.1,
    clip_norm: float = 1.0,
) -> optax.GradientTransformation:
    """AdamW behind clipping.

    Defaults: Brown et al. 2020 (GPT-3, arXiv 2005.14165), appendix B: β1 0.9,
    β2 0.95, ε 1e-8, global norm clipped at 1.0, weight decay 0.1.
    """
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(learning_rate, b1=0.9, b2=b2, eps=1e-8, weight_decay=weight_decay),
    )


def clipped_sgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float | None = 0.9,
    weight_decay: float = 0.0,
    clip_norm: float = 1.0,
) -> optax.GradientTransformation:
    """SGD behind clipping; `momentum=None` keeps no state per parameter."""
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.add_decayed_weights(weight_decay),
        optax.sgd(learning_rate, momentum=momentum),
    )
