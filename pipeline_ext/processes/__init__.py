"""The processes of torch.distributed that share a pipeline: groups, connections, agreement, failures."""
