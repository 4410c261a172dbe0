"""Scores of models on tasks: files of scores, and what a merge has gained or lost.

scores.py        scores.json: what a model scored on each task, and what model it is; read, checked and written
comparable.py    whether models can be compared: other names, the same tasks, the same settings
families.py      merges that differ in their relaxation alone: parents, their order, curves over omega
hypervolume.py   the hypervolume gain: what a model adds to a population, over all tasks at once
gains.py         the gains of several models, and how far chance moves them
comparison.py    models compared: changes against parents, what of them is chance, gains
fronts.py        Pareto fronts of pairs of tasks
columns.py       the columns of a comparison's table, and what their marks mean
table.py         the table as text: for a terminal of any width, and in markdown
plots.py         a comparison as pictures, readable in grey
report.py        a comparison as files: markdown, CSV, JSON and pictures, in a new folder
"""
