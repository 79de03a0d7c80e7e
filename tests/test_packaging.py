"""What is declared, what is installed, what loads when, and what the documents promise."""

import ast
import inspect
import json
import re
import resource
import shlex
import statistics
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from click.testing import CliRunner

import autocompress
from autocompress import objectives, schemes
from autocompress.cli import cli
from autocompress.goal import OBJECTIVES
from autocompress.scheme import SCHEMES

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, SETUPTOOLS = PYPROJECT["project"], PYPROJECT["tool"]["setuptools"]
HOMES = ("autocompress", "schemes", "objectives")
TOOLS = {"ruff", "mypy", "build"}  # of the test extra: run by .ci/run, imported by nobody
FOUND_BY_OTHERS = {"greenlet"}  # by Optuna, where it is installed
PLUGINS = {"pytest-xdist"}  # at work where they are installed

README_RUN = (
    "python3 -m venv .venv && .venv/bin/pip install -e . && "
    ".venv/bin/autocompress tune --scheme StructPrune --max-drop 1%"
)
README_TEST = "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/pytest"


def normalized(distribution: str) -> str:
    """A requirement's or distribution's name as the package index compares it."""
    name = re.match(r"[A-Za-z0-9._-]+", distribution)
    assert name
    return re.sub(r"[-_.]+", "-", name[0]).lower()


def third_party_imports(*folders: str) -> set[str]:
    """Top-level modules that the code imports, without the standard library and our own."""
    found = set()
    for file in (file for folder in folders for file in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    own = {file.stem for home in ("tests", "examples") for file in (ROOT / home).rglob("*.py")}
    return found - sys.stdlib_module_names - own - {"autocompress"}


installed = cache(packages_distributions)  # reads the records of everything that is installed


def distributions_of(module: str) -> set[str]:
    """The distributions that bring a module, as they are installed here; several share ``mlflow``."""
    return {normalized(name) for name in installed().get(module, ())}


def undeclared(modules: set[str], declared: set[str]) -> list[str]:
    """The modules that no declared distribution brings."""
    return sorted(module for module in modules if not distributions_of(module) & declared)


def unused(declared: set[str], modules: set[str]) -> list[str]:
    """The declared distributions that bring none of the modules."""
    return sorted(declared - {name for module in modules for name in distributions_of(module)})


def of_extras() -> set[str]:
    """What the extras for users bring, which need not be installed here: named as they are imported."""
    extras = PROJECT["optional-dependencies"].items()
    return {normalized(one) for name, requirements in extras if name != "test" for one in requirements}


class TestPyproject:
    def test_every_folder_of_code_is_a_declared_package(self) -> None:
        folders = {file.parent.relative_to(ROOT) for home in HOMES for file in (ROOT / home).rglob("__init__.py")}
        dotted = {".".join(folder.parts) for folder in folders}
        expected = {name if name.startswith("autocompress") else f"autocompress.{name}" for name in dotted}
        assert set(SETUPTOOLS["packages"]) == expected

    def test_every_module_is_in_a_package(self) -> None:
        for home in HOMES:
            for file in (ROOT / home).rglob("*.py"):
                assert (file.parent / "__init__.py").is_file(), f"{file} would be missing from the wheel"

    def test_package_dir_maps_the_plugins_into_the_package(self) -> None:
        assert SETUPTOOLS["package-dir"] == {
            "autocompress.schemes": "schemes",
            "autocompress.objectives": "objectives",
        }
        assert Path(schemes.__path__[0]) == ROOT / "schemes"

    def test_the_package_is_typed(self) -> None:
        assert "py.typed" in SETUPTOOLS["package-data"]["autocompress"]
        assert (ROOT / "autocompress" / "py.typed").is_file()

    def test_every_other_file_is_declared(self) -> None:
        declared = SETUPTOOLS["package-data"]["autocompress"]
        others = [file for file in (ROOT / "autocompress").rglob("*") if file.is_file() and file.suffix != ".py"]
        for file in (file for file in others if "__pycache__" not in file.parts):
            assert any(file.match(pattern) for pattern in declared), f"{file} would be missing from the wheel"

    def test_dependencies_are_what_the_code_imports(self) -> None:
        declared = {normalized(requirement) for requirement in PROJECT["dependencies"]}
        imported = third_party_imports(*HOMES) - of_extras()
        assert undeclared(imported, declared) == []
        assert unused(declared - FOUND_BY_OTHERS, imported) == []

    def test_the_test_extra_is_what_the_tests_import_and_ci_runs(self) -> None:
        declared = {normalized(requirement) for requirement in PROJECT["dependencies"]}
        extra = {normalized(requirement) for requirement in PROJECT["optional-dependencies"]["test"]}
        imported = third_party_imports("tests", "examples") - of_extras()
        assert undeclared(imported, declared | extra) == []
        assert unused(extra - TOOLS - PLUGINS, imported) == []
        ci = (ROOT / ".ci" / "run").read_text()
        for tool in TOOLS:
            assert re.search(rf"\.venv/bin/(python -m )?{tool}\b", ci), f".ci/run does not run {tool}"

    def test_what_is_undeclared_or_unused_is_found(self) -> None:
        assert undeclared({"numpy", "sklearn", "unheard_of"}, {"numpy"}) == ["sklearn", "unheard_of"]
        assert unused({"numpy", "scikit-learn", "nvidia-ml-py"}, {"numpy", "pynvml"}) == ["scikit-learn"]

    def test_the_changelog_knows_the_version(self) -> None:
        assert f"\n## [{PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text()


# Prints the CPU seconds that the import took and the modules from elsewhere that it loaded.
TIMED_IMPORT = """
import json, sys, time
before = set(sys.modules)
began = time.process_time()
import autocompress
seconds = time.process_time() - began
loaded = {name.split(".")[0] for name in set(sys.modules) - before}
print(json.dumps([seconds, sorted(loaded - sys.stdlib_module_names - {"autocompress"})]))
"""
LOADED_BY_HELP = """
import json, sys
before = set(sys.modules)
from autocompress.cli import cli
cli(["--help"], standalone_mode=False)
loaded = {name.split(".")[0] for name in set(sys.modules) - before}
print(json.dumps(sorted(loaded - sys.stdlib_module_names - {"autocompress"})))
"""


def run(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=120).stdout


def command() -> str:
    return str(Path(sysconfig.get_path("scripts")) / "autocompress")


class TestWhatLoadsWhen:
    def test_the_import_is_light(self) -> None:
        runs = [json.loads(run(sys.executable, "-c", TIMED_IMPORT)) for _ in range(5)]
        assert [loaded for _, loaded in runs] == [[]] * 5
        assert statistics.median(seconds for seconds, _ in runs) <= 0.3

    def test_help_loads_nothing_but_click(self) -> None:
        assert json.loads(run(sys.executable, "-c", LOADED_BY_HELP).splitlines()[-1]) == ["click"]

    def test_help_is_quick(self) -> None:
        def cpu_seconds() -> float:
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            run(command(), "--help")
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

        assert min(cpu_seconds() for _ in range(3)) <= 0.5

    def test_every_public_name_is_there(self) -> None:
        assert set(autocompress.__all__) == {name for names in autocompress._HOMES.values() for name in names}
        for name in autocompress.__all__:
            assert getattr(autocompress, name) is not None
        with pytest.raises(AttributeError, match="no attribute 'compress'"):
            autocompress.compress  # noqa: B018  # looking it up is the test


def listed(command: str) -> dict[str, str]:
    """What a listing says, by name: the line that begins with it and the indented ones that follow."""
    output = CliRunner().invoke(cli, [command]).output  # tests/test_cli.py has it in a process of its own
    items = re.findall(r"^(\S+)(.*(?:\n[ \t].*)*)", output, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in items}


class TestListings:
    def test_schemes_come_with_what_they_do_and_take(self) -> None:
        items = listed("schemes")
        assert set(schemes.__all__) <= set(items)
        for name in schemes.__all__:
            make = SCHEMES.get(name)
            doc = inspect.getdoc(make)
            assert doc and doc.splitlines()[0] in items[name]
            for parameter in inspect.signature(make).parameters:
                assert parameter in items[name]

    def test_objectives_come_with_what_they_are(self) -> None:
        items = listed("objectives")
        assert set(objectives.__all__) <= set(items)
        for name in objectives.__all__:
            objective = OBJECTIVES.get(name)
            assert objective.description and objective.description in items[name]
            assert objective.direction in items[name] and objective.unit in items[name]


def fenced_lines(document: str) -> Iterator[str]:
    """The lines of a document's code blocks, prompts left out."""
    inside = False
    for line in (ROOT / document).read_text().splitlines():
        if line.lstrip().startswith("```"):
            inside = not inside
        elif inside:
            yield line.strip().removeprefix("$ ")


def commands_in(document: str) -> list[list[str]]:
    """Every call of ``autocompress`` that a document tells the reader to type."""
    typed = [line for line in fenced_lines(document) if re.match(r"(python3 -m venv |(\S*/)?autocompress )", line)]
    calls = [part for line in typed for part in shlex.split(line, comments=True, posix=True)]
    found: list[list[str]] = []
    for word in calls:
        if Path(word).name == "autocompress":
            found.append([])
        elif word in ("&&", "|", ">", "python3"):
            found.append(["(something else)"])
        elif found and found[-1] != ["(something else)"]:
            found[-1].append(word)
    return [call for call in found if call != ["(something else)"]]


class TestDocuments:
    @pytest.mark.parametrize("line", [README_RUN, README_TEST])
    def test_the_readme_has_the_two_commands(self, line: str) -> None:
        assert line in list(fenced_lines("README.md"))

    @pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
    def test_what_the_reader_is_told_to_type_exists(self, document: str) -> None:
        calls = commands_in(document)
        assert calls
        for call in calls:
            if call[0] in ("--help", "--version"):
                continue
            parameters = cli.commands[call[0]].params
            options = {"-h", "--help"} | {flag for parameter in parameters for flag in parameter.opts}
            for word in call[1:]:
                assert not word.startswith("-") or word.split("=")[0] in options, f"{document}: {' '.join(call)}"

    def test_no_file_names_a_folder_of_the_machine_it_was_written_on(self) -> None:
        if not (ROOT / ".git").exists():
            pytest.skip("not a git checkout")
        git = ("git", "-c", "safe.directory=*", "-C", str(ROOT))  # whoever owns the clone
        names = run(*git, "ls-files", "-z")
        for name in filter(None, names.split("\0")):
            if not (ROOT / name).is_file():  # deleted, not yet committed
                continue
            text = (ROOT / name).read_bytes()
            for folder in (b"work", b"root"):
                assert b"/" + folder + b"/" not in text, f"{name} names /{folder.decode()}/"
