"""What there is to run on: devices, hosts and fabric, from shorthand, presets or files."""
