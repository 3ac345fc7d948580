"""The rules of the conformance kit, in the order in which they are applied."""

from typing import Final

from invlayer_core.testing.rules.batch import batch_is_its_samples, permutation, shapes
from invlayer_core.testing.rules.contract import result_fields, unknown_option
from invlayer_core.testing.rules.failures import exceptions, nan_args, no_root
from invlayer_core.testing.rules.gradients import gradients
from invlayer_core.testing.rules.loading import batched_flag, loading
from invlayer_core.testing.rules.purity import global_state, no_mutation, pickling, repeatable
from invlayer_core.testing.rules.registration import registration
from invlayer_core.testing.rules.rule import Rule
from invlayer_core.testing.rules.threads import thread_safety
from invlayer_core.testing.rules.values import claims, dtype, values

__all__ = ["RULES"]

RULES: Final[tuple[Rule, ...]] = (
    loading,
    batched_flag,
    result_fields,
    unknown_option,
    values,
    claims,
    dtype,
    gradients,
    batch_is_its_samples,
    permutation,
    shapes,
    exceptions,
    no_root,
    nan_args,
    no_mutation,
    repeatable,
    global_state,
    pickling,
    thread_safety,
    registration,
)
