"""The problem kinds as functions: each builds its conditions and hands them to the spine."""

from invlayer_core.functional.batch_jacobian import batch_jacobian
from invlayer_core.functional.check_jacobian import check_jacobian
from invlayer_core.functional.cone_program import cone_program
from invlayer_core.functional.equations import fixed_point, root
from invlayer_core.functional.implicit_function import implicit_function
from invlayer_core.functional.inverse import inverse, inverse_conditions
from invlayer_core.functional.optimisation import least_squares, minimize
from invlayer_core.functional.program import nlp
from invlayer_core.functional.quadratic import qp

__all__ = [
    "batch_jacobian",
    "check_jacobian",
    "cone_program",
    "fixed_point",
    "implicit_function",
    "inverse",
    "inverse_conditions",
    "least_squares",
    "minimize",
    "nlp",
    "qp",
    "root",
]
