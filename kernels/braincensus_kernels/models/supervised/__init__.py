"""Supervised foreground models: MONAI's SegResNet and SwinUNETR, as CellSeg3D has them."""
