"""The merge itself: rows read, merged, relaxed, rounded once, written.

loop.py             the loop over all tensors of the plan, and the path of a slice through it
shares.py           memory that a merge takes, and the division of a budget for it
rehearsal.py        a few random numbers merged, so that all code is compiled and loaded
given_rows.py       rows of embeddings that stand where a model has none
given.py            space and moments that methods which solve are given
slices.py           the matching rows of one tensor in all models, slice by slice
pipeline.py         threads with bounded queues between them
passes.py           the passes over one tensor
targets.py          the outputs: how each relaxes and rounds merged rows, and where it puts them
effects.py          what a merge keeps of each expert's effect on its own texts
reads.py            digests of all tensors that were read
merged_weights.py   merged weights computed on demand, for ACM and RegMean++
"""
