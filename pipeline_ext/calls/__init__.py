"""Cutting a model by its own forward: each stage runs it and computes only its share of the calls of units."""
