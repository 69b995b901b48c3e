"""Attacks that see predicted labels only: they start at a point that meets the goal and walk along the boundary."""
