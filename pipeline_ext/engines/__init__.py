"""What runs the tasks of a plan: threads of this process, a process of many, or streams of GPUs."""
