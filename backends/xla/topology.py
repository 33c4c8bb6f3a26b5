"""TPU slices that are not here: libtpu compiles for them on any Linux machine.

A topology is written as libtpu writes it, `v5e:2x4` or `v5p:8x8x8`: the chip and the chips along
each dimension of the slice.
"""

from __future__ import annotations

import importlib.util
import os
import re
from math import prod
from typing import Any

from ...ir.cluster.cluster import Cluster
from ...ir.errors import MismatchError, MissingDependencyError, UsageError

# libtpu looks for a TPU's host around it otherwise, complains that there is none, and refuses a second
# process beside a first, as if both would run something.
ALONE = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}  # fmt: skip


def name_of(cluster: Cluster) -> str | None:
    """The topology of a cluster that is one TPU slice; None for any other."""
    shape = cluster.fabric[0].shape if cluster.fabric else None
    if cluster.device.kind != "tpu" or not shape or prod(shape) != cluster.size:
        return None
    return f"{cluster.groups[0].device}:{'x'.join(map(str, shape))}"


def topology_devices(name: str, cluster: Cluster) -> list[Any]:
    """The devices of a slice, to compile for; they cannot run anything.

    Args:
        name: the topology, as `v5e:2x4`.
        cluster: what the plan was made for; it must be this slice.

    Raises:
        UsageError: no such topology.
        MismatchError: the plan is for something else.
        MissingDependencyError: libtpu is not installed.
    """
    match = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)*)", name)
    if not match:
        raise UsageError(
            f"`{name}` is no topology.",
            where="--topology",
            fix="chip and shape, as v5e:2x4 or v5p:8x8x8",
        )
    expected = name_of(cluster)
    if expected is None:
        raise MismatchError(
            f"the plan is for {cluster.name}, which is not one TPU slice.",
            where=f"--topology {name}", fix="plan for a slice, as --cluster v5e-8",
        )  # fmt: skip
    if name != expected:
        raise MismatchError(
            f"the plan is for {cluster.name}, whose topology is {expected}, not {name}.",
            where="--topology", fix=f"--topology {expected}, or plan for the other slice",
        )  # fmt: skip
    if importlib.util.find_spec("libtpu") is None:
        raise MissingDependencyError(
            "compiling for a TPU needs the package libtpu, which is not installed.",
            where=f"--topology {name}", fix="pip install 'meshwright[tpu]' (Linux on x86-64)",
        )  # fmt: skip
    return _described(name, cluster.size)


def _described(name: str, size: int) -> list[Any]:
    for variable, value in ALONE.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:  # jax passes on whatever libtpu says
        raise UsageError(
            f"libtpu does not know {name}: {str(error).splitlines()[0]}.",
            where="--topology", fix="a slice that exists, as v5e:2x4",
        ) from error  # fmt: skip
    if len(found) != size:
        raise UsageError(
            f"libtpu sees {len(found)} devices in {name}, a plan for it has {size}.",
            where="--topology", fix="v5e, v5p or v6e: there a chip is one device",
        )  # fmt: skip
    return list(found)
