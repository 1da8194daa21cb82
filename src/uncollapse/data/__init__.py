"""Images: found, decoded, and made into views."""
