"""Weight-space merge methods: pure functions of row slices, one file a family. Importing this registers them all."""

from lowmem_aim.methods import dare, linear, nearswap, ram, slerp, task_vectors, ties
from lowmem_aim.methods.method import METHODS, Method, Parameter, PerExpert, Rows, Subject, rounds

__all__ = [
    "METHODS",
    "Method",
    "Parameter",
    "PerExpert",
    "Rows",
    "Subject",
    "dare",
    "linear",
    "nearswap",
    "ram",
    "rounds",
    "slerp",
    "task_vectors",
    "ties",
]
