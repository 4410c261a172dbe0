"""Scores of models on tasks: files of scores, and what a merge has gained or lost.

scores.py        scores.json: what a model scored on each task, and what model it is; read, checked and written
"""
