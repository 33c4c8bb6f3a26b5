"""All schedules by name: what each needs and where it comes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ....ir.errors import PlanError, did_you_mean
from ....ir.pipeline.schedule import Schedule
from .bidirectional import chimera, dualpipe, dualpipe_v
from .classic import gpipe, interleaved, looped_bfs, one_f_one_b
from .v_shaped import v_half, v_min, zbv
from .zero_bubble import interleaved_zero_bubble, zb_h1, zb_h2


@dataclass(frozen=True, slots=True)
class Entry:
    """One schedule.

    aliases: names that papers and torch's pipelining use.
    chunks: stages per rank; None: as many as asked for.
    copies: ranks that hold each stage.
    needs: of ranks and microbatches, beyond one of each.
    """

    name: str
    aliases: tuple[str, ...]
    source: str
    make: Callable[..., Schedule]  # of ranks, microbatches, and chunks where any number goes
    chunks: int | None = 1
    copies: int = 1
    needs: str = ""


GROUPS = "microbatches in equal groups of as many as ranks, or a few more"
SCHEDULES = (
    Entry("gpipe", ("GPipe",), "Huang et al., NeurIPS 2019", gpipe),
    Entry("1f1b", ("1F1B", "DAPPLE", "PipeDream-Flush"), "Fan et al., PPoPP 2021", one_f_one_b),
    Entry("interleaved", ("Interleaved1F1B", "VPP"), "Narayanan et al., SC'21", interleaved, None, needs=GROUPS),
    Entry("looped-bfs", ("LoopedBFS", "breadth-first"), "Lamy-Poirier, MLSys 2023", looped_bfs, None),
    Entry("zb-h1", ("ZB1P",), "Qi et al., ICLR 2024", zb_h1),
    Entry("zb-h2", ("ZB2P",), "Qi et al., ICLR 2024", zb_h2),
    Entry(
        "interleaved-zero-bubble", ("InterleavedZeroBubble",), "torch.distributed.pipelining",
        interleaved_zero_bubble, None, needs=GROUPS,
    ),
    Entry("zbv", ("ZBVZeroBubble",), "Qi et al., ICLR 2024", zbv, 2),
    Entry("v-half", ("VHALF",), "Qi et al., NeurIPS 2024", v_half, 2),
    Entry("v-min", ("VMIN",), "Qi et al., NeurIPS 2024", v_min, 2),
    Entry("chimera", (), "Li and Hoefler, SC'21", chimera, copies=2, needs="even ranks and microbatches"),
    Entry(
        "dualpipe", (), "DeepSeek-AI, DeepSeek-V3, 2024", dualpipe, copies=2,
        needs="even ranks and microbatches, 2 or more microbatches per rank",
    ),
    Entry("dualpipe-v", (), "DeepSeek-AI and Sea AI Lab, 2025", dualpipe_v, 2, needs="2 or more microbatches per rank"),
)  # fmt: skip


def entry(name: str) -> Entry:
    """The schedule of a name or alias, whatever its case and hyphens.

    Raises:
        PlanError: no such schedule.
    """
    known = {_plain(n): e for e in SCHEDULES for n in (e.name, *e.aliases)}
    if (found := known.get(_plain(name))) is None:
        names = [n for e in SCHEDULES for n in (e.name, *e.aliases)]
        raise PlanError(
            f"there is no schedule `{name}`.", where="schedule", fix=did_you_mean(name, names)
        )
    return found


def schedule_named(name: str, ranks: int, microbatches: int, chunks: int | None = None) -> Schedule:
    """The schedule of a name, for so many ranks.

    Args:
        chunks: stages per rank; what the schedule needs, or 2 where it takes any, if not given.

    Raises:
        PlanError: no such schedule, or not for these numbers.
    """
    found = entry(name)
    if found.chunks is None:
        return found.make(ranks, microbatches, 2 if chunks is None else chunks)
    if chunks not in (None, found.chunks):
        raise PlanError(
            f"{found.name} has {found.chunks} {'chunk' if found.chunks == 1 else 'chunks'} per rank, not {chunks}.",
            where="chunks", fix="leave it out, or interleaved, which takes any",
        )  # fmt: skip
    return found.make(ranks, microbatches)


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")
