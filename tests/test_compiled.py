"""Compiled functions whose cache two processes fill at the same moment."""

from __future__ import annotations

import importlib
import multiprocessing
import sys
from contextlib import suppress
from pathlib import Path

import numba
import numpy as np
from numba.core.caching import IndexDataCacheFile

from meshwright.planner.solver.compiled import compiled

PATIENCE = 3.0  # seconds that each waits for the other, where a lock lets only one of them in
SOURCE = """
def total(x):
    s = 0
    for each in x:
        s += each
    return s
"""
NAME = "a_total_to_compile"
TYPES = ("float64", "int64")
WANTED = ["array(float64, 1d, C)", "array(int64, 1d, C)"]


def loaded(folder: Path, ours: bool):
    """As a process has it that has compiled nothing yet."""
    sys.path.insert(0, str(folder))
    sys.modules.pop(NAME, None)
    try:
        function = importlib.import_module(NAME).total
    finally:
        sys.path.remove(str(folder))
    return compiled(function) if ours else numba.njit(cache=True)(function)


def slow(folder: Path, ours: bool, read, indexed, done) -> None:
    """Reads the index, and writes both files around what the quick one does, unless that waits for it."""
    save_index, save_data = IndexDataCacheFile._save_index, IndexDataCacheFile._save_data

    def index_after_both_read(self, overloads):
        read.wait(PATIENCE)
        save_index(self, overloads)
        indexed.set()

    def data_after_all(self, name, data):
        done.wait(PATIENCE)
        save_data(self, name, data)

    IndexDataCacheFile._save_index = index_after_both_read
    IndexDataCacheFile._save_data = data_after_all
    loaded(folder, ours)(np.ones(3, TYPES[0]))


def quick(folder: Path, ours: bool, read, indexed, done) -> None:
    save_index = IndexDataCacheFile._save_index

    def index_after_the_other(self, overloads):
        read.set()
        indexed.wait(PATIENCE)
        save_index(self, overloads)

    IndexDataCacheFile._save_index = index_after_the_other
    loaded(folder, ours)(np.ones(3, TYPES[1]))
    done.set()


def types_loaded(folder: Path, ours: bool) -> list[str]:
    """For which type the code was compiled that each type is given, after both were put into the cache at once."""
    (folder / f"{NAME}.py").write_text(SOURCE)
    spawn = multiprocessing.get_context("spawn")
    events = [spawn.Event() for _ in range(3)]
    processes = [spawn.Process(target=each, args=(folder, ours, *events)) for each in (slow, quick)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    found = []
    for kind in TYPES:
        function = loaded(folder, ours)
        with suppress(TypeError):
            function(np.ones(3, kind))
        found.append(str(function.signatures[0][0]))
    return found


def test_two_processes_may_fill_the_cache_at_once(tmp_path):
    assert types_loaded(tmp_path, ours=True) == WANTED


def test_what_was_kept_of_types_that_are_gone_is_compiled_anew(tmp_path):
    for name in ("Pair", "Couple"):
        source = f"from typing import NamedTuple\nclass {name}(NamedTuple):\n    a: float\n    b: float\n"
        (tmp_path / f"{NAME}.py").write_text(source + SOURCE)
        total = loaded(tmp_path, ours=True)
        assert total(getattr(sys.modules[NAME], name)(1.0, 2.0)) == 3.0


def test_numbas_own_cache_gives_code_for_other_types(tmp_path):
    """Why there is one of ours; it may go once this fails."""
    assert types_loaded(tmp_path, ours=False) != WANTED


def test_a_damaged_cache_is_made_anew(tmp_path):
    (tmp_path / f"{NAME}.py").write_text(SOURCE)
    assert loaded(tmp_path, ours=True)(np.ones(3)) == 3.0
    [index] = (tmp_path / "__pycache__").glob("*.nbi")
    index.write_bytes(index.read_bytes()[:40])
    assert loaded(tmp_path, ours=True)(np.ones(3)) == 3.0
