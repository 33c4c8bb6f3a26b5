"""Ctrl-C is heard wherever it falls."""

import gc
import os
import signal
import time

import pytest

from meshwright.interrupts import heard


def test_ctrl_c_inside_a_collector_callback_is_raised_again():
    """Python ignores an exception there; without `heard` the loop below would run on."""
    pressed = []

    def callback(phase: str, info: dict) -> None:
        if not pressed:
            pressed.append(phase)
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):
                pass  # the signal is handled in here

    gc.callbacks.append(callback)
    try:
        with pytest.raises(KeyboardInterrupt), heard():
            gc.collect()
            assert pressed
            until = time.monotonic() + 5
            while time.monotonic() < until:
                time.sleep(0.01)
    finally:
        gc.callbacks.remove(callback)
