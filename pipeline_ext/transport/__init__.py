"""How results get from stage to stage: channels, messages, and the buffers that hold them."""
