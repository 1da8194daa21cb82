"""Networks: backbones, heads, and what they make of images."""
