"""Layers can be copied, pickled, sent to other processes and trained by several; the numbers stay."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.memory.workers import Conditions, compute, data, model, train_a_share, value_and_gradients
from torch import Tensor, multiprocessing

import invlayer_core as inv

ROOT = str(Path(__file__).parents[2])
PATIENCE = 120  # seconds

SOLVERS = pytest.mark.parametrize(
    "solver", ["torch.newton", pytest.param("scipy.fsolve", marks=pytest.mark.plugin("invlayer-scipy"))]
)


def pickled(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


def saved(thing: Any) -> Any:
    """Through ``torch.save`` and ``torch.load``."""
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@SOLVERS
@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, pickled, saved])
def test_a_copy_gives_the_same_numbers(duplicate: Callable[[Any], Any], solver: str) -> None:
    original = model(solver)
    expected = value_and_gradients(original, data())
    assert_same(value_and_gradients(duplicate(original), data()), expected)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved])
def test_a_copy_has_parameters_of_its_own(duplicate: Callable[[Any], Any]) -> None:
    """Gradients go to the copy's parameters, also to those that the conditions capture, and nowhere else."""
    original = model()
    twin = duplicate(original)
    twin(data()).sum().backward()
    assert all(parameter.grad is not None for parameter in twin.parameters())
    assert all(parameter.grad is None for parameter in original.parameters())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
@pytest.mark.parametrize(
    "setting",
    [
        inv.adjoints.Implicit("lstsq", damping=0.5),
        inv.adjoints.Implicit(linear_solver=inv.linear.GMRES()),
        inv.get_solver("torch.newton"),
        inv.SolverSpec(name="a.b", factory="c:D", kinds=("root",)),
    ],
    ids=lambda setting: type(setting).__name__,
)
def test_settings_survive(duplicate: Callable[[Any], Any], setting: Any) -> None:
    twin = duplicate(setting)
    assert type(twin) is type(setting)
    assert vars(twin) == vars(setting)


def test_output_is_copied_and_pickled_as_any_tensor() -> None:
    """A detached output goes anywhere; one with a graph is refused by torch, and not silently cut."""
    y = model()(data())
    assert torch.equal(pickled(y.detach()), y)
    with pytest.raises(RuntimeError, match="Only Tensors created explicitly by the user"):
        copy.deepcopy(y)


def test_info_survives() -> None:
    f, x = Conditions(), data()
    _, info = inv.root(f, x, x, return_info=True)
    twin = pickled(info)
    assert twin.status == info.status
    assert torch.equal(twin.residual, info.residual)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A queue to spawned processes, which find the modules of the tests."""
    monkeypatch.syspath_prepend(ROOT)
    return multiprocessing.get_context("spawn").SimpleQueue()


def run_all(function: Callable[..., None], arguments: list[tuple[Any, ...]]) -> None:
    """One spawned process for each set of arguments; all must end well."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=function, args=args, daemon=True) for args in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
    assert [process.exitcode for process in processes] == [0] * len(processes)


def test_a_spawned_process_gives_the_same_numbers(answers: Any) -> None:
    """The layer is sent by pickle; value and gradients come back."""
    layer = model()
    run_all(compute, [(layer, answers)])
    theirs = [torch.tensor(numbers, dtype=torch.float64) for numbers in answers.get()]
    assert_same(theirs, value_and_gradients(layer, data()))


def test_two_processes_train_as_one(answers: Any, tmp_path: Path) -> None:
    """DistributedDataParallel over gloo: both get the gradient of the mean over all samples.

    The two means are taken in another order, hence the rounding.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    world = 2
    run_all(train_a_share, [(rank, world, str(tmp_path / "meeting"), answers) for rank in range(world)])
    _, *expected = value_and_gradients(model(), data())
    for _ in range(world):
        _, gradients = answers.get()
        for ours, theirs in zip(gradients, expected, strict=True):
            ours = torch.tensor(ours, dtype=torch.float64)
            torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-15)
