"""Checks of arguments, tensors, their memory, and files: used by every other folder."""
