"""Measurements on the models themselves: mean activations for AIM, mutual information for ACM.

texts.py                calibration texts as token sequences
tensor_file.py          a file of tensors that is whole and durable, or absent
snapshots.py            the progress of a calibration, kept so that a killed run can be resumed
by_weight.py            statistics by the checkpoint's names, and what could not be seen
batches.py              sequences that are run together: side by side, and common beginnings once
purpose.py              the purpose for which all blocks are run, and reports of how far that is
recorded.py             the recorded way: each sequence's calls recorded, then the blocks run one by one
ways.py                 the ways to run all blocks over all texts, and what to do if a model forbids one
mean_activations.py     the mean |x| of each input channel, block by block
calibration.py          the activations of a base: from a file, from the cache, or measured now
mutual_information.py   exact mutual information of two streams of numbers
steps.py                a model stepped over texts, block by block, by whoever wants to see something of each
two_models.py           base and merged model run side by side, block by block
comparison.py           ACM's measurement within a merge
"""
