"""Two small MNIST networks that ship with the package, one trained plainly and one to be robust."""
