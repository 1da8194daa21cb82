"""Other people's files: read as data, their prototypes found, their encoders rebuilt."""
