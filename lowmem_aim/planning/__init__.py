"""Plans: what a merge will do with every tensor, and where every byte of the output goes, from headers alone.

layers.py     a tensor's layer, kind and depth, from its name
stacks.py     the lists of a model's layers, by the names of their tensors
modules.py    the sections of the output, and the slices that each is made of
sources.py    which tensor, and which of its rows, of which model
tasks.py      what a plan consists of: tasks and shards
fitting.py    whether the sources of each tensor fit each other
layout.py     recipe and headers -> Plan
survey.py     a plan as plain data, for people and for JSON
"""
