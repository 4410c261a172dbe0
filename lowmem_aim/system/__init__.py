"""The machine: memory, files, locks, devices and signals.

options.py        the settings of a job, as the command line gives them
defaults_file.py  the file of defaults: values of flags that change no byte
memory.py         memory budgets, what is used and what is free
devices.py        the device that computes slices, and copies to and from it
on_demand.py      torch and numpy, imported when they are first used
dtypes.py         the dtypes of tensors in files, known without torch
tensors.py        tensors as bytes, and memory for large ones outside the heap
tensor_store.py   tensors between two uses: on the device, in RAM or in a file
run.py            a running job: its options, device, memory budget and events
files.py          files: opened only if regular, written whole or not at all
address_space.py  the limit of a process's address space
process_limits.py limits that a process sets itself: its memory, its time, no network
confinement.py    the files and processes that a process can reach, limited by itself for good
faults.py         system calls that failed, explained to the user
lock.py           the lock of an output folder
characters.py     the characters that stdout and stderr can show: ASCII in place of bars, if need be
beginning.py      the moment at which the command began
interrupts.py     signals: end, pause, report progress
bugs.py           the traceback of a bug, kept for a report
"""
