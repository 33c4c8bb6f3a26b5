"""Stages, schedules as lists of steps, and the simulator that carries them out."""
