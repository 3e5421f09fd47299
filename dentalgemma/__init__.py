"""Adapt a medical vision-language model to dentistry: train, merge, evaluate, publish."""

__version__ = "0.1.0.dev0"
