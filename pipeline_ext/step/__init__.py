"""A training step, from a batch to gradients."""
