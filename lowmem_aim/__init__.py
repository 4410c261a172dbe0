"""Activation-informed merging of large language models, streamed from disk in little memory."""

__version__ = "0.1.0"
