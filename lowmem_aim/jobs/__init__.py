"""Whole jobs, one file each: prepared, done, finished."""
