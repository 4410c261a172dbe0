"""Model folders: found, checked from their headers, opened, read by rows.

hub.py                model references -> local folders, downloaded from the Hub if need be
config.py             the JSON of a model folder, above all config.json, checked
headers.py            headers of safetensors files, checked
adapter_config.py     the config of a LoRA adapter, checked
known_files.py        the files of a model folder beside its weights, by name: what loaders read
links.py              links in a model folder: which of them may be followed
folder.py             the files of a model folder: which hold tensors, which are refused
tensor_files.py       tensors of safetensors files, read as they are stored
quantisation.py       the quantisation of a model, as its config and its tensors say
checkpoint.py         one model on disk, read by rows
packed.py             weights stored as packed numbers and scales, decoded a few rows at a time
packed_scaled.py      FP8 and INT8: small numbers with a scale for each tensor, row, block or group
packed_mxfp4.py       MXFP4 experts of gpt-oss
packed_nf4.py         four-bit weights of bitsandbytes
packed_int.py         GPTQ and AWQ
in_steps.py           whole tensors whose rows are computed as they are read, some rows at a time
quantised.py          a quantised model, read as its decoded weights
matching.py           names of tensors that are known by another prefix
adapter.py            a LoRA adapter on disk, its config and header checked
changes.py            the changes of a base's tensors by an adapter
wrapping.py           a checkpoint that reads from another one
adapted.py            a checkpoint with an adapter: its tensors changed row by row
vetted.py             what transformers is given of a model folder: vetted copies of its small files
transformers_config.py  the config as transformers' class reads it
parameter_names.py    a checkpoint's tensor names <-> transformers' parameter names
meta_model.py         transformers' model of a checkpoint, without weights
sections.py           the sections of a model with several lists of layers, by mergekit's names
roles.py              the special roles of tensors, as far as merging needs them
vocabulary_files.py   the tokens in a tokenizer's files, read as JSON or text
tokenizer_union.py    one tokenizer made of several, on the JSON alone
reader_program.py     the child process that reads configs and tokenizers: its program
reader_process.py     the child process as its parent sees it: questions, answers, deadlines
reader.py             what transformers makes of a model's small files, asked of the child, and cached
output_tokenizer.py   the tokens of the output, and the model whose tokenizer's files it takes over
token_rows.py         the rows of the output's vocabulary: whose they are, and what stands where a model has none
inputs.py             all models of a recipe, and the one that is their reference
correspondence.py     which tensors of a model are those of another that names them otherwise
renamed.py            a model whose tensors appear under the names of another model
settings.py           whether the models' configs agree, as transformers reads them
vocabulary.py         which rows of the models belong together, and which tokens the output has
untied.py             a tied model seen as an untied one: its embedding is its head, too
tied_heads.py         output heads that are tied: stored all the same, or beside models with heads of their own
opening.py            the models of a recipe found, opened and compared
stand_in.py           models on the Hub as headers without weights, for planning
pickle_files.py       the pickled weights in a model folder, which `convert` turns into safetensors
pickle_program.py     the child process that loads pickled tensors: its program
pickle_process.py     the child process that loads pickled tensors, as its parent sees it
"""
