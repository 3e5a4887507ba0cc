"""The unsplit model's state: parameters and optimizer state under the model's own names, and files of them."""
