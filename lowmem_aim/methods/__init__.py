"""Weight-space merge methods: pure functions of row slices, one file a family. Importing this registers them all."""

from lowmem_aim.methods import breadcrumbs, dare, linear, model_stock, nearswap, ram, slerp, task_vectors, ties
from lowmem_aim.methods.method import METHODS, Method, Parameter, PerExpert, Rows, Subject, rounds

__all__ = [
    "METHODS",
    "Method",
    "Parameter",
    "PerExpert",
    "Rows",
    "Subject",
    "breadcrumbs",
    "dare",
    "linear",
    "model_stock",
    "nearswap",
    "ram",
    "rounds",
    "slerp",
    "task_vectors",
    "ties",
]
