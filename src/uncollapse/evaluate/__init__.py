"""What the papers measure, each protocol in one file of functions on feature tensors."""
