"""A run handed to other libraries: encoder, head with prototypes, and a card that says how they fared."""
