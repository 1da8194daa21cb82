"""Which rows of a matrix are close to one another, found without a K × K array."""
