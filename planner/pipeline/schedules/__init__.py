"""Generators of pipeline schedules; `ir.schedule` says what a schedule is, `catalogue` has all by name."""

from .bidirectional import chimera, dualpipe, dualpipe_v
from .catalogue import SCHEDULES, entry, schedule_named
from .classic import gpipe, interleaved, looped_bfs, one_f_one_b, round_robin, schedule_of
from .v_shaped import v_half, v_min, zbv
from .zero_bubble import interleaved_zero_bubble, zb_h1, zb_h2

__all__ = [
    "SCHEDULES", "chimera", "dualpipe", "dualpipe_v", "entry", "gpipe", "interleaved", "interleaved_zero_bubble",
    "looped_bfs", "one_f_one_b", "round_robin", "schedule_named", "schedule_of", "v_half", "v_min", "zb_h1", "zb_h2",
    "zbv",
]  # fmt: skip
