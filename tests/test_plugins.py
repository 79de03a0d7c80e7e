import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from autocompress import plugins
from autocompress.networks.own_model import load_factory
from autocompress.plugins import Registry, load_from_file, load_plugins
from autocompress.processes.parcel import pack


def one_line(caught: pytest.ExceptionInfo[ValueError]) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


class Thing:
    pass


class TestRegistry:
    def test_things_are_found_by_name_and_listed_in_order(self) -> None:
        registry: Registry[type] = Registry("thing")
        registry.add("b", Thing)
        registry.add("a", dict)
        assert registry.get("b") is Thing
        assert list(registry) == [("a", dict), ("b", Thing)]

    def test_a_redefinition_in_the_same_module_replaces(self) -> None:
        registry: Registry[type] = Registry("thing")
        registry.add("Thing", Thing)
        again = type("Thing", (), {"__module__": Thing.__module__})
        registry.add("Thing", again)
        assert registry.get("Thing") is again

    def test_another_modules_definition_is_refused(self) -> None:
        registry: Registry[type] = Registry("thing")
        registry.add("Thing", Thing)
        with pytest.raises(ValueError, match=r"'Thing' is already registered, by .*test_plugins"):
            registry.add("Thing", type("Thing", (), {"__module__": "elsewhere"}))
        assert registry.get("Thing") is Thing

    def test_an_item_made_from_a_definition_belongs_to_its_module(self) -> None:
        registry: Registry[int] = Registry("number")
        registry.add("one", 1, definition=Thing)
        registry.add("one", 2, definition=one_line)
        assert registry.get("one") == 2
        with pytest.raises(ValueError, match="already registered"):
            registry.add("one", 3, definition=Registry)

    @pytest.mark.parametrize(
        ("asked", "message"),
        [
            ("prune", r"unknown thing 'prune'; did you mean Prune or StructPrune\? \(available: Prune, "),
            ("Strctprune", "did you mean StructPrune or Prune"),
            ("xyz", r"unknown thing 'xyz' \(available: Prune, StructPrune\)"),
            ("", "unknown thing ''"),
        ],
    )
    def test_an_unknown_name_gets_suggestions(self, asked: str, message: str) -> None:
        registry: Registry[type] = Registry("thing")
        registry.add("Prune", Thing)
        registry.add("StructPrune", Thing)
        with pytest.raises(ValueError, match=message) as caught:
            registry.get(asked)
        one_line(caught)

    def test_an_empty_registry_says_so(self) -> None:
        with pytest.raises(ValueError, match="available: none"):
            Registry[type]("thing").get("a")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A directory of installed distributions, as pip leaves them; plugins are looked for afresh."""
    monkeypatch.syspath_prepend(tmp_path)
    load_plugins.cache_clear()

    def install(module: str, source: str) -> None:
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{plugins.ENTRY_POINT_GROUP}]\n{module} = {module}\n")

    yield install
    load_plugins.cache_clear()
    for file in tmp_path.glob("*.py"):
        sys.modules.pop(file.stem, None)


def messages_of_loading() -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_plugins()
    return [str(w.message) for w in caught]


class TestPlugins:
    def test_an_installed_plugin_is_imported_once(self, site) -> None:
        site("aaa_plugin", "import sys\nsys.aaa_plugin_runs = getattr(sys, 'aaa_plugin_runs', 0) + 1\n")
        try:
            load_plugins()
            load_plugins()
            assert sys.aaa_plugin_runs == 1  # type: ignore[attr-defined]
        finally:
            del sys.aaa_plugin_runs  # type: ignore[attr-defined]

    def test_a_broken_plugin_costs_only_itself(self, site) -> None:
        site("aaa_broken", "import no_such_module_at_all\n")
        site("zzz_sound", "loaded = True\n")
        about = [m for m in messages_of_loading() if "aaa_broken" in m]
        assert len(about) == 1
        assert "was not loaded: ModuleNotFoundError: No module named 'no_such_module_at_all'" in about[0]
        assert sys.modules["zzz_sound"].loaded

    def test_a_plugin_may_look_things_up_while_it_is_imported(self, site) -> None:
        site(
            "aaa_curious",
            "from autocompress.goal import OBJECTIVES\nfound = OBJECTIVES.get('density').name\n",
        )
        assert [m for m in messages_of_loading() if "aaa_curious" in m] == []
        assert sys.modules["aaa_curious"].found == "density"

    def test_third_parties_come_through_the_same_door(self, site, monkeypatch: pytest.MonkeyPatch) -> None:
        from autocompress.goal import OBJECTIVES

        monkeypatch.setattr(OBJECTIVES, "_items", dict(OBJECTIVES._items))
        monkeypatch.setattr(OBJECTIVES, "_modules", dict(OBJECTIVES._modules))
        site(
            "aaa_objective",
            "from autocompress.goal import objective\n"
            "@objective(unit='EUR')\n"
            "def price(measurement):\n"
            "    return 1e-9 * measurement.macs\n",
        )
        assert OBJECTIVES.get("price").unit == "EUR"


class TestLoadFromFile:
    def test_the_named_object(self, tmp_path: Path) -> None:
        (tmp_path / "mine.py").write_text("answer = 42\n")
        assert load_from_file(f"{tmp_path}/mine.py:answer") == 42

    def test_an_edited_file_is_run_again(self, tmp_path: Path) -> None:
        file = tmp_path / "mine.py"
        file.write_text("answer = 42\n")
        load_from_file(f"{file}:answer")
        file.write_text("answer = 'another one'\n")
        assert load_from_file(f"{file}:answer") == "another one"

    def test_a_file_may_define_dataclasses_with_postponed_annotations(self, tmp_path: Path) -> None:
        (tmp_path / "my-file.v2.py").write_text(
            "from __future__ import annotations\n"
            "from dataclasses import dataclass\n"
            "@dataclass\n"
            "class Point:\n"
            "    x: int\n"
        )
        assert load_from_file(f"{tmp_path}/my-file.v2.py:Point")(3).x == 3

    def test_a_file_imports_what_lies_beside_it_and_takes_it_along(self, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setattr(plugins, "_FROM_FILES", {})
        (tmp_path / "own_layers").mkdir()
        (tmp_path / "own_layers" / "__init__.py").touch()
        (tmp_path / "own_layers" / "blocks.py").write_text("def double(x):\n    return 2 * x\n")
        (tmp_path / "json.py").write_text("1 / 0\n")  # never in the place of what is installed
        file = tmp_path / "own_model.py"
        file.write_text("import json\nfrom own_layers.blocks import double\n\ndef four():\n    return double(2)\n")
        four = load_from_file(f"{file}:four")
        elsewhere = "import pickle, sys; print(pickle.load(sys.stdin.buffer)())"
        done = subprocess.run([sys.executable, "-c", elsewhere], input=pack(four), capture_output=True, check=True)
        assert done.stdout.split() == [b"4"]
        assert {one.__name__ for one in plugins.modules_from_files()} >= {"own_layers", "own_layers.blocks"}
        for module in ("own_layers", "own_layers.blocks"):
            del sys.modules[module]

    def test_a_file_is_written_as_it_was_given_first_and_found_from_anywhere(
        self, tmp_path: Path, monkeypatch
    ) -> None:
        monkeypatch.setattr(plugins, "_WRITTEN", {})
        here, there = tmp_path / "here", tmp_path / "there"
        for folder in (here, there):
            folder.mkdir()
            (folder / "mine.py").write_text("class Own:\n    pass\n")
        monkeypatch.chdir(here)
        first = load_from_file("mine.py:Own")
        assert plugins.spec_of(load_from_file(f"{here}/mine.py:Own")) == "mine.py:Own"
        assert plugins.whole_spec("mine.py:Own") == f"{here}/mine.py:Own"
        monkeypatch.chdir(there)
        second = load_from_file("mine.py:Own")
        assert (plugins.spec_of(first), plugins.spec_of(second)) == ("mine.py:Own", f"{there}/mine.py:Own")
        assert plugins.written_spec(f"{here}/mine.py:Own") == "mine.py:Own"
        assert plugins.files_in("A+mine.py:Own(k=1)", "B") == {"mine.py": f"{here}/mine.py"}
        kept = {"mine.py": f"{there}/mine.py", "gone.py": f"{tmp_path}/gone.py"}  # of a study that is resumed
        assert plugins.write_files_as(kept) == {"mine.py": f"{there}/mine.py"}
        assert (plugins.spec_of(first), plugins.spec_of(second)) == (f"{here}/mine.py:Own", "mine.py:Own")

    def test_a_package_in_the_current_folder_is_found_behind_all_that_is_installed(
        self, tmp_path: Path, monkeypatch
    ) -> None:
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setattr(plugins, "_FROM_FILES", {})
        (tmp_path / "own_networks").mkdir()
        (tmp_path / "own_networks" / "small.py").write_text("def four():\n    return 4\n")
        (tmp_path / "own_networks" / "__init__.py").touch()
        (tmp_path / "json.py").write_text("1 / 0\n")
        monkeypatch.chdir(tmp_path)
        four = load_factory("own_networks.small:four")
        with pytest.raises(ValueError, match="the module 'json' has no 'four'"):
            load_factory("json:four")
        with pytest.raises(ValueError, match=r"cannot import 'own_networks\.big': No module named"):
            load_factory("own_networks.big:four")
        elsewhere = "import pickle, sys; print(pickle.load(sys.stdin.buffer)())"
        command = [sys.executable, "-c", elsewhere]
        done = subprocess.run(command, input=pack(four), capture_output=True, check=True, cwd="/")
        assert done.stdout.split() == [b"4"]
        for module in ("own_networks", "own_networks.small"):
            del sys.modules[module]

    def test_files_of_one_name_are_two_modules_and_hide_no_package(self, tmp_path: Path) -> None:
        for folder in ("a", "b"):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "json.py").write_text("def where():\n    return __file__\n")
        first, second = (load_from_file(f"{tmp_path}/{folder}/json.py:where") for folder in ("a", "b"))
        assert first.__module__ != second.__module__
        import json

        assert json.loads("3") == 3

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            (
                "import no_such_module_at_all\n",
                "No module named 'no_such_module_at_all'",
            ),
            ("def broken(:\n", "SyntaxError"),
            ("raise RuntimeError('one\\ntwo')\n", "raised RuntimeError: one"),
            ("import sys\nsys.exit(2)\n", "raised SystemExit: 2"),
            ("import os\n_hidden = 1\ndef one(): ...\ntwo = 2\n", r"has no 'name'; it has one, two$"),
            ("", "has no 'name'; it has no public names"),
        ],
        ids=["import", "syntax", "two lines", "exit", "no such name", "empty"],
    )
    def test_a_bad_file_gives_one_clear_line(self, source: str, message: str, tmp_path: Path) -> None:
        file = tmp_path / "mine.py"
        file.write_text(source)
        with pytest.raises(ValueError, match=message) as caught:
            load_from_file(f"{file}:name")
        assert str(file) in one_line(caught)

    def test_a_file_that_failed_leaves_no_module_behind(self, tmp_path: Path) -> None:
        (tmp_path / "half_done.py").write_text("raise RuntimeError\n")
        with pytest.raises(ValueError, match="raised RuntimeError"):
            load_from_file(f"{tmp_path}/half_done.py:name")
        assert not any(name.startswith("half_done") for name in sys.modules)

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("none.py:name", "there is no file 'none.py'"),
            ("package.module:name", "there is no file 'package.module'; name one, as path/to/file.py:name"),
            ("none.py", "write none.py:name"),
            ("none.py:", "write none.py:name"),
            (":name", "write path/to/file.py:name"),
        ],
    )
    def test_a_bad_spec_gives_one_clear_line(self, spec: str, message: str) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            load_from_file(spec)
        assert repr(spec) in one_line(caught)

    def test_another_kind_of_file_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "mine.txt").write_text("name = 1\n")
        with pytest.raises(ValueError, match="is not a Python file"):
            load_from_file(f"{tmp_path}/mine.txt:name")
        with pytest.raises(ValueError, match="there is no file"):
            load_from_file(f"{tmp_path}:name")
