"""The loop: rows read, merged, relaxed, rounded once, written."""
