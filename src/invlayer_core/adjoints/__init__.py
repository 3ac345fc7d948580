"""The rules by which derivatives cross the solve."""

from invlayer_core.adjoints.adjoint import Adjoint
from invlayer_core.adjoints.implicit import Implicit

__all__ = ["Adjoint", "Implicit"]
