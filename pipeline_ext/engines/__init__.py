"""Engines, which run the tasks of a plan: on threads of one process, in many processes, or on GPU streams."""
