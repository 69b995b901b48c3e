"""Attacks that move the values of an image instead of changing them."""
