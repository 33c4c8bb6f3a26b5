"""Units: what text means, what is printed, and what is refused."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.ir import units
from meshwright.ir.errors import InfeasibleError, MeshwrightError, PlanError, did_you_mean
from meshwright.ir.units import parse_bandwidth, parse_bytes, parse_flops, parse_seconds

KINDS = ["bytes", "bandwidth", "seconds", "flops"]
quantities = st.floats(min_value=1e-9, max_value=1e21)


def of(verb: str, kind: str) -> Any:
    return getattr(units, f"{verb}_{kind}")


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (parse_bytes, "80 GiB", 80 * 2**30),
        (parse_bytes, "80 GB", 80e9),
        (parse_bytes, "  1.5MiB ", 1.5 * 2**20),
        (parse_bytes, "0 B", 0),
        (parse_bandwidth, "450 GB/s", 450e9),
        (parse_bandwidth, "3.35 TB/s", 3.35e12),
        (parse_bandwidth, "25 GBps", 25e9),
        (parse_seconds, "2 us", 2e-6),
        (parse_seconds, "2 µs", 2e-6),
        (parse_seconds, "0.1 ms", 1e-4),
        (parse_flops, "989 TFLOP/s", 989e12),
        (parse_flops, "989 TFLOPS", 989e12),
        (parse_flops, "1979 TOP/s", 1979e12),
    ],
)
def test_text_means_exactly_this_number(parse, text, value):
    assert parse(text) == value


@pytest.mark.parametrize("text", ["400 Gb/s", "400 Gbps", "400 Gbit/s", "50 GB/s"])
def test_a_small_b_is_bits(text):
    assert parse_bandwidth(text) == 50e9


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (parse_bytes, "80", "`80` has no unit.\n  try    a size in bytes is written like `80 GiB`"),
        (parse_bytes, "eighty GB", "`eighty GB` is not a number with a unit."),
        (parse_bytes, "80 GB/s", "is a bandwidth, not a size in bytes.\n  try    write `80 GB`"),
        (parse_bytes, "80 Gb", "is a size in bits, not a size in bytes.\n  try    write `80 GB`"),
        (parse_bytes, "9e999 B", "`9e999 B` is too large."),
        (parse_bandwidth, "450 GB", "not a bandwidth.\n  try    write `450 GB/s`"),
        (parse_bandwidth, "9 gb/s", "unit `gb/s`.\n  try    write `9 GB/s` or `9 Gb/s`"),
        (parse_bandwidth, "2 us", "`2 us` is a time, not a bandwidth."),
        (parse_seconds, "2 min", "`2 min` has an unknown unit `min`."),
        (parse_flops, "989 TFLOPs", "not a rate of FLOP/s.\n  try    write `989 TFLOP/s`"),
        (parse_flops, "989 TB/s", "`989 TB/s` is a bandwidth, not a rate of FLOP/s."),
    ],
)
def test_a_wrong_unit_is_refused_with_the_right_one(parse, text, message):
    with pytest.raises(MeshwrightError) as caught:
        parse(text)
    assert message in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
@given(value=quantities)
def test_what_is_printed_parses_back_to_four_digits(kind, value):
    assert of("parse", kind)(of("format", kind)(value)) == pytest.approx(value, rel=5.1e-4)


@pytest.mark.parametrize("kind", KINDS)
@given(value=st.one_of(quantities, st.integers(0, 10**15).map(float)))
def test_what_is_spelled_parses_back_exactly(kind, value):
    assert of("parse", kind)(of("spell", kind)(value)) == value


@pytest.mark.parametrize(
    ("verb", "kind", "value", "text"),
    [
        ("format", "bytes", 91.2 * 2**30, "91.2 GiB"),
        ("format", "bytes", 0, "0 B"),
        ("format", "seconds", 0.0012346, "1.235 ms"),
        ("format", "flops", 989e12, "989 TFLOP/s"),
        ("format", "bandwidth", 50e9, "50 GB/s"),
        ("spell", "bytes", 180e9, "180 GB"),
        ("spell", "bytes", 81559 * 2**20, "81559 MiB"),
        ("spell", "seconds", 2e-6, "2 us"),
        ("spell", "bandwidth", 12.5e9 / 8, "1.5625 GB/s"),
    ],
)
def test_people_read_the_unit_that_fits(verb, kind, value, text):
    assert of(verb, kind)(value) == text


def test_an_error_says_what_where_from_and_what_to_try():
    error = PlanError(
        "96 sequences cannot be divided over 5 data-parallel ranks.",
        where='step argument `tokens`, dim 0 of (96, 2048); axis "data" = 5',
        origin="cluster spec lab.yaml",
        fix="a size dividing 96 (2, 3, 4, 6, 8), or pad the batch to 100",
    )
    assert error.report() == (
        "PlanError: 96 sequences cannot be divided over 5 data-parallel ranks.\n"
        '  where  step argument `tokens`, dim 0 of (96, 2048); axis "data" = 5\n'
        "  from   cluster spec lab.yaml\n"
        "  try    a size dividing 96 (2, 3, 4, 6, 8), or pad the batch to 100"
    )


def test_rows_of_an_error_that_say_nothing_are_left_out():
    error = MeshwrightError("no.", fix="this\nor that")
    assert str(error) == "no.\n  try    this\n         or that"


def test_an_infeasible_request_keeps_its_numbers_through_a_pickle():
    error = pickle.loads(pickle.dumps(InfeasibleError("no.", needed_bytes=3.0, limit_bytes=2.0)))
    assert (str(error), error.needed_bytes, error.limit_bytes) == ("no.", 3.0, 2.0)


def test_every_error_has_an_exit_code_of_the_cli():
    codes = {kind.__name__: kind.exit_code for kind in subclasses(MeshwrightError)}
    assert codes == {
        "UsageError": 2,
        "ClusterError": 2,
        "CaptureError": 2,
        "GraphError": 2,
        "PlanError": 2,
        "InfeasibleError": 3,
        "StoppedError": 4,
        "LoweringError": 5,
        "MismatchError": 5,
        "VerificationError": 1,
        "MissingDependencyError": 6,
        "ProcessError": 7,
    }


def test_a_misspelled_word_is_answered_with_its_neighbours():
    assert did_you_mean("bandwith", ["latency", "bandwidth"]) == "`bandwidth`"
    assert did_you_mean("zzz", ["latency", "bandwidth"]) == "one of latency, bandwidth"


def subclasses(kind: type) -> list[Any]:
    return [found for sub in kind.__subclasses__() for found in (sub, *subclasses(sub))]
