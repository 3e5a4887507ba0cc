"""The trainer of ``pipeline-ext train``: a byte-level language model, trained through a pipeline."""
