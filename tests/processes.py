"""Several processes of one run on this machine, for tests."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODEL = f"{ROOT / 'benchmarks' / 'pipeline_processes.py'}:model"
SECONDS = 150  # that a run may take on a busy machine


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def start(
    arguments: Sequence[str],
    processes: int,
    folder: Path,
    own: Mapping[int, Mapping[str, str]] | None = None,
) -> list[subprocess.Popen]:
    """Python with these arguments in each process, which share jax's variables; some have `own` ones as well."""
    address = free_address()
    env = {**os.environ, "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
    env["PYTHONPATH"] = str(ROOT / "src")
    return [
        subprocess.Popen(
            [sys.executable, *arguments], cwd=folder, text=True,
            env={**env, "JAX_PROCESS_ID": str(k), **(own or {}).get(k, {})},
            stdout=subprocess.PIPE, stderr=(folder / f"err.{k}").open("w"),
        )
        for k in range(processes)
    ]  # fmt: skip


def finish(started: Sequence[subprocess.Popen], folder: Path) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each."""
    found = []
    try:
        for k, process in enumerate(started):
            out, _ = process.communicate(timeout=SECONDS)
            found.append((process.returncode, out, (folder / f"err.{k}").read_text()))
    finally:
        for process in started:
            process.kill()
    return found
