"""Weight-space merge methods: pure functions of row slices, one file a family. Importing this registers them all."""

from lowmem_aim.methods import (
    arcee_fusion,
    breadcrumbs,
    dare,
    della,
    karcher,
    linear,
    model_stock,
    multislerp,
    nearswap,
    nuslerp,
    ram,
    sce,
    slerp,
    task_vectors,
    ties,
    widen,
)
from lowmem_aim.methods.extensions import find_method
from lowmem_aim.methods.method import METHODS, Method, Parameter, PerExpert, Rows, Subject, rounds

__all__ = [
    "METHODS",
    "Method",
    "Parameter",
    "PerExpert",
    "Rows",
    "Subject",
    "arcee_fusion",
    "breadcrumbs",
    "dare",
    "della",
    "find_method",
    "karcher",
    "linear",
    "model_stock",
    "multislerp",
    "nearswap",
    "nuslerp",
    "ram",
    "rounds",
    "sce",
    "slerp",
    "task_vectors",
    "ties",
    "widen",
]
