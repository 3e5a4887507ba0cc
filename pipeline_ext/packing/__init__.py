"""Many tensors as one contiguous buffer, one message."""
