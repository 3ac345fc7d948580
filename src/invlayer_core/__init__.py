"""invlayer: any solver's output as a differentiable torch tensor.

The solver stays as it is; you write in torch what its output satisfies, and get exact gradients.
"""

from invlayer_core import adjoints, constraints, jacobians, linear, losses, manifolds, testing
from invlayer_core.certificate import SolveInfo
from invlayer_core.conditions.cone import ConeSolution
from invlayer_core.conditions.cones import Cones, ConeStructure
from invlayer_core.conditions.kkt import Multipliers
from invlayer_core.constraints import ConstraintInfo
from invlayer_core.diagnostics import LayerReport, check_layer
from invlayer_core.errors import (
    ConditionsError,
    ConvergenceError,
    ConvergenceWarning,
    DegeneracyWarning,
    InvlayerError,
    PerformanceWarning,
    SingularJacobianError,
    SolverConflictError,
    SolverLoadError,
    SolverNotFoundError,
    UnsupportedTransformError,
)
from invlayer_core.foreign import ForeignFunction, in_transform
from invlayer_core.functional import (
    batch_jacobian,
    check_jacobian,
    cone_program,
    fixed_point,
    implicit_function,
    inverse,
    least_squares,
    minimize,
    nlp,
    qp,
    root,
)
from invlayer_core.inputs import from_numpy
from invlayer_core.layers import (
    FixedPointLayer,
    InverseLayer,
    LeastSquaresLayer,
    MinimizeLayer,
    NLPLayer,
    QPLayer,
    RootLayer,
)
from invlayer_core.solvers.cone import CSC, ConeProblem
from invlayer_core.solvers.contract import (
    BatchProblem,
    Problem,
    SampleProblem,
    Solver,
    SolverResult,
    Status,
)
from invlayer_core.solvers.hookspecs import hookimpl
from invlayer_core.solvers.iterations import DifferentiableSolver
from invlayer_core.solvers.linear_spec import LinearSolverSpec
from invlayer_core.solvers.listing import SolverListing
from invlayer_core.solvers.lookup import (
    get_solver,
    linear_solvers,
    register_linear_solver,
    register_solver,
    solvers,
)
from invlayer_core.solvers.quadratic import BatchQuadraticProblem, CoordinateMatrix, QuadraticProblem
from invlayer_core.solvers.spec import SolverSpec
from invlayer_core.starts import starts_between

__all__ = [
    "CSC",
    "BatchProblem",
    "BatchQuadraticProblem",
    "ConditionsError",
    "ConeProblem",
    "ConeSolution",
    "ConeStructure",
    "Cones",
    "ConstraintInfo",
    "ConvergenceError",
    "ConvergenceWarning",
    "CoordinateMatrix",
    "DegeneracyWarning",
    "DifferentiableSolver",
    "FixedPointLayer",
    "ForeignFunction",
    "InverseLayer",
    "InvlayerError",
    "LayerReport",
    "LeastSquaresLayer",
    "LinearSolverSpec",
    "MinimizeLayer",
    "Multipliers",
    "NLPLayer",
    "PerformanceWarning",
    "Problem",
    "QPLayer",
    "QuadraticProblem",
    "RootLayer",
    "SampleProblem",
    "SingularJacobianError",
    "SolveInfo",
    "Solver",
    "SolverConflictError",
    "SolverListing",
    "SolverLoadError",
    "SolverNotFoundError",
    "SolverResult",
    "SolverSpec",
    "Status",
    "UnsupportedTransformError",
    "adjoints",
    "batch_jacobian",
    "check_jacobian",
    "check_layer",
    "cone_program",
    "constraints",
    "fixed_point",
    "from_numpy",
    "get_solver",
    "hookimpl",
    "implicit_function",
    "in_transform",
    "inverse",
    "jacobians",
    "least_squares",
    "linear",
    "linear_solvers",
    "losses",
    "manifolds",
    "minimize",
    "nlp",
    "qp",
    "register_linear_solver",
    "register_solver",
    "root",
    "solvers",
    "starts_between",
    "testing",
]

__version__ = "0.1.0"
