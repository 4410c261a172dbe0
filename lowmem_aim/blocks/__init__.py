"""A model run one block at a time, its weights loaded when they are needed and dropped afterwards.

shares.py       memory that running a model takes, and the division of a budget for it
observer.py     the inputs of weights, seen while modules run and given to a statistic
means.py        the mean |x| of each input channel
offload.py      the weights of a block, or of one module, loaded and dropped
calls.py        the calls of blocks, and the object that decides what happens at each
embeddings.py   an embedding's weight of which only the rows asked for are read
beside.py       the parts beside the blocks: weights loaded, embeddings read by row
past.py         keys and values of the tokens that come before a forward's own
runner.py       a model that hands its blocks and its output head to whoever runs a forward
head.py         the output head, read a few rows at a time
forwards.py     forwards that record, end, stop at or load each block
recorder.py     each block's arguments, recorded in one cheap forward, and the canary's comparison
"""
