"""Ranks as streams of GPUs."""
