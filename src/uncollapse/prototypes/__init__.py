"""The K vectors of a set, and every way to learn them."""
