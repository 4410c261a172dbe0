"""The machine: memory, files, locks, devices, signals."""
