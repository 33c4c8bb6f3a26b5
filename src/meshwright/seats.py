"""Which of how many processes this is: what was said, or what the environment says.

The environment may be that of jax (`JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES`, `JAX_PROCESS_ID`), of
torchrun (`MASTER_ADDR`, `MASTER_PORT`, `WORLD_SIZE`, `RANK`) or of a slurm step. Half of one is refused: a process
that takes itself for alone would train on its own while the others wait. What is left of one process only, as in
an interactive slurm allocation, says that there are no others.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from .ir.cluster.host_lists import hosts_in
from .ir.errors import UsageError
from .ir.units import parse_count

PORTS, LEAST_PORT = (
    4096,
    61440,
)  # of slurm jobs, by their number: above the ports that systems hand out
MOST = 1_000_000  # processes
JAX = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
TORCHRUN = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")
ALONE = (JAX[1], TORCHRUN[0], "SLURM_STEP_NUM_TASKS")  # set to 1, there is one process
SLURM = (
    "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_NODELIST",
    "SLURM_STEP_NUM_NODES",
)  # fmt: skip


@dataclass(frozen=True)
class Seat:
    """Which of how many processes this is; `beside` of them share its host, of which it is number `local`."""

    coordinator: str
    processes: int
    process: int
    local: int = 0
    beside: int = 1


def seat(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None,
    env: Mapping[str, str] = os.environ,
) -> Seat | None:  # fmt: skip
    """What was said, else what the environment says; None where there is one process.

    Raises:
        UsageError: half of what is needed, or what contradicts itself.
    """
    said = (coordinator, processes, process)
    if any(each is not None for each in said):
        if None in said:
            raise UsageError(
                f"coordinator {coordinator}, {processes} processes, process {process}: one is missing.",
                fix="all three, or none of them and an environment by jax, torchrun or slurm",
            )
        return _checked(Seat(coordinator or "", processes or 0, process or 0), "what was given")
    by_jax, by_torchrun = _of_jax(env), _of_torchrun(env)
    if (
        by_jax
        and by_torchrun
        and (by_jax.processes, by_jax.process) != (by_torchrun.processes, by_torchrun.process)
    ):
        raise UsageError(
            f"jax's variables say process {by_jax.process} of {by_jax.processes}, torchrun's say process"
            f" {by_torchrun.process} of {by_torchrun.processes}.", where="environment", fix="unset those of one",
        )  # fmt: skip
    found = by_jax or by_torchrun or _of_slurm(env)
    if found is None:
        _not_of_mpi(env)
    return found if found is not None and found.processes > 1 else None


def _of_jax(env: Mapping[str, str]) -> Seat | None:
    if not any(env.get(name) for name in JAX) or _alone(env, JAX, 1):
        return None
    _complete(env, JAX, "jax's variables")
    address, count, number = (env[name] for name in JAX)
    return _checked(Seat(address, _int(count, JAX[1]), _int(number, JAX[2])), "JAX_* variables")


def _of_torchrun(env: Mapping[str, str]) -> Seat | None:
    """An address alone says nothing of other processes: shells and images set one for good."""
    if not any(env.get(name) for name in TORCHRUN[:2]) or _alone(env, TORCHRUN, 0):
        return None
    _complete(env, TORCHRUN, "torchrun's variables")
    count, number, port = (_int(env[name], name) for name in ("WORLD_SIZE", "RANK", "MASTER_PORT"))
    port += env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun itself listens there
    local, beside = (
        _int(env.get(n, d), n) for n, d in (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"))
    )
    return _checked(
        Seat(f"{env['MASTER_ADDR']}:{port}", count, number, local, beside), "torchrun's variables"
    )


def _of_slurm(env: Mapping[str, str]) -> Seat | None:
    """Of a step of `srun`; a batch script's own environment is one process."""
    if not env.get(SLURM[0]) or _int(env[SLURM[0]], SLURM[0]) == 1:
        return None
    _complete(env, SLURM, "slurm's variables of a step")
    count, number, local, job, nodes = (
        _int(env[name], name) for name in (*SLURM[:4], "SLURM_STEP_NUM_NODES")
    )
    if not 1 <= nodes <= count:
        raise UsageError(
            f"{count} tasks do not fill {nodes} nodes.", where="SLURM_STEP_NUM_NODES", fix="srun"
        )
    return _checked(
        Seat(
            f"{first_host(env[SLURM[4]])}:{LEAST_PORT + job % PORTS}",
            count,
            number,
            local,
            max(1, count // nodes),
        ),
        "slurm's variables",
    )


def _not_of_mpi(env: Mapping[str, str]) -> None:
    """Processes that mpirun started are not alone, and it names no coordinator."""
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if env.get(name, "1").strip() not in ("", "0", "1") and not any(
            env.get(each) == "1" for each in ALONE
        ):
            raise UsageError(
                f"mpirun started {env[name]:.20} processes, and does not say where they meet.", where=name,
                fix="--coordinator, --processes and --process, or srun, torchrun or jax's variables",
            )  # fmt: skip


def _alone(env: Mapping[str, str], names: tuple[str, ...], count: int) -> bool:
    """Whether all that is set speaks of one process: a count of 1, and no other number than 0."""
    number = names[2] if count == 1 else names[1]
    return env.get(names[count], "").strip() == "1" and env.get(number, "0").strip() in ("", "0")


def _complete(env: Mapping[str, str], names: tuple[str, ...], what: str) -> None:
    if missing := [name for name in names if not env.get(name)]:
        there = next(name for name in names if env.get(name))
        raise UsageError(
            f"{there} is set, {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not.", where=what,
            fix=f"all of {', '.join(names)}; or, where this process is alone, unset {there}",
        )  # fmt: skip


def first_host(hosts: str) -> str:
    """`node001` of slurm's `node[001-004,009],login1`."""
    try:
        return next(hosts_in(hosts))
    except UsageError as error:
        raise UsageError.at(error, "SLURM_STEP_NODELIST", None) from error


def _checked(found: Seat, where: str) -> Seat:
    if not 0 < found.processes <= MOST or not 0 <= found.process < found.processes:
        raise UsageError(
            f"there is no process {found.process} of {found.processes}.", where=where,
            fix=f"a number from 0 to {max(found.processes - 1, 0)}",
        )  # fmt: skip
    if not (found.beside >= 1 and 0 <= found.local < found.beside <= found.processes):
        raise UsageError(
            f"there is no process {found.local} of {found.beside} on a host, of {found.processes} in all.",
            where=where, fix="each host's processes numbered from 0",
        )  # fmt: skip
    address = re.fullmatch(r"(\S+):([0-9]{1,5})", found.coordinator)
    if address is None or not 0 < int(address[2]) < 65536:
        raise UsageError(
            f"`{found.coordinator:.80}` is no address.", where=where, fix="host:port of process 0"
        )
    return found


def _int(text: str, where: str) -> int:
    try:
        return parse_count(text.strip())
    except UsageError as error:
        raise UsageError.at(error, where, None) from error
