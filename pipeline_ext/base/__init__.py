"""Checks of arguments, tensors, memory and files: what every other folder may use."""
