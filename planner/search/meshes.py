"""Logical meshes worth planning on: factorisations of the cluster along its hosts."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from ...ir.cluster.cluster import Cluster
from ...ir.errors import PlanError
from ...ir.mesh import Axis, Mesh
from ...ir.units import counted

NAMES = ("x", "y", "z")


def meshes(cluster: Cluster) -> tuple[Mesh, ...]:
    """One-, two- and three-axis meshes, fewest axes first.

    The devices of one host are cut in up to two factors, the hosts likewise; an
    axis never straddles a host boundary unless it takes all devices.
    """
    hosts, per_host = cluster.hosts, cluster.per_host
    shapes: set[tuple[int, ...]] = {(hosts * per_host,)}
    inner = [d for d in _divisors(per_host) if 1 < d < per_host]
    shapes.update((hosts * per_host // d, d) for d in [*inner, per_host])
    shapes.update((hosts, per_host // d, d) for d in inner)
    shapes.update((hosts // d, d, per_host) for d in _outer(hosts))
    if hosts == 1:
        shapes.update(
            (a, b, per_host // a // b)
            for a in inner
            for b in _divisors(per_host // a)
            if 1 < b < per_host // a
        )
    kept = {tuple(n for n in shape if n > 1) or (1,) for shape in shapes}
    return tuple(mesh_of(shape) for shape in sorted(kept, key=lambda s: (len(s), s)))


def plane_meshes(
    cluster: Cluster, size: int, pinned: tuple[int, ...] | None = None
) -> tuple[Mesh, ...]:
    """Meshes of one or two axes for `size` devices next to each other, the inner axis within a host.

    Raises:
        PlanError: a pinned mesh of another size.
    """
    if pinned is not None:
        if prod(pinned) != size:
            raise PlanError(
                f"mesh {'×'.join(map(str, pinned))} has {counted(prod(pinned), 'device')}, a stage has {size}.",
                where="request: mesh", fix=f"a mesh whose axes multiply to {size}, or other stages",
            )  # fmt: skip
        return (mesh_of(pinned),)
    inner = [d for d in _divisors(cluster.per_host) if 1 < d < size and size % d == 0]
    shapes = {(size,), *((size // d, d) for d in inner)}
    return tuple(mesh_of(shape) for shape in sorted(shapes, key=lambda s: (len(s), s)))


def finer_stages(cluster: Cluster, mesh: Mesh) -> tuple[Mesh, ...]:
    """Meshes of three axes that cut one axis of a mesh of two further: no axis within a host leaves it."""
    if len(mesh.shape) != 2:
        return ()
    outer, inner = mesh.shape
    shapes = {(outer // d, d, inner) for d in _divisors(outer) if 1 < d < outer}
    shapes |= {(outer, inner // d, d) for d in _divisors(inner) if 1 < d < inner}
    few = [shape for shape in sorted(shapes) if shape[1] <= cluster.per_host]
    return tuple(map(mesh_of, few))


def stage_sizes(cluster: Cluster) -> tuple[int, ...]:
    """Devices that each stage of a pipeline may have: whole hosts, or equal parts of a host."""
    hosts, per_host = cluster.hosts, cluster.per_host
    whole = [per_host * h for h in range(2, hosts + 1) if hosts % h == 0]
    return tuple(n for n in (*_divisors(per_host), *whole) if n < cluster.size)


def mesh_of(shape: tuple[int, ...]) -> Mesh:
    return Mesh(tuple(Axis(name, size) for name, size in zip(NAMES, shape, strict=False)))


def other_groups(cluster: Cluster, mesh: Mesh) -> tuple[Mesh, ...]:
    """Of a mesh that groups hosts, those with the next smaller and larger groups that `meshes` leaves out."""
    hosts, known, here = cluster.hosts, _outer(cluster.hosts), mesh.shape[1:2]
    inside = (cluster.per_host,) * (cluster.per_host > 1)
    if len(mesh.shape) != 2 + len(inside) or here[0] not in known or mesh.shape[2:] != inside:
        return ()
    left = [d for d in _divisors(hosts) if 1 < d < hosts and d not in known]
    near = [*[d for d in left if d < here[0]][-1:], *[d for d in left if d > here[0]][:1]]
    return tuple(mesh_of((hosts // d, d, *inside)) for d in near)


def some_groups(cluster: Cluster) -> bool:
    """Whether `meshes` leaves out sizes of groups of hosts."""
    return len(_outer(cluster.hosts)) < len(_divisors(cluster.hosts)) - 2


def finest(found: Sequence[Mesh]) -> list[Mesh]:
    """Meshes that no other one refines."""
    return [
        mesh for mesh in found if not any(other.refines(mesh) for other in found if other != mesh)
    ]


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _outer(hosts: int) -> list[int]:
    """How many hosts to shard over when the rest replicate: at most three sizes."""
    inside = [d for d in _divisors(hosts) if 1 < d < hosts]
    return inside if len(inside) <= 3 else [inside[0], inside[len(inside) // 2], inside[-1]]
