"""Model folders: found, checked from their headers, opened, read by rows.

hub.py                model references -> local folders, downloaded from the Hub if need be
config.py             the JSON of a model folder, above all config.json, checked
headers.py            headers of safetensors files, checked
known_files.py        the files of a model folder beside its weights, by name: what loaders read
folder.py             the files of a model folder: which hold tensors, which are refused
checkpoint.py         one model on disk: the only reader of model files
tokenizer.py          the tokenizer of a model folder
parameter_names.py    a checkpoint's tensor names <-> transformers' parameter names
meta_model.py         transformers' model of a checkpoint, without weights
roles.py              the special roles of tensors, as far as merging needs them
inputs.py             all models of a recipe, and the one that is their reference
vocabulary.py         which row of a model holds which token of the reference
agreement.py          whether the models belong together: configs, tensors, tied heads
opening.py            the models of a recipe found, opened and compared
stand_in.py           models on the Hub as headers without weights, for planning
"""
