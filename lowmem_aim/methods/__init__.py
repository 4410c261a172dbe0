"""Weight-space merge methods: pure functions of row slices, one file a family. Importing this registers them all."""

from lowmem_aim.methods import (
    breadcrumbs,
    dare,
    karcher,
    linear,
    model_stock,
    multislerp,
    nearswap,
    nuslerp,
    ram,
    slerp,
    task_vectors,
    ties,
    widen,
)
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
    "karcher",
    "linear",
    "model_stock",
    "multislerp",
    "nearswap",
    "nuslerp",
    "ram",
    "rounds",
    "slerp",
    "task_vectors",
    "ties",
    "widen",
]
