"""Attacks that see the input gradient."""
