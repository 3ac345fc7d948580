"""Unknowns that are no vectors: manifolds with their charts, and the Lie groups of plane and space."""

from invlayer_core.manifolds.euclidean import Euclidean
from invlayer_core.manifolds.manifold import LieGroup, Manifold
from invlayer_core.manifolds.plane import SE2, SO2
from invlayer_core.manifolds.space import SE3, SO3

__all__ = ["SE2", "SE3", "SO2", "SO3", "Euclidean", "LieGroup", "Manifold"]
