"""Attacks that find one thing for all samples of a call: a perturbation, a patch."""
