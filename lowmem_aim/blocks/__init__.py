"""A model run one block at a time, its weights coming and going."""
