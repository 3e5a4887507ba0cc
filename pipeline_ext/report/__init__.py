"""What a step did, for people and for files."""
