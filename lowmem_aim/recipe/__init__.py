"""Recipes: mergekit's YAML and the command line, read and checked.

recipe.py         what a recipe is: frozen dataclasses
readings.py       which recipes can be merged in one reading of their models
references.py     references to models: a model, and the adapter that is added to it
words.py          the words that a recipe's values may be
yaml_tree.py      YAML as a tree that keeps file, line and column
places.py         the places that relative paths lead to
values.py         the values in the tree, checked one by one
parameters.py     the `parameters` of a recipe, a module, a slice or a model
parts.py          the models: whole, by ranges of layers, or either in each of several modules
spelling.py       British and American spellings of a recipe's keys
relaxations.py    the tables `aim:` and `acm:`
solving.py        the texts of experts: the table `solve:`, and `calibration` beside a model
tokenizers.py     the keys `tokenizer_source`, `tokenizer` and `chat_template`
stages.py         the named stages of several documents, and their order
reader.py         the tree of a recipe -> Recipe
from_flags.py     command-line flags as edits of the tree
starting.py       the text of a recipe to start from
ranges.py         the values that a search may choose from: a range of numbers, or categories
points.py         the points of a sweep: the recipe of each, made from one recipe by other values
search_space.py   the merges that a search may choose from, and what it is asked for one after the other
written.py        the tree of a recipe as YAML that can be run from any folder
"""
