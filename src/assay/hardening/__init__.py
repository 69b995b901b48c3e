"""Hardening: objectives, one training loop, and recipes."""
