"""A pipeline inside Hugging Face's Trainer."""
