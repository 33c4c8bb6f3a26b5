"""Emulated devices and the memory of their process."""

import subprocess
import sys

import pytest

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
        int(subprocess.run([sys.executable, "-c", PAGES.format(keep=keep)], capture_output=True, check=True).stdout)
        for keep in ("keep_memory()", "")
    )
    assert returned < 1000 or kept < returned / 4  # huge pages: few faults either way
