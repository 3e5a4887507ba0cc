"""The model itself: cutting it into stages, skip connections, and a watch on its modules."""
