"""Attacks found on networks that can be looked into, and judged by one that cannot."""
