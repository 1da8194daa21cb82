"""One run: set up, trained, saved, summed up."""
