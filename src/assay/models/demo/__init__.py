"""Three small MNIST networks that ship with the package, trained plainly, to be robust, and to be provably so."""
