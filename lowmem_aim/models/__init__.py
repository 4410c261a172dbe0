"""Model folders: found, checked from their headers, opened, read by rows."""
