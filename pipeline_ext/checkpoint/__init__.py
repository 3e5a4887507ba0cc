"""State under the names of the unsplit model: parameters, optimizer state, and checkpoints of both."""
