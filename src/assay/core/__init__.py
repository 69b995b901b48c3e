"""What every layer shares and what knows nothing of the domain: errors, types, random numbers, registry, progress."""
