"""Merge methods in weight space: pure functions of row slices, one file a family.

method.py         what a method is: a script of rounds that ends in a combine; parameters; `@merge_method`
footprint.py      the memory that a method declares it takes
registry.py       all methods by name, those of other packages included
exact.py          sums that do not depend on the order of their terms
masks.py          random masks from a counter
selection.py      the elements of a delta that stay
counting.py       the k largest magnitudes, exactly, by counting
gram.py           dot products between whole tensors, and of rows
columns.py        dot products between columns
low_rank.py       weights with a low-rank change added
moments.py        second moments of inputs: large symmetric matrices, in tiles
linears.py        the linears in a tensor: their deltas in tiles, and the moments of these
systems.py        linear systems of such matrices, factorised, and solved for rows
kernels.py        the compiled loops as functions of tensors
loops.py          the loops that numba compiles for the CPU
compiled_code.py  where compiled loops are kept for the next run
linear.py         linear, passthrough
slerp.py          slerp
nuslerp.py        nuslerp
multislerp.py     multislerp
karcher.py        karcher
model_stock.py    model_stock
task_vectors.py   what the task-vector family has in common
ties.py           ties
dare.py           dare_linear, dare_ties
della.py          della, della_linear
breadcrumbs.py    breadcrumbs, breadcrumbs_ties
sce.py            sce
ram.py            ram, ramplus_tl
nearswap.py       nearswap
arcee_fusion.py   arcee_fusion
widen.py          widen
solved.py         solved deltas of linears: what the methods below have in common
output_space.py   coefficients that are solved in the space of outputs
task_arithmetic.py  task_arithmetic
covariance.py     covariance
regmean.py        regmean, regmean_plus
"""
