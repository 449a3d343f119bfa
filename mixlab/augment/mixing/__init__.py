"""Mixing an example with others of the batch, a family of methods a file."""
