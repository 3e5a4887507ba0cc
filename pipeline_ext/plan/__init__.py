"""Plans of a step: how they are built, simulated, searched and chosen."""
