"""Ranks as streams of CUDA devices: lanes, custody of memory between them, and whole steps as graphs."""
