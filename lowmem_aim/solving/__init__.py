"""Second moments of what each linear is given, measured block by block beside the merge that solves weights from them.

texts.py            the experts' texts, and the models that run them
input_moments.py    second moments of the inputs of a block's matrices, gathered while texts run
matrices.py         the tensors of a block by the checkpoint's names, and the moments of their matrices
states.py           the hidden states that the texts have reached: after their own expert's blocks, or the merged ones
kept_states.py      hidden states kept durably, so that a killed merge loses one block of them
needs.py            the memory that all of this takes
expert_moments.py   the moments of one block for all experts, and the way from block to block
experts.py          the experts of a merge: read and checked before any work, and measured during it
"""
