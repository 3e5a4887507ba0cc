"""Pipelines and replicas whose ranks are processes of torch.distributed."""
