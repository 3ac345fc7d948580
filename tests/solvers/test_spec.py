"""The frozen metadata of a solver, and the small language of its requirements."""

import dataclasses

import pytest

from invlayer_core.solvers import API_VERSION, SolverSpec
from invlayer_core.solvers.requirements import parse_requirements, unmet_requirement

FIELDS = {"name": "acme.echo", "factory": "acme:Echo", "kinds": ("root",)}


def test_defaults_describe_a_per_sample_solver_of_this_contract() -> None:
    spec = SolverSpec(**FIELDS)
    assert (spec.batched, spec.thread_safe, spec.requires, spec.install) == (False, True, (), "")
    assert spec.api == API_VERSION


def test_spec_is_frozen_and_hashable() -> None:
    spec = SolverSpec(**FIELDS)
    assert {spec: 1}[SolverSpec(**FIELDS)] == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.name = "other.name"  # type: ignore[misc]


@pytest.mark.parametrize("name", ["echo", "Acme.echo", ".echo", "acme.", ""])
def test_name_is_library_dot_method(name: str) -> None:
    with pytest.raises(ValueError, match=r"'<library>\.<method>' in lower case"):
        SolverSpec(**{**FIELDS, "name": name})


@pytest.mark.parametrize("factory", ["acme", "acme:", ":Echo", ""])
def test_factory_is_module_colon_class(factory: str) -> None:
    with pytest.raises(ValueError, match=r"'package\.module:Class'"):
        SolverSpec(**{**FIELDS, "factory": factory})


@pytest.mark.parametrize("kinds", [(), ("roots",), ("root", "ode"), "root"])
def test_kinds_are_known(kinds: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"accepted are one or more of \['cone', 'fixed_point', .*'root'\]"):
        SolverSpec(**{**FIELDS, "kinds": kinds})


def test_a_spec_for_a_later_contract_can_be_made() -> None:
    assert SolverSpec(**FIELDS, api=API_VERSION + 1).api == API_VERSION + 1


@pytest.mark.parametrize(
    ("text", "clauses"),
    [
        ("scipy", ()),
        ("scipy>=1.11", ((">=", "1.11"),)),
        (" scipy >= 1.11 , != 1.12.0, < 2 ", ((">=", "1.11"), ("!=", "1.12.0"), ("<", "2"))),
        ("scipy[fast]>1.11rc1", ((">", "1.11rc1"),)),
        ("ruamel.yaml==1.0.post1", (("==", "1.0.post1"),)),
    ],
)
def test_requirements_are_read(text: str, clauses: tuple[tuple[str, str], ...]) -> None:
    assert parse_requirements([text])[0].clauses == clauses


@pytest.mark.parametrize(
    "text",
    ["", ">=1", "scipy>=", "scipy~=1.11", "scipy==1.*", "scipy>=1.11,", "scipy; python_version>'3'", "a b"],
)
def test_malformed_requirements_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not understood: write a distribution name"):
        parse_requirements([text])


def test_requires_must_not_be_one_string() -> None:
    with pytest.raises(TypeError, match=r"give a tuple of strings: \('scipy',\)"):
        parse_requirements("scipy")


@pytest.mark.parametrize(
    ("clause", "met"),
    [
        (">=1.9", True),
        (">=1.10", True),
        (">1.10", False),
        ("<=1.10.0", True),
        ("<1.11", True),
        ("<1.9", False),
        ("==1.10", True),
        ("==1.10.0", True),
        ("!=1.10.0", False),
        ("!=1.1", True),
        (">=1.10rc1", True),
        (">=1.9,<1.10", False),
    ],
)
@pytest.mark.parametrize("installed", ["1.10", "1.10+cpu"])
def test_versions_compare_as_versions(
    clause: str, met: bool, installed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: installed)
    expected = None if met else f"needs acme{clause}, found acme {installed}"
    assert unmet_requirement([f"acme{clause}"]) == expected


def test_a_release_candidate_comes_before_its_release(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.11rc1")
    assert unmet_requirement(["acme>=1.11"]) == "needs acme>=1.11, found acme 1.11rc1"


def test_the_first_unmet_requirement_is_named() -> None:
    assert unmet_requirement(["torch>=1", "no-such-thing", "nor-this"]) == (
        "needs no-such-thing, which is not installed"
    )
