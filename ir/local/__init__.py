"""What one device runs of a plan, as data: its program, its text, its laws."""
