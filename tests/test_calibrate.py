"""Profiles: fits recover known constants, files are checked, clusters take what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.ir.cluster.cluster import Cluster
from meshwright.ir.errors import ClusterError
from meshwright.ir.mesh import Mesh
from meshwright.ir.profile import (
    CollectivePoint,
    CopyPoint,
    MeasuredLine,
    ProductPoint,
    Profile,
    load_profile,
)
from meshwright.planner.cost.calibrate import (
    fit_collectives,
    fit_line,
    fit_products,
    held_out,
    judge,
)
from meshwright.planner.cost.collectives import Collectives

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


@given(st.floats(1e-7, 1e-3), st.floats(1e-12, 1e-8), st.integers(0, 1000))
def test_a_line_with_noise_is_found_again(fixed, slope, seed):
    sizes = [10.0**p for p in np.linspace(2, 8, 18)]
    noise = np.random.default_rng(seed).uniform(0.97, 1.03, len(sizes))
    seconds = [(fixed + slope * x) * n for x, n in zip(sizes, noise, strict=True)]
    (a, b), fit = judge("x", sizes, seconds)
    assert fit.worst < 0.12
    predicted = np.array([a + b * x for x in sizes])
    assert np.all(np.abs(predicted / [fixed + slope * x for x in sizes] - 1) < 0.08)


def test_one_wild_point_does_not_bend_the_line():
    sizes = [1e3, 1e4, 1e5, 1e6, 1e7]
    seconds = [1e-5 + 1e-9 * x for x in sizes]
    seconds[3] *= 20
    fixed, slope = fit_line(sizes, seconds)
    assert slope == pytest.approx(1e-9, rel=0.05)
    assert fixed == pytest.approx(1e-5, rel=0.05)


def test_a_wrong_form_shows_in_what_was_held_out():
    """Seconds that grow with the square are no line: the held-out error says so."""
    sizes = [float(x) for x in np.geomspace(1, 1e4, 15)]
    _, fit = judge("square", sizes, [1e-6 + 1e-6 * x * x for x in sizes])
    assert fit.held_out == 5 and fit.worst > 0.3


def test_the_ends_are_never_held_out():
    for count in range(1, 12):
        out = held_out(count)
        assert not out[0] and not out[-1]
    assert held_out(9).sum() == 3


def test_products_and_collectives_by_family():
    points = [
        ProductPoint(dtype="f32", m=n, n=n, k=n, seconds=2e-6 + 2.0 * n**3 / 5e10)
        for n in (64, 128, 256, 384, 512)
    ]
    peaks, fits = fit_products(points, lambda p: 1.0, 2e-6)
    assert peaks["f32"] == pytest.approx(5e10, rel=1e-3)
    halved, _ = fit_products(points, lambda p: 0.5, 2e-6)
    assert halved["f32"] == pytest.approx(2 * peaks["f32"])  # what these shapes reach is half of it
    assert fits[0].family == "products f32" and fits[0].worst < 1e-6
    sent = [
        CollectivePoint(kind="all_reduce", size=4, stride=s, nbytes=x, seconds=s * (1e-5 + x / 1e9))
        for s in (1, 2)
        for x in (1e3, 1e4, 1e5, 1e6)
    ]
    lines, (fit,) = fit_collectives(sent)
    assert [(v.size, v.stride) for v in lines] == [(4, 1), (4, 2)]
    assert lines[1].slope == pytest.approx(2e-9) and fit.points == 8 and fit.worst < 1e-6


# ---------------------------------------------------------------- files and clusters


def profile(**changes) -> Profile:
    line = MeasuredLine(kind="all_reduce", size=4, stride=2, fixed=1e-3, slope=1e-8)
    figures = {
        "device": "cpu", "described": "test", "count": 8, "made_with": "test", "peak_flops": {"f32": 7e9, "bf16": 3e9},
        "memory_bandwidth": 2e9, "elementwise_flops": 1e9, "launch": 3e-6,
        "lines": (line,), "fits": (),
        "products": (ProductPoint(dtype="f32", m=1, n=1, k=1, seconds=1.0),),
        "copies": (CopyPoint(nbytes=1, seconds=1.0),), "collectives": (),
    }  # fmt: skip
    return Profile(**(figures | changes))


def test_a_cluster_file_names_its_profile(tmp_path):
    (tmp_path / "lab.json").write_text(profile().dump())
    preset = "schema: meshwright/cluster/v1\ndevices: {cpu: {preset: cpu, launch: 9 us}}\n"
    preset += "groups: [{device: cpu, hosts: 1, per_host: 8}]\nfabric: [{preset: shared}]\nprofile: lab.json\n"
    (tmp_path / "own.yaml").write_text(preset)
    found = Cluster.load(tmp_path / "own.yaml")
    assert found.device.peak_flops["f32"] == 7e9
    assert found.provenance["devices.cpu.peak_flops.f32"] == "measured"
    assert found.device.launch == 9e-6  # declared in the file: it stays
    assert found.device.stream_seconds(3e6) == pytest.approx(3e6 / 2e9)
    assert found.fingerprint() != Cluster.parse("8xcpu").fingerprint()
    again = Cluster.parse("8xcpu").with_profile(profile(launch=4e-6))
    assert again.fingerprint() != Cluster.parse("8xcpu").with_profile(profile()).fingerprint()


def test_measured_lines_price_groups_that_lie_alike():
    cluster = Cluster.parse("8xcpu").with_profile(profile())
    prices = Collectives(Mesh.of(a=4, b=2), cluster)
    assert prices.line("all_reduce", ("a",))(1e6) == pytest.approx(1e-3 + 1e-2)
    plain = Collectives(Mesh.of(a=4, b=2), Cluster.parse("8xcpu"))
    assert prices.line("all_reduce", ("b",))(1e6) == plain.line("all_reduce", ("b",))(1e6)
    joined = Collectives(Mesh.of(a=2, b=2, c=2), cluster)  # a and b together: 4 ranks, 2 apart
    assert joined.line("all_reduce", ("a", "b"))(1e6) == pytest.approx(1e-3 + 1e-2)


SPEC = """schema: meshwright/cluster/v1
devices: {{{name}: {device}}}
groups: [{{device: {name}, hosts: 1, per_host: 8}}]
fabric: [{{preset: shared}}]
"""


def test_a_rate_and_its_share_of_the_peak_stay_together(tmp_path):
    """Products reach 7 GFLOP/s: half of that is wrong, and so is all of a declared peak."""

    def load(device):
        (tmp_path / "c.yaml").write_text(SPEC.format(name="cpu", device=device))
        cluster = Cluster.load(tmp_path / "c.yaml")
        return cluster.device, cluster.with_profile(profile()).device

    plain, found = load("{preset: cpu}")
    assert found.peak_flops["f32"] * found.efficiency == 7e9
    assert found.memory_bandwidth * found.memory_efficiency == 2e9
    for stated in ("efficiency: 0.5", "peak_flops: {f32: 50 GFLOP/s}"):
        plain, found = load(f"{{preset: cpu, {stated}}}")
        assert (found.peak_flops, found.efficiency) == (plain.peak_flops, plain.efficiency)
        assert found.memory_bandwidth == 2e9 and found.launch == 3e-6
    plain, found = load("{preset: cpu, memory_efficiency: 0.5}")
    assert found.memory_bandwidth == plain.memory_bandwidth and found.peak_flops["f32"] == 7e9


def test_what_was_not_measured_keeps_its_rate():
    plain = Cluster.parse("h100x8").device
    found = Cluster.parse("h100x8").with_profile(
        profile(device="h100", peak_flops={"bf16": 7e14, "tf32": 4e14})
    )
    device = found.device
    assert (
        device.efficiency == 1.0
        and device.peak_flops["bf16"] == 7e14
        and device.peak_flops["tf32"] == 4e14
    )
    for dtype in ("f16", "f32", "f8e4m3fn"):
        assert device.peak_flops[dtype] == pytest.approx(plain.peak_flops[dtype] * plain.efficiency)
        assert found.provenance[f"devices.h100.peak_flops.{dtype}"] == "preset"
    assert device.attention_efficiency * 7e14 == pytest.approx(
        plain.attention_efficiency * plain.peak_flops["bf16"]
    )


def test_a_device_may_have_a_name_of_its_own(tmp_path):
    (tmp_path / "c.yaml").write_text(SPEC.format(name="lab-node", device="{preset: cpu}"))
    found = Cluster.load(tmp_path / "c.yaml").with_profile(profile())
    assert found.device.peak_flops["f32"] == 7e9
    assert found.provenance["devices.lab-node.launch"] == "measured"


def test_a_what_if_on_the_fabric_is_not_hidden_by_what_was_measured():
    cluster = Cluster.parse("8xcpu").with_profile(profile())

    def seconds(cluster):
        return Collectives(Mesh.of(a=4, b=2), cluster).line("all_reduce", ("a",))(1e6)

    slow, plain = ("fabric.shared.bandwidth", "1 kB/s"), Cluster.parse("8xcpu")
    assert seconds(cluster.with_(*slow)) == seconds(plain.with_(*slow)) > 100
    assert (
        seconds(cluster.with_("device.launch", "1 ms")) == seconds(cluster) == pytest.approx(1.1e-2)
    )


def test_measured_lines_do_not_price_groups_that_cross_hosts():
    """8 ranks were measured on one host; here they are 4 on each of two, over InfiniBand."""
    lines = tuple(
        MeasuredLine(kind="all_reduce", size=size, stride=stride, fixed=1e-6, slope=1e-15)
        for size, stride in ((8, 1), (4, 2), (4, 1))
    )
    plain = Cluster.parse("2xh100x4@ib400")
    found = plain.with_profile(profile(device="h100", lines=lines))
    assert [(line.size, line.stride) for line in found.measured] == [(4, 1)]
    mesh = Mesh.of(a=8)
    crossing = Collectives(mesh, plain).line("all_reduce", ("a",))
    assert Collectives(mesh, found).line("all_reduce", ("a",)) == crossing
    inside = Collectives(Mesh.of(a=2, b=4), found).line("all_reduce", ("b",))
    assert (inside.fixed, inside.slope) == (1e-6, 1e-15)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(launch=1.0), "checksum does not fit"),
        (lambda d: d.update(schema="meshwright/profile/v9"), "no profile of version"),
        (lambda d: d.clear(), "no profile of version"),
    ],
)
def test_damaged_profiles_are_refused(tmp_path, change, message):
    data = json.loads(profile().dump())
    change(data)
    path = tmp_path / "p.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ClusterError, match=message):
        load_profile(path)


def test_profiles_of_other_machines_are_refused(tmp_path):
    with pytest.raises(ClusterError, match="profile is of `cpu`"):
        Cluster.parse("h100x8").with_profile(profile())
    with pytest.raises(ClusterError, match="of 8 CPU devices on one machine, the cluster has 4"):
        Cluster.parse("4xcpu").with_profile(profile())
    with pytest.raises(ClusterError, match="there is no profile"):
        load_profile(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(ClusterError, match="this is no JSON"):
        load_profile(tmp_path / "text.json")


def test_what_a_call_costs_once_is_not_part_of_a_turn():
    """A loop of n turns takes 0.154 s + n * 2 us: the copy of its operand is no turn's."""
    from meshwright.backends.xla.measure import per_turn

    assert per_turn(lambda n: 0.154 + 2e-6 * n, 128, 640) == pytest.approx(2e-6)
    assert per_turn(lambda n: 0.154, 128, 640) == 0.154 / 640  # never zero, nor below


def test_a_small_calibration_end_to_end(monkeypatch, tmp_path):
    """Real measurements of a few sizes on 8 emulated devices, used to plan."""
    from meshwright.backends.xla import microbench
    from meshwright.calibration import calibrate, profile_text

    shapes = ((64, 64, 64), (128, 128, 128), (256, 256, 256))
    monkeypatch.setattr(
        microbench, "CPU", microbench.Sizes(shapes, (1 << 12, 1 << 14, 1 << 16), apart=1 << 18)
    )
    monkeypatch.setattr(microbench, "SENT", (1 << 8, 1 << 11, 1 << 14))
    monkeypatch.setattr(microbench, "layouts", lambda count: iter([(8, 1), (2, 4)]))
    found = calibrate()
    assert found.count == 8 and {line.kind for line in found.lines} == set(microbench._BODIES)
    assert found.peak_flops["f32"] > 1e8 and found.memory_bandwidth > 1e7
    (tmp_path / "p.json").write_text(found.dump())
    cluster = Cluster.parse("8xcpu").with_profile(tmp_path / "p.json")
    assert cluster.device.peak_flops["f32"] == found.peak_flops["f32"]
    assert "products f32" in profile_text(found)


@pytest.mark.parametrize("name", ["cpu8", "cpu8_epyc"])
def test_prices_of_emulated_devices_are_near_what_was_measured(name):
    """Of each kind over 2, 4 and 8 devices, at 256 KiB; one machine is up to twice as fast as another."""
    measured = Cluster.parse("8xcpu").with_profile(load_profile(RESULTS / f"{name}.json"))
    for sizes in ((2, 4), (4, 2), (8,)):
        mesh = Mesh.of(**dict(zip("xy", sizes, strict=False)))
        for kind in ("all_gather", "reduce_scatter", "all_reduce", "all_to_all"):
            preset, real = (
                Collectives(mesh, c).line(kind, ("x",)) for c in (Cluster.parse("8xcpu"), measured)
            )
            assert 0.5 < preset(2**18) / real(2**18) < 2, (kind, sizes)
