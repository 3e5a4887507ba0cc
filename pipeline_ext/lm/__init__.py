"""The main job on real input: a byte-level language model, trained through a pipeline."""
