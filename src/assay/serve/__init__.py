"""The local web app: runs to browse and compare, samples to look at, and walks to the boundary to watch."""
