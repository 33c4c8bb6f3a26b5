"""Emulated devices and the memory of their process."""

import subprocess
import sys

import pytest

from meshwright import emulation
from meshwright.emulation import check_room
from meshwright.ir.errors import LoweringError

PAGES = """
import resource, numpy as np
from meshwright.emulation import keep_memory
{keep}
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(8 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone hands such blocks back")
def test_memory_that_is_kept_is_not_asked_for_again():
    """64 MiB, twice: the second time the pages are there."""
    kept, returned = (
        int(
            subprocess.run(
                [sys.executable, "-c", PAGES.format(keep=keep)], capture_output=True, check=True
            ).stdout
        )
        for keep in ("keep_memory()", "")
    )
    assert returned < 1000 or kept < returned / 4  # huge pages: few faults either way


def test_a_plan_that_needs_more_than_this_machine_has_free_is_not_emulated(small_plan, monkeypatch):
    each = small_plan.estimate.peak_bytes
    monkeypatch.setattr(emulation, "free_bytes", lambda: 8 * each)
    check_room(small_plan, 8)
    monkeypatch.setattr(emulation, "free_bytes", lambda: 7 * each)
    with pytest.raises(
        LoweringError, match=r"needs .* for 8 emulated devices, this machine has .* free"
    ):
        check_room(small_plan, 8)
    check_room(small_plan, 4)  # in one of two processes


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone says so")
def test_free_memory_is_read():
    assert 2**20 < emulation.free_bytes() < 2**50
