"""Whatever is typed or lies in a file: an answer, or one line that says what is wrong."""

import contextlib
import copy
import hashlib
import io
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn
from torch import nn

import autocompress as ac
from autocompress.cli import cli, main
from autocompress.formats import bundle
from autocompress.reading.readers import read
from autocompress.reading.samples import Found, Reading
from autocompress.scheme import Scheme, describe, parse_scheme
from autocompress.schemes import StructPrune

FAST = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def said_in_one_line(error: ValueError) -> bool:
    return bool(str(error)) and "\n" not in str(error)


def answers(work: Callable[[], Any]) -> Any:
    """What ``work`` gives, or None where it refuses in one line; anything else is raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a scheme leaves whole
        try:
            return work()
        except ValueError as error:
            assert said_in_one_line(error), str(error)
            return None


# JSON in which one thing is another.

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, -1, 3, 10**6, 10**30, 0.5, -0.5, 1e308]),
    st.sampled_from(
        ["", "x", "..", "../../escaped", "/etc/passwd", "load", "float32", "\x00", "timm/local-dir:/etc"]
    ),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "0", "ranks"]), inner),
    max_leaves=4,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something can be changed: the keys and indices on the way to it."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, child in inner:
        yield from places(child, (*path, key))


@st.composite
def changed(draw: st.DrawFn, original: Any) -> Any:
    """JSON that differs in one place or two: another value, or nothing."""
    value = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 2))):
        *way, last = draw(st.sampled_from([path for path in places(value) if path]))
        parent = value
        for key in way:
            parent = parent[key]
        if isinstance(parent, dict) and draw(st.booleans()):
            del parent[last]
        else:
            parent[last] = draw(VALUES)
        if not value:
            break
    return value


# What is typed

NAMES = st.sampled_from(
    ["Prune", "StructPrune", "NMPrune", "LowRank", "BlockPrune", "Quantize16", "Quantize8", "no"]
)
KEYS = st.sampled_from(
    ["criterion", "spread", "skip", "min_keep", "align", "n", "m", "block", "dtype", "min_rank"]
)
LITERALS = st.recursive(
    st.sampled_from(
        ["1", "-1", "0", "4", "1.5", "1e400", "True", "None", "l2", "bf16", "'x'", "b'x'", "9" * 30, "nan"]
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda some: f"[{', '.join(some)}]"),
        st.lists(inner, min_size=1, max_size=2).map(lambda some: f"({', '.join(some)},)"),
        st.tuples(inner, inner).map(lambda pair: f"{{{pair[0]}: {pair[1]}}}"),
        inner.map(lambda one: f"__import__({one})"),
        inner.map(lambda one: f"{one} + {one}"),
    ),
    max_leaves=4,
)
TERMS = st.builds(
    lambda name, given: f"{name}({', '.join(f'{key}={value}' for key, value in given)})" if given else name,
    NAMES,
    st.lists(st.tuples(KEYS, LITERALS), max_size=3),
)


@FAST
@given(st.one_of(st.text(max_size=30), st.lists(TERMS, min_size=1, max_size=2).map("+".join)))
@example("+".join(["Prune"] * 3000))
@example("Prune(skip=" + "-" * 5000 + "1)")
@example("Prune(skip={[]: 1})")
@example("Prune(skip='\ud800', min_keep=\x00)")
def test_any_scheme(spec: str) -> None:
    scheme = answers(lambda: parse_scheme(spec))
    assert scheme is None or (isinstance(scheme, Scheme) and parse_scheme(describe(scheme)) == scheme)


@pytest.mark.parametrize(
    "spec", ["Prune(skip=__import__('os').system('touch run'))", "exec('1')", "Prune(min_keep=2**99)"]
)
def test_nothing_in_a_scheme_is_run(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"is not a plain value|is not a scheme"):
        parse_scheme(spec)
    assert not list(tmp_path.iterdir())


TUNE = {
    option.opts[0]: option
    for option in cli.commands["tune"].params
    if option.opts[0] not in ("-v", "--config", "--save-config", "--data", "--help")
}
TYPED = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=12),
    st.sampled_from(
        [
            "",
            "0",
            "-1",
            "1",
            "2",
            "nan",
            "inf",
            "1e400",
            "1%",
            "99%",
            "100%",
            "9" * 25,
            "cpu",
            "cuda:99",
            "meta",
            "../up",
            "/",
            "a/b",
            "..",
        ]
    ),
    st.sampled_from(
        [
            "x.py:f",
            "os:system",
            "density",
            "accuracy>=0.5",
            "auc",
            "recall[0]",
            "gp",
            "k=v",
            "sqlite:///x",
            "http://",
            "64x0",
            "1/1/1",
        ]
    ),
)


@FAST
@given(st.lists(st.tuples(st.sampled_from(sorted(TUNE)), TYPED), max_size=4))
def test_any_options(tmp_path: Path, options: list[tuple[str, str]]) -> None:
    """On data that is not there, so that it always ends before a study begins."""
    (tmp_path / "here").mkdir(exist_ok=True)
    flags = [name if TUNE[name].is_flag else f"{name}={value}" for name, value in options if name != "--out"]
    status, said = typed(tmp_path / "here", "tune", *flags, "--data", "missing.npz", "--out", "runs")
    assert status == 2 and said.startswith("Error: ") and said.count("\n") == 1, said
    assert {file.name for file in tmp_path.iterdir()} == {"here"}
    assert {file.name for file in (tmp_path / "here").iterdir()} <= {"runs"}


@FAST
@given(st.sampled_from(["show", "report", "list", "replay", "ui", "doctor"]), TYPED)
def test_any_name_of_a_study(tmp_path: Path, command: str, name: str) -> None:
    (tmp_path / "here").mkdir(exist_ok=True)
    status, said = typed(tmp_path / "here", command, "--out", "runs", "--", name)
    assert status == 2 and said.startswith("Error: ") and said.count("\n") == 1, said
    assert not list((tmp_path / "here").iterdir())


def typed(folder: Path, *argv: str) -> tuple[int, str]:
    """The exit status and what was said on stderr."""
    said, before = io.StringIO(), sys.argv
    with contextlib.chdir(folder), contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        sys.argv = ["autocompress", *argv]
        try:
            with pytest.raises(SystemExit) as ended:
                main()
        finally:
            sys.argv = before
    return int(ended.value.code or 0), said.getvalue()


# Files with data

ARRAYS = stn.arrays(
    dtype=st.one_of(stn.scalar_dtypes(), st.sampled_from([np.dtype("uint8"), np.dtype("U3"), np.dtype("f4,i2")])),
    shape=stn.array_shapes(min_dims=0, max_dims=4, max_side=4),
)


@FAST
@given(images=ARRAYS, labels=ARRAYS, part=st.sampled_from(["train", "val"]))
def test_any_arrays(tmp_path: Path, images: np.ndarray, labels: np.ndarray, part: str) -> None:
    good = {f"{name}_images": np.zeros((6, 4, 4), np.uint8) for name in ("train", "val", "test")}
    good |= {f"{name}_labels": np.arange(6) % 2 for name in ("train", "val", "test")}
    np.savez(tmp_path / "any.npz", **(good | {f"{part}_images": images, f"{part}_labels": labels}))
    found = answers(lambda: read(str(tmp_path / "any.npz"), Reading()))
    assert found is None or isinstance(found, Found)


# A compressed model


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 3)).eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a network without half of its channels."""
    model, x, scheme = network(), torch.zeros(1, 1, 8, 8), StructPrune(criterion="l2")
    facts = scheme.analyze(model, x)
    theta = scheme.pi(dict(model.named_parameters()), 0.5, facts)
    folder = tmp_path_factory.mktemp("exported")
    density = theta.kept / sum(p.numel() for p in model.parameters())
    where = bundle.Provenance(describe(scheme), theta.plan, density, "test")
    bundle.save(scheme.realize(model, theta, facts), x, folder, where)
    return folder


@pytest.mark.parametrize("shape", [[True], [0], [2.0], [], "8", None])
def test_a_plan_whose_input_is_none(exported: Path, tmp_path: Path, shape: object) -> None:
    plan = json.loads((exported / bundle.PLAN).read_text())
    (tmp_path / bundle.WEIGHTS).write_bytes((exported / bundle.WEIGHTS).read_bytes())
    (tmp_path / bundle.PLAN).write_text(json.dumps({**plan, "input": {"shape": shape, "dtype": "float32"}}))
    with pytest.raises(ValueError, match="does not describe an input; export the model again"):
        ac.load(tmp_path, network())


@FAST
@given(data=st.data())
def test_any_plan(exported: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder, elsewhere = tmp_path / "best", {file.name for file in tmp_path.iterdir()} | {"best"}
    folder.mkdir(exist_ok=True)
    (folder / bundle.WEIGHTS).write_bytes((exported / bundle.WEIGHTS).read_bytes())
    plan = data.draw(changed(json.loads((exported / bundle.PLAN).read_text())))
    (folder / bundle.PLAN).write_text(json.dumps(plan))
    model = data.draw(st.sampled_from([network(), None]))
    loaded = answers(lambda: ac.load(folder, model))
    assert loaded is None or isinstance(loaded, nn.Module)
    assert {file.name for file in folder.iterdir()} == {bundle.WEIGHTS, bundle.PLAN}
    assert {file.name for file in tmp_path.iterdir()} == elsewhere


@FAST
@given(data=st.data())
def test_any_architecture_in_a_plan(exported: Path, tmp_path: Path, data: st.DataObject) -> None:
    (tmp_path / bundle.WEIGHTS).write_bytes((exported / bundle.WEIGHTS).read_bytes())
    architecture = {"model": "small_resnet", "classes": 3, "in_channels": 1}
    plan = json.loads((exported / bundle.PLAN).read_text()) | {"architecture": data.draw(changed(architecture))}
    (tmp_path / bundle.PLAN).write_text(json.dumps(plan))
    assert answers(lambda: ac.load(tmp_path)) is None


@FAST
@given(at=st.integers(0, 10**6), value=st.integers(0, 255))
def test_any_weights(exported: Path, tmp_path: Path, at: int, value: int) -> None:
    """Also where somebody has made the hash in the plan fit."""
    damaged = bytearray((exported / bundle.WEIGHTS).read_bytes())
    damaged[at % min(len(damaged), 600)] = value
    (tmp_path / bundle.WEIGHTS).write_bytes(damaged)
    plan = json.loads((exported / bundle.PLAN).read_text()) | {"sha256": hashlib.sha256(damaged).hexdigest()}
    (tmp_path / bundle.PLAN).write_text(json.dumps(plan))
    loaded = answers(lambda: ac.load(tmp_path, network()))
    assert loaded is None or isinstance(loaded, nn.Module)


# A study's folder


WHOLE: dict[str, str] = {}  # before the first change


@pytest.fixture
def study(recorded, tmp_path: Path) -> Path:
    trials = recorded.three_trials()
    return recorded.write_study(tmp_path, trials=trials, result=recorded.found(trials))


@FAST
@given(data=st.data())
@pytest.mark.parametrize("name", ["study.json", "result.json", "trials/0001/trial.json"])
def test_any_record(study: Path, name: str, data: st.DataObject) -> None:
    """What is damaged in a study on disk is named or left out by whatever reads it."""
    whole = WHOLE.setdefault(name, (study / name).read_text())
    (study / name).write_text(json.dumps(data.draw(changed(json.loads(whole)))))
    for command in (("show", "demo"), ("show", "demo", "--json"), ("list",)):
        status, said = typed(study.parent, *command, "--out", ".")
        assert status in (0, 2), said
        assert "Traceback" not in said and all(
            line.startswith(("Error: ", "note: ")) for line in said.splitlines()
        )
