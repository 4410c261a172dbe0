"""Whole jobs, one file each: prepared, done, finished.

api.py           the jobs as functions for scripts: what `import lowmem_aim` offers
preparation.py   everything that a merge finds out and checks before it works
prepared.py      a merge that could begin: models, plans, what the checks have found out
checks.py        the checks before work, of `plan` and `merge` alike
stages.py        the merges of a recipe with named stages, each prepared before the first is made
held.py          the outputs of a merge while a run holds their folders
on_texts.py      models run on texts within a merge: the moments of experts, and ACM's comparison
merge.py         the merge, from a recipe to a finished folder
merge_many.py    the merges by several recipes, their models read once for as many as can share that
calibrate.py     the calibration by itself, into a file
fetch.py         the data that tasks need, downloaded, so that they can be evaluated without a network
new_file.py      the new file that a job writes, checked before work
evaluate.py      the scores of a model, from its questions to a scores.json
swept.py         the request for a sweep, and all that is checked of it before work
scored_points.py the points of a sweep in its folder: which are scored, how they compare, whose models stay
evaluation_plan.py the cost of scoring a model, found without that
sweep_plan.py    the plan of a sweep: points, readings, disk, memory and time
one_point.py     one point, merged and scored by itself, beside other processes
by_ray.py        the points of a sweep as tasks of Ray, on this machine or on a cluster
sweep.py         the sweep: many merges, each scored, all compared, the best of them named
study.py         the trials of a search, in a file of optuna's
searched.py      the request for a search, and all that is checked of it before work
search_plan.py   the plan of a search: trials, ranges, readings of the inputs, disk, memory and time
search.py        the search: a sweep whose points are chosen one after the other, by several processes
asked.py         requests for an evaluation, from keys and values
compare.py       the comparison of models by their scores, from files to a report
convert.py       pickled weights turned into safetensors, in a new folder
oddities.py      what a merge warns of before it works: idle filters, a missing tokenizer
identity.py      the identity of a run: all that its output depends on
differences.py   the differences between two runs, key by key
resume.py        whether an interrupted run may be resumed
finished.py      whether a finished output is of this job, and of its inputs as they are now
headers.py       models found for planning: those on the Hub as headers without weights
plan.py          what a merge would do and need, found without doing it
plan_many.py     the same of the merges by several recipes: how often their models are read
unwritten.py     what a merge would keep of each expert, found by making it without writing it
forecast.py      memory, disk and time of a job, as `plan` reports them
speed.py         the speed of a disk and of a device, measured
init.py          a recipe to start from, checked and written
doctor.py        the facts about a machine that a merge depends on
"""
