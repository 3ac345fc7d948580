"""The rules by which derivatives cross the solve."""

from invlayer_core.adjoints.implicit import Adjoint, Implicit

__all__ = ["Adjoint", "Implicit"]
