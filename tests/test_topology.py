"""Compiling for TPU slices that are not here."""

import importlib.util

import pytest

import meshwright as mw
from meshwright.backends.xla.capture import capture
from meshwright.backends.xla.lower import lower
from meshwright.backends.xla.topology import name_of, topology_devices
from meshwright.ir.cluster.cluster import Cluster
from meshwright.ir.errors import InfeasibleError, MismatchError, MissingDependencyError, UsageError
from meshwright.models import build

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not to be had here"
)


@pytest.mark.parametrize(
    ("cluster", "name"),
    [
        ("v5e-8", "v5e:2x4"),
        ("v5p-1024", "v5p:8x8x8"),
        ("v6e-16", "v6e:4x4"),
        ("h100x8", None),
        ("2xv5e-8@dcn", None),
    ],
)
def test_a_slice_has_the_name_that_libtpu_gives_it(cluster, name):
    assert name_of(Cluster.parse(cluster)) == name


@pytest.mark.parametrize(
    ("name", "cluster", "error", "message"),
    [
        ("eight", "v5e-8", UsageError, "`eight` is no topology"),
        ("v5e:2x4", "h100x8", MismatchError, "which is not one TPU slice"),
        ("v5e:4x4", "v5e-8", MismatchError, "whose topology is v5e:2x4, not v5e:4x4"),
    ],
)
def test_other_slices_than_the_plans_are_refused(name, cluster, error, message):
    with pytest.raises(error, match=message):
        topology_devices(name, Cluster.parse(cluster))


def test_libtpu_is_asked_for(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'meshwright\[tpu\]'"):
        topology_devices("v5e:2x4", Cluster.parse("v5e-8"))


def audited(name: str, cluster: Cluster, topology: str, **options):
    example = build(name, **options)
    arguments = (example.step, example.state, example.batch)
    plan = mw.plan(*arguments, cluster=cluster, donate_argnums=0, request=mw.Request(gap=0.05))
    devices = topology_devices(topology, cluster)
    return mw.RunningStep(lower(plan, capture(*arguments, donate_argnums=0), devices)).audit()


@needs_libtpu
@pytest.mark.slow
def test_the_compiler_of_tpus_agrees_on_bytes_and_memory():
    found = audited("gpt2", Cluster.parse("v5e-8"), "v5e:2x4", batch=64, layers=4)
    assert abs(found.difference) < 0.1
    assert -0.15 < found.memory_difference < 0.15


@needs_libtpu
@pytest.mark.slow
def test_what_does_not_fit_is_refused_with_what_it_needs():
    """The plan is told of memory that the chip does not have."""
    roomy = Cluster.parse("v5e-8").with_("device.memory", "64 GiB")
    with pytest.raises(
        InfeasibleError, match=r"XLA refuses the program: it needs .* of 15.75 GiB"
    ) as refused:
        audited("gpt2", roomy, "v5e:2x4", batch=512, layers=4)
    assert refused.value.needed_bytes > refused.value.limit_bytes
