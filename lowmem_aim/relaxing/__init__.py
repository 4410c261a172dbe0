"""Relaxations: activation-informed rescaling of a finished delta, on top of any merge method.

activations.py     the activation statistics of a base, as a small file
aim.py             AIM: the delta shrinks by input channel
controls.py        controls, for judging AIM: other factors in the place of AIM's
acm.py             ACM: the delta shrinks by layer
relaxation.py      AIM and ACM as steps that are applied to merged rows
delta_sampler.py   how much of a delta a relaxation has left, estimated from a sample
"""
