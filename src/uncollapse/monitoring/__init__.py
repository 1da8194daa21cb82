"""The measures in other people's loops: as torchmetrics metrics, and in a Lightning callback."""
