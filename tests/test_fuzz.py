"""Hostile files and command lines end with a code and a message: a slice of `python -m tests.fuzz`."""

from __future__ import annotations

import json
from random import Random

import pytest

from .fuzz import Case, Ended, complaints, fuzz
from .fuzz_cases import broken_data, broken_json


def test_a_slice_of_hostile_inputs_is_refused_properly():
    wrong, ends = fuzz(30, seed=11, sample=30)
    assert not wrong
    assert ends.total() == 31


@pytest.mark.slow
def test_thousands_of_hostile_inputs_are_refused_properly():
    wrong, ends = fuzz(2000, seed=0)
    assert not wrong
    assert ends.total() == 2050


def test_what_a_user_should_not_see_is_a_complaint():
    case = Case("plan", ("show", "p.json"), {})
    fine = "PlanError: the plan is none.\n  where  p.json\n  try    another"
    for ended, wanted in (
        (Ended(2, "", fine, 0.1, 10**8), []),
        (Ended(0, "", "", 0.1, 10**8), []),
        (Ended(70, "", fine, 0.1, 10**8), ["code 70"]),
        (Ended(1, "", "Traceback (most recent call last)", 0.1, 10**8), ["code 1", "traceback"]),
        (Ended(2, "", "wrong", 0.1, 10**8), ["no message in the house form"]),
        (Ended(0, "", "", 11.0, 2**31), ["11 s", "2.0 GiB"]),
    ):
        assert complaints(case, ended) == wanted
    asked = Case("plan", ("show", "p.json", "--format", "json"), {})
    assert complaints(asked, Ended(0, "noise\n{}", "", 0.1, 0)) == ["no JSON"]


def test_equal_seeds_break_files_alike():
    data = {"a": [1, 2, {"b": "c"}], "d": {"e": 0.5}}
    assert repr(broken_data(data, Random(3))) == repr(broken_data(data, Random(3)))
    broken = {broken_json(json.dumps(data).encode(), Random(seed)) for seed in range(50)}
    assert len(broken) > 30 and data == {"a": [1, 2, {"b": "c"}], "d": {"e": 0.5}}
