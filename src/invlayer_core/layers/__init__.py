"""The problem kinds as ``nn.Module`` layers: settings once, tensors per call."""

from invlayer_core.layers.equations import FixedPointLayer, RootLayer
from invlayer_core.layers.inverse import InverseLayer

__all__ = ["FixedPointLayer", "InverseLayer", "RootLayer"]
