"""What plans may hold, together, equals the unsharded step: `all_kinds` as a test."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import pytest

from .all_kinds import DEVICES, kind, run_kind
from .outcomes import outcomes, summary

WHOLE = 180
SAMPLE = (58, 81)


@pytest.mark.parametrize("number", SAMPLE)
def test_a_few_equal_the_unsharded_step(number):
    found = run_kind(number, 8)
    assert found.kind == "ok", str(found)


@pytest.mark.slow
def test_all_equal_the_unsharded_step():
    """But for those whose layers cannot be shared out as drawn, which are refused by name."""
    lines = list(outcomes("tests.all_kinds", list(range(WHOLE)), [], lambda n: kind(n).words))
    ends = Counter(line.split()[1] for line in lines)
    assert ends.keys() <= {"ok", "refused"} and ends["ok"] >= 150, summary(lines)


def test_every_two_of_what_is_drawn_meet():
    """Of attention, recomputation, schedules, kinds of layouts, axes of meshes and overlap."""
    drawn = [_features(number) for number in range(WHOLE)]
    for a, b in combinations(range(len(drawn[0])), 2):
        met = {(each[a], each[b]) for each in drawn}
        apart = {each[a] for each in drawn}, {each[b] for each in drawn}
        possible = {(x, y) for x in apart[0] for y in apart[1]} - _NEVER
        assert possible <= met, (a, b, possible - met)


_NEVER = {("single", "given"), ("single", "random")}  # it is laid out by a search of its own


def _features(number: int) -> tuple[object, ...]:
    it = kind(number, DEVICES)
    layout = it.layout if it.layout in ("searched", "random") else "given"
    schedule = f"{it.schedule} {it.chunks}" if it.schedule == "interleaved" else it.schedule
    return schedule, layout, it.attention, it.recompute, len(it.shape), it.overlap
