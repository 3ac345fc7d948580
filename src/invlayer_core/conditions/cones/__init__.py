"""Convex cones: the projection onto each dual cone, and its derivative, to every order."""

from invlayer_core.conditions.cones.product import Cones

__all__ = ["Cones"]
