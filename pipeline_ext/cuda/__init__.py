"""Ranks as streams of CUDA devices: lanes, and custody of memory between them."""
