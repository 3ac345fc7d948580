"""The problem kinds as ``nn.Module`` layers: settings once, tensors per call."""

from invlayer_core.layers.equations import FixedPointLayer, RootLayer
from invlayer_core.layers.inverse import InverseLayer
from invlayer_core.layers.optimisation import LeastSquaresLayer, MinimizeLayer, NLPLayer
from invlayer_core.layers.quadratic import QPLayer

LAYERS_WITH_GUESS = (RootLayer, FixedPointLayer, MinimizeLayer, LeastSquaresLayer, NLPLayer)
"""The layers that are called with ``y0=``, to which no gradient flows."""

__all__ = [
    "LAYERS_WITH_GUESS",
    "FixedPointLayer",
    "InverseLayer",
    "LeastSquaresLayer",
    "MinimizeLayer",
    "NLPLayer",
    "QPLayer",
    "RootLayer",
]
