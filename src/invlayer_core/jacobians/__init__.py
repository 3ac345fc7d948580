"""First derivatives of the conditions: per-sample blocks, sparse values, pullback and pushforward."""

from invlayer_core.conditions.system import SparseJacobian
from invlayer_core.jacobians.detection import detect_sparsity
from invlayer_core.jacobians.pattern import SparsityPattern

__all__ = ["SparseJacobian", "SparsityPattern", "detect_sparsity"]
