"""The formats that a run is exported to; free of torch."""

FORMATS = ("timm", "hf", "safetensors", "dino")
