"""What a run leaves behind: written safely, read back checked."""
