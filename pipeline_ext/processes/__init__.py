"""What the processes of a pipeline, or of its replicas, have to say to one another."""
