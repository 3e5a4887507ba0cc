"""A module as a stage: its forward, its backward, and the values that pass in and out."""
