"""The output folder: shards, journal, card; nothing in it loads as a model until everything is there.

folder.py           the output folder from outside: what lies where, and what is in the way of a run
workspace.py        the output folder while a run holds it: locked, filled, published
stages.py           the folders of named stages, removed or moved once the output is complete
records.py          the kinds of records that a journal may hold
journal.py          the journal of a run, in sqlite
requests.py         requests to a run from another terminal: to pause, to go on
writer.py           one shard's file, written front to back and made durable
tensor_facts.py     facts about the tensors of an output, and the events that tell them
shards.py           all shards of an output
unwritten.py        a merge of which nothing is written, in the place of its shards
merged.py           digests and figures of what a merge has written and read
small_files.py      every small file of an output, by name
copied.py           the files that an output takes over from its reference
layer_settings.py   the config of an output that has other layers than its reference
tokenizer_files.py  the files of the output's tokenizer, where they are not the reference's
chat_templates.py   chat templates that a recipe may name
token_ids.py        the vocabulary's size and the ids of special tokens in configs
code_keys.py        keys of JSON files that make a loader run code
portable.py         the recipe in a form that others can run
provenance.py       lowmem_aim.json: inputs, outputs, versions
card.py             the model card
effects.py          the shares of the experts' effects that a merge keeps, in all and by layer
heatmap.py          how much of the delta is left, by layer and kind of module
drawing.py          matplotlib apart from the user's settings, files and terminal
picture.py          the heat map as a PNG
sweep_folder.py     the folder of a sweep: recipes, models, scores and the report
strays.py           files in a finished output that the run did not write
verify.py           the list of digests, and the check against it
"""
