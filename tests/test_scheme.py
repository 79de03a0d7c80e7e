from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autocompress import plugins
from autocompress.notation import terms, with_files
from autocompress.scheme import (
    SCHEMES,
    Compose,
    Scheme,
    Theta,
    as_schemes,
    density_error,
    describe,
    parse_scheme,
    parse_schemes,
    parts_of,
    realize_by_part,
)
from autocompress.schemes import FilterPrune, NeuronPrune, NMPrune, Prune, PruneQuantize16, Quantize16, StructPrune


@pytest.mark.parametrize(
    ("spec", "scheme"),
    [
        ("Prune", Prune()),
        (" StructPrune ", StructPrune()),
        ("StructPrune()", StructPrune()),
        ("FilterPrune(min_keep=4)", FilterPrune(min_keep=4)),
        ("Quantize16(dtype=bf16)", Quantize16(dtype="bf16")),
        ("Quantize16(dtype='fp16')", Quantize16(dtype="fp16")),
        ("StructPrune+Quantize16", Compose(StructPrune(), Quantize16())),
        ("Prune(min_keep=3) + Quantize16(dtype=fp16)", Compose(Prune(min_keep=3), Quantize16(dtype="fp16"))),
        ("Prune(criterion=taylor, spread=erk)", Prune(criterion="taylor", spread="erk")),
        ("Prune(spread={'layer1.*': 1.0, 'layer4': 0.3})", Prune(spread={"layer1.*": 1.0, "layer4": 0.3})),
        ("Prune(min_keep={'fc': 5}, skip=['0', 'Linear'])", Prune(min_keep={"fc": 5}, skip=("0", "Linear"))),
        ("Prune(skip=Linear)", Prune(skip=["Linear"])),
        (
            "StructPrune(criterion=taylor, align=8, skip=['layer1.*'])",
            StructPrune(criterion="taylor", align=8, skip=["layer1.*"]),
        ),
        ("NeuronPrune(spread={'fc*': 0.5}, normalize='none')", NeuronPrune(spread={"fc*": 0.5}, normalize="none")),
        ("PruneQuantize16", PruneQuantize16()),
        ("PruneQuantize16", Compose(Prune(), Quantize16())),
    ],
)
def test_specs_are_parsed_and_described(spec: str, scheme: Scheme) -> None:
    assert parse_scheme(spec) == scheme
    assert parse_scheme(describe(scheme)) == scheme
    assert hash(parse_scheme(describe(scheme))) == hash(scheme)


def test_describe_leaves_out_defaults() -> None:
    assert describe(StructPrune()) == "StructPrune"
    assert describe(StructPrune(min_keep=4)) == "StructPrune(min_keep=4)"
    assert describe(PruneQuantize16()) == "Prune+Quantize16"
    assert describe(Compose(Prune(), Quantize16(dtype="bf16"))) == "Prune+Quantize16(dtype='bf16')"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("StructPrun", r"unknown scheme 'StructPrun'; did you mean StructPrune.*available: .*FilterPrune, "),
        ("structprune", r"did you mean StructPrune"),
        ("Magic", r"unknown scheme 'Magic'.*available"),
        ("", r"'' is not a scheme"),
        ("Prune+", r"'Prune\+' is not a scheme"),
        ("Prune-Quantize16", r"'Prune-Quantize16' is not a scheme"),
        ("Prune(3)", r"parameters as Name\(parameter=value\)"),
        ("a.Prune", r"is not a scheme"),
        ("Prune(keep=3)", r"Prune has no parameter 'keep' \(it has: criterion, spread, min_keep, skip\)"),
        ("PruneQuantize16(min_keep=3)", r"PruneQuantize16 has no parameter 'min_keep' \(it has: none\)"),
        ("Prune(**x)", r"write names, parameters as Name\(parameter=value\)"),
        ("Prune(min_keep=0)", r"min_keep=0; every layer must keep at least 1 weight"),
        ("Prune(min_keep=many)", r"min_keep='many'; every layer must keep at least 1 weight: give a whole number"),
        ("Prune(min_keep={'fc': 0})", r"min_keep=\{'fc': 0\}; every layer must keep at least 1"),
        ("Prune(criterion=hrank)", r"criterion='hrank'; Prune takes l1, l2, lamp, taylor, obd, random$"),
        ("FilterPrune(criterion=best)", r"criterion='best'; FilterPrune takes l1, l2, .*beta_rank, random$"),
        ("StructPrune(spread=even)", r"spread='even'; it must be global, uniform, erk, lamp, or a mapping"),
        ("Prune(spread={'fc': 0.0})", r"spread=\{'fc': 0.0\}; it must be"),
        ("StructPrune(align=0)", r"align=0; widths can be multiples of a whole number from 1 up, or auto"),
        ("StructPrune(skip=3)", r"skip=3; it must be a list of modules' names, globs or types"),
        ("Prune(min_keep=2*3)", r"'2\*3' is not a plain value"),
        ("Prune(min_keep=__import__('os'))", r"is not a plain value"),
        ("Quantize16(dtype=int8)", r"dtype='int8'; it must be auto, fp16 or bf16"),
        ("Prune+StructPrune", r"Prune and StructPrune each take a density; compose at most one"),
        ("Prune+StructPrune", r"Prune and StructPrune each take a density; compose at most one of them"),
        ("Quantize8+Quantize16", r"Quantize8 must come last, not before Quantize16"),
        ("Quantize8+Quantize8(bits=4)", r"Quantize8 must come last, not before Quantize8\(bits=4\)"),
        ("LowRank+Quantize8", r"Quantize8 cannot come behind LowRank, which puts other operators in a network"),
        ("Prune+Quantize16+Quantize8", r"Quantize8 cannot come behind Quantize16"),
        ("Quantize16+Prune(min_keep=2)", r"Prune\(min_keep=2\) takes a density and must come first"),
        ("Prune+NMPrune", r"NMPrune cannot come behind Prune, which removes weights itself; compose it with"),
        ("LowRank+NMPrune", r"NMPrune cannot come behind LowRank"),
        ("NMPrune+NMPrune(m=8)", r"NMPrune cannot come behind NMPrune"),
        ("Prune+Nothing", r"unknown scheme 'Nothing'"),
    ],
)
def test_what_cannot_be_parsed_is_refused_in_one_line(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        parse_scheme(spec)
    assert "\n" not in str(refused.value)


def test_the_density_error_names_what_is_possible() -> None:
    assert str(density_error(0.01, 0.02345)) == (
        "density 0.01 cannot be reached; the lowest possible here is 0.02345"
    )


def test_compositions_are_flat() -> None:
    inner = Compose(Prune(), Quantize16())
    assert Compose(inner, Quantize16(dtype="fp16")).parts == (Prune(), Quantize16(), Quantize16(dtype="fp16"))
    assert parts_of(inner) == (Prune(), Quantize16())
    assert parts_of(Prune()) == (Prune(),)
    with pytest.raises(ValueError, match="at least one"):
        Compose()


def test_a_composition_takes_over_density_and_the_loosest_tolerance() -> None:
    assert Compose(Prune(), Quantize16()).takes_density
    assert not Compose(Quantize16()).takes_density
    assert Compose(Prune(), Quantize16()).tolerance == Quantize16().tolerance
    assert Compose(StructPrune()).tolerance == StructPrune().tolerance


class Scale:
    """Multiplies by a factor, so that the order of a composition shows."""

    takes_density, tolerance = False, 1e-5

    def __init__(self, factor: float, power: int = 1) -> None:
        self.factor, self.power = factor, power

    def analyze(self, model: nn.Module, example_input: Tensor) -> float:
        return self.factor

    def lowest_density(self, facts: float) -> float:
        return 1.0

    def pi(self, weights: dict[str, Tensor], density: float, facts: float) -> Theta:
        return Theta({n: facts * w**self.power for n, w in weights.items()}, {}, 12, {"factor": facts})

    def delta(self, theta: Theta) -> dict[str, Tensor]:
        return theta.values

    def realize(self, model: nn.Module, theta: Theta, facts: float) -> nn.Module:
        return nn.Sequential(model, nn.Hardtanh(-theta.plan["factor"], theta.plan["factor"]))


def test_the_parts_of_a_composition_are_applied_in_order() -> None:
    model = nn.Linear(3, 4, bias=False)
    weights = {"weight": torch.full((4, 3), 3.0)}
    for parts, value in (((Scale(2), Scale(1, power=2)), 36.0), ((Scale(1, power=2), Scale(2)), 18.0)):
        scheme = Compose(*parts)
        facts = scheme.analyze(model, torch.zeros(1, 3))
        theta = scheme.pi(weights, 1.0, facts)
        assert theta.values["weight"].eq(value).all()
        assert theta.plan == {"parts": [{"factor": part.factor} for part in parts]}
        steps = list(realize_by_part(scheme, model, theta, facts))
        assert [part for part, _ in steps] == list(parts)
        assert steps[1][1][0] is steps[0][1]
        assert scheme.realize(model, theta, facts)[1].max_val == parts[1].factor


def test_a_composition_keeps_what_all_of_its_parts_keep() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4))
    weights = {name: p.detach() for name, p in model.named_parameters()}
    scheme = Compose(Prune(criterion="l2"), Quantize16(dtype="bf16"))
    facts = scheme.analyze(model, torch.zeros(1, 5))
    theta, pruned = scheme.pi(weights, 0.5, facts), Prune(criterion="l2").pi(weights, 0.5, facts[0])
    assert theta.kept == pruned.kept == 32
    assert all(torch.equal(theta.support[name], mask) for name, mask in pruned.support.items())
    for name, value in scheme.delta(theta).items():
        assert torch.equal(value, pruned.values[name].bfloat16().float())
    assert scheme.lowest_density(facts) == Prune(criterion="l2").lowest_density(facts[0])


class Careless(NMPrune):
    """It composes with anything, as a third party's scheme may."""

    def check_parts(self, parts: tuple[Scheme, ...]) -> None:
        pass


def test_only_one_part_of_a_composition_removes_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4))
    scheme, weights = (
        Compose(Prune(criterion="l2"), Careless()),
        {name: p.detach() for name, p in model.named_parameters()},
    )
    facts = scheme.analyze(model, torch.zeros(1, 5))
    with pytest.raises(ValueError, match=r"Careless takes entries out of 0\.weight, as a part before it does"):
        scheme.pi(weights, 0.7, facts)


@pytest.mark.parametrize("given", [StructPrune, [Prune(), StructPrune], 3, [3]])
def test_what_is_no_scheme_is_refused_at_once(given: Any) -> None:
    message = "scheme= is (the class StructPrune, not a scheme; write StructPrune\\(\\)|a int, which is no scheme)"
    with pytest.raises(ValueError, match=message):
        as_schemes(given)


OF_MY_OWN = """
from dataclasses import dataclass
from autocompress.schemes import Prune, Quantize16
from autocompress.scheme import Compose

@dataclass(frozen=True)
class Mine(Prune):
    level: int = 1

def halves():
    return Compose(Mine(level=2), Quantize16())

def nothing():
    return 3

number = 3
"""


@pytest.fixture
def my_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file as a user may call it, in the folder where they are; what it registers is forgotten afterwards."""
    list(SCHEMES)  # the plugins first
    monkeypatch.setattr(SCHEMES, "_items", dict(SCHEMES._items))
    monkeypatch.setattr(SCHEMES, "_modules", dict(SCHEMES._modules))
    monkeypatch.setattr(plugins, "_WRITTEN", {})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my work").mkdir()
    (tmp_path / "my work" / "pruning-2.py").write_text(OF_MY_OWN)
    return "my work/pruning-2.py"


def test_a_scheme_in_a_file_is_written_as_any_other(my_file: str) -> None:
    for spec, described in (
        (f"{my_file}:Mine", f"{my_file}:Mine"),
        (f"./{my_file}:Mine(level=3)", f"{my_file}:Mine(level=3)"),
        (f"{my_file}:Mine + Quantize16(dtype=bf16)", f"{my_file}:Mine+Quantize16(dtype='bf16')"),
        (f"{my_file}:halves", f"{my_file}:Mine(level=2)+Quantize16"),
    ):
        assert describe(parse_scheme(spec)) == described == describe(parse_scheme(described))
    listed = parse_schemes(f"Prune, {my_file}:Mine(level=3, skip=['a', 'b.py:c']), {my_file}:Mine+Quantize16")
    assert [describe(one) for one in listed] == [
        "Prune",
        f"{my_file}:Mine(skip=('a', 'b.py:c'), level=3)",
        f"{my_file}:Mine+Quantize16",
    ]


@pytest.mark.parametrize("folder", ["a+b", "a, b", "(c)", "it's", 'said "so"', "[d] {e}", "a+b's\\"])
def test_a_path_with_what_means_something_in_a_scheme_is_written_in_quotes(my_file: str, folder: str) -> None:
    Path(folder).mkdir()
    file = Path(my_file).rename(Path(folder) / "my.py")
    spec = f"{f'{file}:Mine'!r}(level=3, skip=['a+b.py:c', 'd'])"
    one, other = parse_schemes(f"{spec} + Quantize16, Prune")
    assert describe(one) == f"{f'{file}:Mine'!r}(skip=('a+b.py:c', 'd'), level=3)+Quantize16"
    assert describe(other) == "Prune"
    assert describe(parse_scheme(describe(one))) == describe(one)
    moved = with_files(describe(one), {str(file): str(file.resolve())})
    assert [term.name for term in terms(moved)] == [f"{file.resolve()}:Mine", "Quantize16"]
    if "'" not in folder and '"' not in folder:
        for written in (f"{file}:Mine", f"Prune,{file}:Mine(level=3)", f"Quantize16+{file}:Mine"):
            with pytest.raises(ValueError, match=r"mean something in a scheme; write '.*', with these"):
                parse_schemes(written)


def test_a_file_is_not_run_where_it_may_not_be(my_file: str) -> None:
    """But a scheme that was taken from it before, or imported, is found by its name."""
    Path(my_file).write_text(OF_MY_OWN + "\nopen('run', 'w').close()\n")
    with pytest.raises(ValueError, match=r"pruning-2\.py:Mine is in a file, which is not run for this; import it"):
        parse_scheme(f"{my_file}:Mine(level=3)", run_files=False)
    assert not Path("run").exists()
    parse_scheme(f"{my_file}:Mine")
    Path("run").unlink()
    assert parse_scheme(f"elsewhere/{my_file}:Mine(level=3)", run_files=False).level == 3  # type: ignore[attr-defined]
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (":Yours", r"has no 'Yours'; it has .*Mine"),
        (":number", r"pruning-2\.py:number' is a int; name a scheme's class or a function that"),
        (":nothing", r"pruning-2\.py:nothing gives a int, which is no scheme: without takes_density, tolerance, "),
        (":Mine(levl=1)", r"pruning-2\.py:Mine has no parameter 'levl' \(it has: .*level\)"),
        ("", r"is not a scheme; .*path/to/file\.py:Name"),
        ("x:Mine", r"is not a scheme"),
    ],
)
def test_what_is_wrong_with_a_scheme_in_a_file_is_said(my_file: str, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_schemes(my_file + name)
    with pytest.raises(ValueError, match=r"there is no file 'none\.py'"):
        parse_schemes("none.py:Mine")
