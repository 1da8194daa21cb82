"""Is a checkpoint collapsed? From the file alone, or with images."""
