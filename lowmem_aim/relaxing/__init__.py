"""Relaxations: activation-informed rescaling of a finished delta, on top of any merge method."""
