"""Attacks that ask about changes nobody aimed: noise, blur, and lost contrast. They are what others must beat."""
