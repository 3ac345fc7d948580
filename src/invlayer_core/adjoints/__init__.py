"""The rules by which derivatives cross the solve."""

from invlayer_core.adjoints.adjoint import Adjoint, Solved
from invlayer_core.adjoints.dlm import DLM
from invlayer_core.adjoints.implicit import Implicit
from invlayer_core.adjoints.phantom import Phantom
from invlayer_core.adjoints.truncated import Truncated
from invlayer_core.adjoints.unrolled import Unrolled

__all__ = ["DLM", "Adjoint", "Implicit", "Phantom", "Solved", "Truncated", "Unrolled"]
