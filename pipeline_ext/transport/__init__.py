"""How results get from one stage to the next: channels, messages, and the memory they lie in."""
