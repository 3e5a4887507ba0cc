"""Reports of a step, measured or simulated: traces, pictures, pages."""
