"""Where a model is cut into stages, and what its modules hold."""
