"""Convex cones: the projection onto each dual cone, and its derivative, to every order."""

from invlayer_core.conditions.cones.product import Cones
from invlayer_core.conditions.cones.structure import ConeStructure

__all__ = ["ConeStructure", "Cones"]
