"""What is given from Python is of its kind, or refused in one line that names it, with nothing left on disk."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import autocompress as ac
from autocompress.arguments import check_fields, flag, listing, number, optional, several, takes, text, whole
from autocompress.recovery import Iterative
from autocompress.task_options import TaskOptions


class ReachedError(Exception):
    """What comes after the checks of the arguments."""


def task() -> ac.Task:
    raise ReachedError


def net() -> nn.Module:
    return nn.Linear(4, 2)


def measure(**given: Any) -> ac.Measurement:
    return ac.measure(**{"model": net(), "example_input": torch.zeros(1, 4), "timing": False, **given})


def own_task(**given: Any) -> ac.Task:
    part = (torch.zeros(4, 4), torch.tensor([0, 1, 0, 1]))
    return ac.Task(**{"model": net(), "train": part, "val": part, "test": part, **given})


def one_line(call: Callable[..., Any], **given: Any) -> str:
    with pytest.raises(ValueError) as caught:
        call(**given)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever is refused."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.iterdir())


NUMBERS = [
    (ac.tune, {"trials": "2"}, "trials='2'; it must be a whole number"),
    (ac.tune, {"trials": 2.5}, "trials=2.5; it must be a whole number"),
    (ac.tune, {"trials": True}, "trials=True; it must be a whole number"),
    (ac.tune, {"trials": None}, "trials=None; it must be a whole number"),
    (ac.tune, {"trials": 0}, "trials=0; it must be at least 1"),
    (ac.tune, {"seed": 1.5}, "seed=1.5; it must be a whole number"),
    (ac.tune, {"workers": "2"}, "workers='2'; it must be a whole number"),
    (ac.tune, {"epochs": "10"}, "epochs='10'; it must be a number, or None"),
    (ac.tune, {"epochs": float("inf")}, "epochs=inf; it must be a finite number"),
    (ac.tune, {"max_drop": "1%"}, "max_drop='1%'; it must be a number, such as 0.01 for one point"),
    (ac.tune, {"timeout": "10m"}, "timeout='10m'; it must be a number, such as 60 for a minute, or None"),
    (ac.tune, {"tolerance": "15%"}, "tolerance='15%'; it must be a number, such as 0.15 for 15%"),
    (ac.tune, {"confidence": "95%"}, "confidence='95%'; it must be a number, such as 0.95"),
    (
        ac.sweep,
        {"densities": "0.5,0.1"},
        "densities='0.5,0.1'; it must be a number, such as 0.5, or a list of such",
    ),
    (ac.sweep, {"densities": [0.5, None]}, "densities=[0.5, None]; it must be a number"),
    (ac.sweep, {"densities": ()}, "densities=[]; give one or more numbers above 0 and at most 1"),
    (ac.sweep, {"repeats": "2"}, "repeats='2'; it must be a whole number"),
    (measure, {"batch_sizes": "8"}, "batch_sizes='8'; it must be a whole number, or a list of such"),
    (measure, {"batch_sizes": [1.5]}, "batch_sizes=[1.5]; it must be a whole number, or a list of such"),
    (measure, {"batch_sizes": [0]}, "batch_sizes=(0,); give one or more positive numbers of samples"),
    (measure, {"budget_s": float("nan")}, "budget_s=nan; it must be at least 0, and finite"),
    (measure, {"dense_params": -1}, "dense_params=-1; it must be at least 0"),
    (ac.LearningCompression, {"steps": "10"}, "steps='10'; it must be a whole number, or None"),
    (Iterative, {"rounds": "4"}, "rounds='4'; it must be a whole number"),
    (TaskOptions, {"train_epochs": "10"}, "train_epochs='10'; it must be a whole number, or None"),
]
OTHERS = [
    (ac.tune, {"cheap_trials": "no"}, "cheap_trials='no'; it must be True or False"),
    (
        ac.tune,
        {"constraints": [5]},
        "constraints=[5]; it must be a text such as 'sensitivity>=0.95' or 'size<=1MB'",
    ),
    (ac.tune, {"formats": 5}, "formats=5; it must be a text, or a list of such"),
    (ac.tune, {"search": ["lr"]}, "search=['lr']; it must be a text or a mapping"),
    (ac.tune, {"search": {5: None}}, "a name in search=5; it must be a text"),
    (ac.tune, {"device": 0}, "device=0; it must be auto, cpu, cuda or cuda:i"),
    (ac.tune, {"recovery": None}, "recovery=None; give a name (auto, lc, "),
    (ac.tune, {"recovery": ac.LearningCompression}, "; give a name (auto, lc, "),
    (ac.tune, {"watcher": print}, "watcher=<built-in function print>; it must be a Watcher, or None"),
    (ac.tune, {"out": None}, "out=None; it must be a path"),
    (ac.tune, {"out": ""}, "out=''; it must be a path"),
    (ac.tune, {"name": 5}, "name=5; it must be a text, or None"),
    (ac.tune, {"resume": 5}, "resume=5; it must be a text, or None"),
    (ac.tune, {"task": net()}, "task= is Linear(in_features=4, out_features=2, bias=True); it must be a Task"),
    (
        ac.sweep,
        {"schemes": "auto"},
        "a sweep runs every scheme that it is given; name them in the place of 'auto'",
    ),
    (ac.sweep, {"also": 5}, "also=5; it must be a metric's name, a Metric or a function, or a list of such"),
    (ac.sweep, {"timing": "no"}, "timing='no'; it must be True or False"),
    (ac.sweep, {"progress": None}, "progress=None; it must be a function"),
    (
        measure,
        {"model": nn.Linear},
        "model=<class 'torch.nn.modules.linear.Linear'>; it must be a torch.nn.Module",
    ),
    (measure, {"example_input": np.zeros((1, 4))}, "; it must be a tensor"),
    (measure, {"example_input": torch.zeros(0, 4)}, "example_input= is of shape (0, 4); it must hold a sample"),
    (
        measure,
        {"example_input": torch.zeros(1, 5)},
        "the model does not take example_input=, of shape (1, 5): Runti",
    ),
    (measure, {"device": "tpu"}, "device='tpu'; it must be auto, cpu, cuda or cuda:i"),
    (ac.load, {"directory": 5}, "directory=5; it must be a path"),
    (own_task, {"model": "resnet18"}, "model='resnet18'; it must be a torch.nn.Module"),
    (own_task, {"metric": 5}, "metric=5; give a name, file.py:name, a Metric or a function"),
    (ac.make_task, {"data": 5}, "data=5; it must be a text, or None"),
]


@pytest.mark.parametrize(("call", "given", "said"), NUMBERS + OTHERS)
def test_what_is_of_another_kind_is_refused_in_one_line(
    call: Callable[..., Any], given: dict[str, Any], said: str
) -> None:
    asked = {"task": task, **given} if call in (ac.tune, ac.sweep) else given
    assert said in one_line(call, **asked)


@pytest.mark.parametrize(
    ("call", "given"),
    [
        (
            ac.tune,
            {"trials": np.int64(2), "seed": 1.0, "max_drop": np.float32(0.01), "device": torch.device("cpu")},
        ),
        (ac.tune, {"scheme": ["auto"]}),
        (ac.tune, {"constraints": "sensitivity>=0.9", "out": Path("runs")}),
        (ac.sweep, {"densities": 0.5, "also": "auc"}),
        (ac.sweep, {"densities": np.array([0.5, 0.1]), "also": lambda targets, outputs: 1.0}),
    ],
)
def test_what_comes_to_the_same_is_taken(call: Callable[..., Any], given: dict[str, Any]) -> None:
    with pytest.raises(ReachedError):
        call(task=task, **given)


def test_a_bare_text_is_one_and_not_its_letters() -> None:
    assert "there is no format 'pt2'" in one_line(ac.tune, task=task, formats="pt2")
    assert "unknown metric 'aux'; did you mean auc?" in one_line(ac.sweep, task=task, also="aux")
    assert measure(runtimes="eager", batch_sizes=1).runtime == "eager"
    assert TaskOptions(augment="flip", image_size=64) == TaskOptions(augment=("flip",), image_size="64")
    assert own_task(classes="ab").classes == ("ab",)


def test_a_function_is_a_metric() -> None:
    def mine(targets: np.ndarray, outputs: np.ndarray) -> float:
        return float((outputs.argmax(1) == targets).mean())

    made = own_task(metric=mine)
    assert made.metric.name == "mine" and own_task(metric=lambda t, o: 1.0).metric.name == "metric"
    assert made.evaluate(made.model, made.val).score == own_task().evaluate(made.model, made.val).score
    broken = own_task(metric=lambda t, o: o[:, 5])
    assert "the metric 'metric' raised IndexError" in one_line(lambda: broken.evaluate(broken.model, broken.val))


class TestTheCheckItself:
    def test_one_or_several(self) -> None:
        assert listing("ab") == ("ab",) and listing(5) == (5,) and listing({"a": 1}) == ({"a": 1},)
        assert listing(None) == () == listing([]) and listing(iter("ab")) == ("a", "b")

    def test_numbers_are_handed_on_as_pythons(self) -> None:
        @takes(n=whole, x=number, some=several(number))
        def given(n: Any, x: Any, some: Any = (), rest: Any = None) -> tuple[Any, ...]:
            """Its docstring."""
            return n, x, some, rest

        taken = given(np.int64(3), x=np.float64(0.5), some=np.arange(2))
        assert taken == (3, 0.5, (0, 1), None)
        assert [type(one) for one in (*taken[:2], *taken[2])] == [int, float, int, int]
        assert given(2.0, 10) == (2, 10, (), None) and isinstance(given(2.0, 10)[0], int)
        assert given.__doc__ == "Its docstring." and list(inspect.signature(given).parameters) == [
            "n", "x", "some", "rest",
        ]  # fmt: skip
        with pytest.raises(TypeError, match=r"given\(\) got an unexpected keyword argument 'm'"):
            given(1, 2, m=3)

    def test_long_values_are_cut_and_stay_on_the_line(self) -> None:
        said = one_line(lambda: whole.convert("n", torch.zeros(40, 40)))
        assert said.startswith("n=tensor([[0., 0.") and said.endswith("...; it must be a whole number")
        assert len(said) < 150

    def test_fields(self) -> None:
        class Config:
            n, kind, on = np.int32(3), None, True

        config = Config()
        check_fields(config, n=whole, kind=optional(text), on=flag)
        assert type(config.n) is int and config.kind is None and config.on is True
        assert one_line(check_fields, config=config, on=text) == "on=True; it must be a text"
