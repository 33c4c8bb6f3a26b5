"""A search that answers on time: it runs in a thread of its own, and what it has found when time is up is the answer,
whatever it is at: functions being compiled, a first reduction, one step of a large problem."""

from __future__ import annotations

from threading import Thread
from time import perf_counter

from .anytime import Anytime, Report
from .live import Live
from .onehot import Solution

GRACE = 0.2  # seconds for a search that looks at its clock to end by itself


def solve_until(
    live: Live, *, until: float, gap: float, seed: int = 0, report: Report | None = None
) -> Solution:
    """As `solve_live`, but never later than `until`, of `perf_counter`, by more than a moment.

    Ctrl-C ends the search like the time limit does.
    """
    search = Anytime(live, gap, until, max(0.0, until - perf_counter()), seed, report=report)
    failed: list[BaseException] = []

    def run() -> None:
        try:
            search.run()
        except BaseException as error:  # told by the thread that waits
            failed.append(error)

    thread = Thread(target=run, daemon=True)  # the end of the process is its end
    try:
        thread.start()
        thread.join(max(0.0, until - perf_counter()) + GRACE)
    except KeyboardInterrupt:
        search.stop()
        return search.answer("interrupt")
    if failed:
        raise failed[0]
    search.stop()
    return search.answer("proof" if search.closed else "time")
