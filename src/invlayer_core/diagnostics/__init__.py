"""Diagnosis of a layer whose gradient looks wrong: :func:`check_layer` measures, and names the limit."""

from invlayer_core.diagnostics.check import check_layer
from invlayer_core.diagnostics.report import CheckRow, DifferenceCurve, LayerReport

__all__ = ["CheckRow", "DifferenceCurve", "LayerReport", "check_layer"]
