"""Entry points: each kind of broken plugin is kept with its reason, and harms no other."""

import pytest

from invlayer_core.errors import SolverConflictError, SolverNotFoundError
from invlayer_core.solvers import API_VERSION, PluginFailure, Registry
from invlayer_core.solvers.discovery import installed_plugins

HOOK = "from invlayer_core.solvers import SolverSpec, hookimpl\n\n@hookimpl\ndef "

BROKEN = {
    "import error": (
        "import no_such_library",
        r"importing 'bad' raised ModuleNotFoundError: .*'no_such_library'",
    ),
    "exception at import": ("1 / 0", r"importing 'bad' raised ZeroDivisionError: division by zero"),
    "exit at import": ("import sys; sys.exit(3)", r"importing 'bad' raised SystemExit: 3"),
    "misspelt hook": (
        HOOK + "register_solvers():\n    return []",
        r"'bad' implements the unknown hook 'register_solvers'; did you mean 'register_solver'\?",
    ),
    "hook of another name": (
        HOOK + "teardown():\n    return []",
        r"unknown hook 'teardown'; the hooks are \['register_linear_solver', 'register_solver'\]",
    ),
    "forgotten mark": ("def register_solver():\n    return []", r"mark its function register_solver with @"),
    "extra argument": (
        HOOK + "register_solver(device):\n    return []",
        r"does not fit the hook of this invlayer: .*Argument\(s\) \{'device'\}",
    ),
    "later api": (
        HOOK + f"register_solver():\n    return SolverSpec('a.b', 'a:B', ('root',), api={API_VERSION + 1})",
        rf"solver 'a\.b' is built for api {API_VERSION + 1}, this invlayer speaks {API_VERSION}",
    ),
    "field of a later spec": (
        HOOK + "register_solver():\n    return SolverSpec('a.b', 'a:B', ('root',), warm=True)",
        r"its hook register_solver\(\) raised TypeError: .*'warm'",
    ),
    "returns garbage": (
        HOOK + "register_solver():\n    return 'a.b'",
        r"gave 'a\.b'; accepted are a SolverSpec",
    ),
    "returns garbage in a list": (
        HOOK + "register_solver():\n    return [SolverSpec('a.b', 'a:B', ('root',)), {}]",
        r"gave \{\}; accepted are a SolverSpec",
    ),
    "returns nothing": (HOOK + "register_solver():\n    pass", r"gave None; accepted are a SolverSpec"),
    "same name twice": (
        HOOK + "register_solver():\n    return [SolverSpec('a.b', 'a:B', ('root',))] * 2",
        r"gave \['a\.b'\] more than once",
    ),
    "malformed requirement": (
        HOOK + "register_solver():\n    return SolverSpec('a.b', 'a:B', ('root',), requires=('x~=1',))",
        r"requirement 'x~=1' is not understood",
    ),
}


def failure_of(registry: Registry, distribution: str) -> PluginFailure:
    (failure,) = [failure for failure in registry.failures if failure.plugin.distribution == distribution]
    return failure


@pytest.mark.parametrize(("code", "reason"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_plugin_fails_alone(distributions, load, code: str, reason: str) -> None:
    distributions.write("good-before", solver="acme.before")
    distributions.write("bad", code=code, version="0.3")
    distributions.write("good-later", solver="acme.later")
    # "bad" sorts before both: with pluggy's own loader neither of them would be there.
    registry = load()
    assert registry.get_spec("acme.before").kinds == ("root",)
    assert registry.get_spec("acme.later").kinds == ("root",)
    with pytest.raises(SolverNotFoundError, match=reason):
        registry.get_spec("a.b")
    (row,) = [row for row in registry.solvers() if row.plugin == "bad"]
    assert (row.name, row.version, row.status, row.kinds) == ("bad:main", "0.3", "failed", ())
    assert "\n" not in row.reason


def test_a_failure_keeps_the_exception_of_the_plugin(distributions, load) -> None:
    distributions.write("bad", code="{}['missing']")
    failure = failure_of(load(), "bad")
    assert isinstance(failure.exception, KeyError)
    assert failure.plugin.version == "1.0"


def test_a_failed_plugin_does_not_stay_registered_with_pluggy(distributions, load) -> None:
    distributions.write("bad", code=BROKEN["later api"][0])
    distributions.write("worse", code=BROKEN["extra argument"][0])
    distributions.write("good")
    names = {name for name, _ in load()._manager.list_name_plugin()}
    assert "good:main" in names
    assert not names & {"bad:main", "worse:main"}


def test_a_hook_marked_optional_may_be_unknown(distributions, load) -> None:
    distributions.write(
        "good",
        code=HOOK + "register_solver():\n    return SolverSpec('a.b', 'a:B', ('root',))\n\n"
        "@hookimpl(optionalhook=True)\ndef of_a_later_invlayer():\n    return 1",
    )
    assert load().get_spec("a.b").factory == "a:B"


def test_a_plugin_may_register_several_solvers(distributions, load) -> None:
    specs = "[SolverSpec(name, 'a:B', ('root',)) for name in ('a.b', 'a.c')]"
    distributions.write("good", code=HOOK + f"register_solver():\n    return {specs}")
    registry = load()
    assert {registry.get_spec(name).name for name in ("a.b", "a.c")} == {"a.b", "a.c"}


def test_a_hook_is_called_once_for_its_own_plugin(distributions, load) -> None:
    count = "calls = []\n" + HOOK + "register_solver():\n    calls.append(1)\n"
    distributions.write("one", code=count + "    return SolverSpec('a.one', 'a:B', ('root',))")
    distributions.write("two", code=count + "    return SolverSpec('a.two', 'a:B', ('root',))")
    load()
    import one
    import two

    assert (len(one.calls), len(two.calls)) == (1, 1)


@pytest.mark.parametrize("order", [("left", "right"), ("right", "left")])
def test_two_claimants_conflict_in_any_path_order(new_distributions, load, order: tuple[str, str]) -> None:
    directories = {name: new_distributions(name) for name in order}
    directories["left"].write("rival-a", solver="acme.echo", version="1.1")
    directories["right"].write("rival-b", solver="acme.echo", version="2.2")
    directories["right"].write("bystander", solver="acme.other")
    registry = load()
    with pytest.raises(
        SolverConflictError,
        match=r"claimed by 'rival-a' 1\.1 and 'rival-b' 2\.2\. .*"
        r"INVLAYER_DISABLE_PLUGINS=rival-a or INVLAYER_DISABLE_PLUGINS=rival-b",
    ):
        registry.get_solver("acme.echo")
    with pytest.raises(SolverConflictError, match=r"get_spec\('acme\.echo'\)"):
        registry.get_spec("acme.echo")
    assert type(registry.get_solver("acme.other")).__name__ == "Echo"
    rows = [row for row in registry.solvers() if row.name == "acme.echo"]
    assert [(row.plugin, row.status) for row in rows] == [("rival-a", "conflict"), ("rival-b", "conflict")]
    assert "also claimed by 'rival-b' 2.2" in rows[0].reason


@pytest.mark.parametrize("spelling", ["rival-b", "Rival_B", " x , RIVAL.b "])
def test_disabling_one_claimant_ends_the_conflict(
    distributions, load, monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    distributions.write("rival-a", solver="acme.echo")
    distributions.write("Rival.B", solver="acme.echo")
    monkeypatch.setenv("INVLAYER_DISABLE_PLUGINS", spelling)
    assert type(load().get_solver("acme.echo")).__module__ == "rival_a.adapter"


def test_a_disabled_plugin_is_not_imported(distributions, load, monkeypatch: pytest.MonkeyPatch) -> None:
    distributions.write("bad", code="1 / 0")
    monkeypatch.setenv("INVLAYER_DISABLE_PLUGINS", "bad")
    assert not [failure for failure in load().failures if failure.plugin.distribution == "bad"]


def test_autoload_off_loads_nothing(distributions, load, monkeypatch: pytest.MonkeyPatch) -> None:
    distributions.write("good")
    monkeypatch.setenv("INVLAYER_PLUGIN_AUTOLOAD", "0")
    assert load().solvers() == ()


def test_one_distribution_twice_on_the_path_is_one_plugin(new_distributions, load) -> None:
    for directory in ("first", "second"):
        new_distributions(directory).write("good", entries="main = good\nmain = good")
    rows = [row for row in load().solvers() if row.plugin == "good"]
    assert [(row.name, row.status) for row in rows] == [("acme.echo", "ok")]


def test_one_entry_point_name_in_two_distributions_is_two_plugins(distributions, load) -> None:
    distributions.write("first", solver="acme.first")
    distributions.write("second", solver="acme.second")
    registry = load()
    assert {registry.get_spec(f"acme.{name}").name for name in ("first", "second")} == {
        "acme.first",
        "acme.second",
    }


def test_two_entry_points_with_one_module_are_told_apart(distributions, load) -> None:
    distributions.write("good", entries="again = good\nmain = good")
    registry = load()
    assert registry.get_spec("acme.echo").name == "acme.echo"
    assert failure_of(registry, "good").plugin.entry == "main"
    assert "already registered as 'good:again'" in failure_of(registry, "good").reason


def test_metadata_without_a_name_is_no_obstacle(distributions) -> None:
    distributions.write("broken-metadata")
    (distributions.directory / "broken_metadata-1.0.dist-info" / "METADATA").unlink()
    assert "unknown" in {plugin.distribution for plugin, _ in installed_plugins()}


def test_plugins_come_sorted(new_distributions) -> None:
    for name in ("b-dist", "A.dist", "c_dist"):
        new_distributions(name).write(name)
    written = [plugin.distribution for plugin, _ in installed_plugins() if plugin.distribution[1:2] in "-._"]
    assert written == ["A.dist", "b-dist", "c_dist"]
