"""The one-way order of imports: a module imports only what stands left of it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {file.parent.name for file in ROOT.glob("autocompress/*/__init__.py")}

# From left to right, whatever room a module is in. Modules of one tier do not import each other.
ENGINE = (
    ("arguments",),
    (
        "plugins",
        "operating_point",
        "scores",
        "weights",
        "devices",
        "parity",
        "gpu",
        "cpu_energy",
        "progress",
        "memory",
        "onnx_integers",
        "task_options",
        "model_check",
        "change",
    ),
    (
        "testing_models",
        "files",
        "comparison",
        "layers",
        "interrupt",
        "metrics",
        "drawing",
        "latency",
        "splits",
        "notation",
    ),
    ("split_check",),
    ("task", "onnx_export", "executorch_export"),
    ("deployed", "macs", "runtimes"),
    (
        "measurement",
        "constraint",
        "decision_threshold",
        "per_class",
        "cka",
        "transforms",
        "environment",
        "system_metrics",
    ),
    ("scheme", "goal", "training", "images", "samples"),
    ("fingerprints", "sweep_grid", "models", "certify", "limit", "array_readers", "file_readers", "parcel"),
    ("ranks",),
    ("learner",),
    ("shrunk",),
    ("polish", "state"),
    ("lc",),
    ("recovery",),
    ("data", "bundle", "dense", "own_model", "readers", "dimensions", "traded"),
    ("own_task", "instructions"),
    ("export",),
    ("trial", "posterior", "space"),
    ("storage", "sampler", "mlflow_store"),
    ("mlflow_runs", "workers", "cluster", "arms", "optuna_store", "database"),
    ("selection", "samplers", "aside"),
    ("search", "tracking", "ui"),
    ("settings", "sweep_settings", "result", "record", "sweep_result", "mend"),
    ("watcher", "answer"),
    ("figures", "words", "analysis", "prospect", "workplace"),
    ("report", "doctor", "show"),
    ("records",),
    ("ahead",),
    ("conclusion",),
    ("study", "display", "replay", "sweep_files", "profile"),
    ("tuning", "sweeping"),
    ("options", "testing_tools"),
    ("shared_options", "second_process"),
    ("resuming", "profile_command"),
    ("sweep_command",),
    ("commands",),
    ("cli", "testing", "__init__"),  # what others call; nothing else imports it
    ("__main__",),
)
# All that a plugin may import of the engine, ours as a third party's; siblings come relatively.
PLUGINS = {"schemes": {"scheme", "splits", "task"}, "objectives": {"goal", "measurement"}}


def autocompress_imports(source: str, package: str) -> Iterator[str]:
    """Dotted names below ``autocompress`` that a module imports, wherever in it the import stands.

    Args:
        source: The module's code.
        package: The package it belongs to, which relative imports start from.
    """
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) - node.level + 1] if node.level else []
            origin = ".".join([*base, *filter(None, [node.module])])
            # `from autocompress import lc` is an import of autocompress.lc, and so it is with a room
            is_package = origin == "autocompress" or origin.removeprefix("autocompress.") in ROOMS
            names = [f"{origin}.{alias.name}" for alias in node.names] if is_package else [origin]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            names = [str(node.args[0].value)] if called in ("import_module", "__import__") else []
        for name in names:
            if name == "autocompress":
                yield "autocompress.__init__"
            elif name.startswith("autocompress."):
                yield name


def engine_violations(module: str, source: str, tiers: tuple[tuple[str, ...], ...] = ENGINE) -> list[str]:
    """What a module of ``autocompress/`` imports against the order, one sentence each.

    Args:
        module: Its name, after that of its room where it is in one.
        source: Its code.
        tiers: The order.
    """
    place = {name: i for i, tier in enumerate(tiers) for name in tier}
    *room, own = module.split(".")
    if own not in place:
        return [f"{own} has no place in the order of tests/test_layers.py; give it one"]
    violations = []
    for name in autocompress_imports(source, ".".join(["autocompress", *room])):
        imported = next((part for part in name.split(".")[1:] if part in place), "")
        if place.get(imported, len(tiers)) >= place[own]:
            violations.append(f"{own} imports {name}, which does not stand left of it")
    return violations


def plugin_violations(package: str, module: str, source: str) -> list[str]:
    """What a module of ``schemes/`` or ``objectives/`` imports of autocompress but may not."""
    home = f"autocompress.{package}"
    return [
        f"{package}/{module} imports {name}"
        for name in autocompress_imports(source, home)
        if name.split(".")[1] not in PLUGINS[package] and not f"{name}.".startswith(f"{home}.")
    ]


def sources(folder: str) -> dict[str, str]:
    files = (ROOT / folder).rglob("*.py")
    return {".".join(file.relative_to(ROOT / folder).with_suffix("").parts): file.read_text() for file in files}


MODULES = {
    name: source for name, source in sources("autocompress").items() if name.removesuffix(".__init__") not in ROOMS
}


@pytest.mark.parametrize("module", MODULES)
def test_the_engine_imports_only_to_the_left(module: str) -> None:
    assert engine_violations(module, MODULES[module]) == []


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_a_room_says_what_is_in_it_and_nothing_else(room: str) -> None:
    (said,) = ast.parse((ROOT / "autocompress" / room / "__init__.py").read_text()).body
    assert isinstance(said, ast.Expr) and isinstance(said.value, ast.Constant)


@pytest.mark.parametrize("package", PLUGINS)
def test_plugins_import_only_their_protocol(package: str) -> None:
    for module, source in sources(package).items():
        assert plugin_violations(package, module, source) == []


def test_the_order_names_each_module_once_and_no_other() -> None:
    named = [name for tier in ENGINE for name in tier]
    assert sorted(named) == sorted(name.rpartition(".")[2] for name in MODULES)
    assert not ROOMS & set(named)


class TestTheCheckItself:
    """A check that never fails would prove nothing."""

    tiers = (("low", "side"), ("middle",), ("high", "__init__"))

    @pytest.mark.parametrize(
        "line",
        [
            "import autocompress.low",
            "from autocompress import low",
            "from autocompress.low import thing",
            "from autocompress.low.inner import thing",
            "from . import low",
            "from .low import thing",
            "from autocompress.disk import low",
            "from autocompress.disk.low import thing",
            "import torch, json",
            "import autocompress_extras",
            "from autocompress_extras import high",
            "from torch import high",
        ],
    )
    def test_imports_to_the_left_and_from_elsewhere_are_allowed(self, line: str) -> None:
        assert engine_violations("middle", line, self.tiers) == []

    @pytest.mark.parametrize(
        "line",
        [
            "import autocompress.high",
            "import torch, autocompress.high as h",
            "from autocompress import low, high",
            "from autocompress.high import thing",
            "from . import high",
            "from .high import thing",
            "from autocompress.disk import low, high",
            "from autocompress.disk.high import thing",
            "def function():\n    from autocompress.high import thing",
            "if TYPE_CHECKING:\n    from autocompress.high import Thing",
            "try:\n    import autocompress.high\nexcept ImportError:\n    pass",
            "importlib.import_module('autocompress.high')",
            "import_module('autocompress.high')",
        ],
    )
    def test_imports_to_the_right_are_found(self, line: str) -> None:
        (found,) = engine_violations("middle", line, self.tiers)
        assert re.match(r"middle imports autocompress\.(disk\.)?high", found)

    def test_relative_imports_start_from_the_room(self) -> None:
        assert engine_violations("disk.middle", "from .low import thing\nfrom .. import low", self.tiers) == []
        both = "from .high import thing\nfrom . import high"
        assert len(engine_violations("disk.middle", both, self.tiers)) == 2

    @pytest.mark.parametrize(
        "line",
        [
            "import autocompress",  # all of it, by way of its lazy names
            "from autocompress import tune",
            "import autocompress.unheard_of",
            "from autocompress.schemes import Prune",
            "def function():\n    import autocompress.objectives",
            "from .schemes.prune import Prune",
        ],
    )
    def test_the_facade_the_plugins_and_the_unknown_are_out_of_reach(self, line: str) -> None:
        assert len(engine_violations("high", line, self.tiers)) == 1

    def test_a_neighbour_in_the_same_tier_is_out_of_reach(self) -> None:
        assert len(engine_violations("low", "from autocompress import side", self.tiers)) == 1

    def test_a_module_without_a_place_is_found(self) -> None:
        (found,) = engine_violations("new", "import json", self.tiers)
        assert "new has no place" in found

    @pytest.mark.parametrize(
        ("line", "count"),
        [
            ("from autocompress.scheme import Theta", 0),
            ("from autocompress.task import device_of", 0),
            ("from .groups import Group", 0),
            ("from . import groups", 0),
            ("from autocompress.lc import LearningCompression", 1),
            ("from autocompress import lc", 1),
            ("from autocompress.disk import storage", 1),
            ("from .. import lc", 1),
            ("from ..lc import LearningCompression", 1),
            ("def function():\n    from autocompress.objectives import size", 1),
            ("import autocompress", 1),
        ],
    )
    def test_plugins_are_checked(self, line: str, count: int) -> None:
        assert len(plugin_violations("schemes", "mine", line)) == count
