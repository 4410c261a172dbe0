"""Scores of models on tasks: log-likelihoods block by block, files of scores, and their comparison.

questions.py      log-likelihood questions as token ids, and the forwards that answer them
answers.py        answers that a model has given, kept for the next run
scoring.py        continuations scored from what the output head is given, without its logits in memory
rounds.py         the rounds in which questions are answered: what is read in each, and what that takes of memory
pace.py           the time that a model takes, estimated from one of its blocks and a part of its head
outlook.py        the cost of log-likelihoods, told before work
likelihoods.py    log-likelihoods from a model of which one block at a time is in memory
whole_model.py    a model loaded whole, to write texts: spread over the device, RAM and disk
generation.py     texts that a model writes, kept batch by batch
language_model.py the model as the harness asks it: texts in, log-likelihoods or texts out
apart.py          a program of this package in a process apart: its variables, its folder, its deadline
code_program.py   the program of a child process that runs one program which a model has written
code_scoring.py   programs that a model has written, each tried in a child process, and pass@k
downloaded_metrics.py metrics that would be downloaded as code: none is
unsafe_tasks.py   tasks that are scored by running what the model has written: told apart, allowed or refused
task_code.py      code that the files of tasks bring along: found without running any of it
task_data.py      data that tasks need from elsewhere: whether they are on this machine, and how they come here
harness_settings.py settings of the harness that have no flag: which there are, and where they act
task_index.py     the harness' index of its own tasks, of the few folders that matter
tasks.py          the harness' tasks: found by name, and checked before anything of them runs
writing_tasks.py  tasks that let the model write: how much at most, and what that costs
writing_outlook.py the cost of letting a model write, found before it does
harness.py        the harness run on a model, and the one number of each task that counts
replay.py         such tasks scored in a process apart, which is given the answers; what it gives back, checked
replayed_model.py the model as that process has it: answers that were given before
replay_program.py the program of that process
models.py         a model to evaluate: built without weights, and its tokenizer
origin.py         the origin of a model: what it is, and of a merge, what was merged and how
scores.py         scores.json: what a model scored on each task, and what model it is; read, checked and written
comparable.py     whether models can be compared: other names, the same tasks, the same settings
families.py       merges that differ in their relaxation alone: parents, their order, curves over omega
hypervolume.py    the hypervolume gain: what a model adds to a population, over all tasks at once
gains.py          the gains of several models, and how far chance moves them
comparison.py     models compared: changes against parents, what of them is chance, gains
fronts.py         Pareto fronts of pairs of tasks
columns.py        the columns of a comparison's table, and what their marks mean
table.py          the table as text: for a terminal of any width, and in markdown
plots.py          a comparison as pictures, readable in grey
recommended.py    the merges of a sweep that are worth a second look
report.py         a comparison as files: markdown, CSV, JSON and pictures, in a new folder
"""
