"""A batch cut into microbatches, and their results joined."""
