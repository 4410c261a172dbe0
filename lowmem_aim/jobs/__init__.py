"""Whole jobs, one file each: prepared, done, finished.

api.py           the jobs as functions for scripts: what `import lowmem_aim` offers
preparation.py   all that a merge finds out and checks before it works
merge.py         the merge, from a recipe to a finished folder
calibrate.py     the calibration by itself, into a file
resume.py        whether an interrupted run may be resumed
plan.py          what a merge would do and need, found without doing it
forecast.py      memory, disk and time of a job, as `plan` reports them
speed.py         the speed of a disk and of a device, measured
doctor.py        the facts about a machine that a merge depends on
"""
