import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from autocompress.cli import cli
from autocompress.formats import bundle
from autocompress.formats.bundle import Provenance
from autocompress.gauges.macs import count_params
from autocompress.gauges.profile import of_model, of_study, profile
from autocompress.models import build
from autocompress.scheme import parse_scheme

DIGITS = ("--model", "small_resnet", "--input", "1x8x8", "--classes", "10")
QUICK = ("--batch", "1", "--budget", "0.01", "--runtime", "eager")


def run(*arguments: str):
    return CliRunner().invoke(cli, ["profile", *arguments])


def small_resnet() -> nn.Module:
    return build({"model": "small_resnet", "classes": 10, "in_channels": 1}).eval()


def test_what_a_scheme_would_make_of_a_model() -> None:
    scheme = parse_scheme("StructPrune+Quantize8")
    profiled = of_model(small_resnet(), torch.zeros(1, 1, 8, 8), scheme, density=0.3)
    measured = profile(profiled, runtimes=("eager", "onnxruntime"), batch_sizes=(1,), budget_s=0.01)
    dense, compressed = measured["dense"], measured["compressed"]
    assert dense.density == 1.0
    assert compressed.density <= 0.3
    assert compressed.size_bytes < 0.3 * dense.size_bytes
    assert [one.runtime for one in dense.latency] == ["eager", "onnxruntime"]
    assert [one.runtime for one in compressed.latency] == ["onnxruntime"]  # PyTorch only simulates the integers


def test_a_studys_answer_beside_its_dense_model(tmp_path: Path) -> None:
    dense, scheme, x = small_resnet(), parse_scheme("StructPrune(criterion=l2)"), torch.zeros(1, 1, 8, 8)
    facts = scheme.analyze(dense, x)
    theta = scheme.pi({name: p.detach() for name, p in dense.named_parameters()}, 0.3, facts)
    model = scheme.realize(dense, theta, facts)
    density = theta.kept / count_params(dense)
    architecture = {"model": "small_resnet", "classes": 10, "in_channels": 1}
    bundle.save(model, x, tmp_path, Provenance("StructPrune", theta.plan, density, "digits", architecture))
    profiled = of_study(tmp_path)
    assert profiled.kept == (count_params(dense), theta.kept)
    found = profile(profiled, batch_sizes=(1,), budget_s=0.01)
    assert found["compressed"].density == pytest.approx(density)
    assert found["compressed"].macs < found["dense"].macs


def test_a_study_of_a_model_of_ones_own_is_profiled_beside_it(recorded, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def net(width=4, classes=7):\n"
        "    layers = nn.Conv2d(1, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36 * width, classes)\n"
        "    return nn.Sequential(*layers)\n"
    )
    mine = f"{tmp_path}/mine.py:net"
    dense, scheme, x = own_network(6), parse_scheme("StructPrune(criterion=l2, align=1)"), torch.zeros(1, 1, 8, 8)
    facts = scheme.analyze(dense, x)
    theta = scheme.pi({name: p.detach() for name, p in dense.named_parameters()}, 0.6, facts)
    settings = recorded.asked(task_options={"model": mine, "model_args": ["width=6"]})
    study = recorded.write_study(tmp_path, settings=settings)
    (study / "best").mkdir()
    where = Provenance("StructPrune(align=1)", theta.plan, theta.kept / count_params(dense), "t", classes="abc")
    bundle.save(scheme.realize(dense, theta, facts), x, study / "best", where)
    alone = run("demo", "--out", str(tmp_path), *QUICK)
    assert alone.exit_code == 2
    assert f"give its dense form: --model {mine} --model-args width=6" in " ".join(alone.output.split())
    beside = run("demo", "--out", str(tmp_path), "--model", mine, "--model-args", "width=6", *QUICK, "--json")
    assert beside.exit_code == 0, beside.output
    found = json.loads(beside.stdout)
    assert [one["params"] for one in found.values()] == [count_params(dense), theta.kept]


def own_network(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36 * width, 3)).eval()


def test_the_command_prints_a_table_or_json() -> None:
    alone = run(*DIGITS, *QUICK, "--json")
    assert alone.exit_code == 0, alone.output
    found = json.loads(alone.stdout)
    assert list(found) == ["dense"]
    assert found["dense"]["params"] == count_params(small_resnet())
    assert found["dense"]["latency"][0]["interval"] > 0
    both = run(*DIGITS, *QUICK, "--scheme", "StructPrune", "--density", "0.3")
    assert both.exit_code == 0, both.output
    for words in ("dense", "compressed", "ratio", "latency, PyTorch, batch 1", "samples, PyTorch, batch 1"):
        assert words in both.stdout
    assert "measured in float32, channels_last, " in both.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "resnet81"), "--model"),
        ((*DIGITS, "--input", "8by8"), "channels x height x width"),
        (("--model", "small_resnet", "--input", "3x8"), "does not take an input of shape 3x8: it raised"),
        ((*DIGITS, "--scheme", "Prun"), "did you mean"),
        (("last", *DIGITS, "--scheme", "Prune"), "leave RUN out"),
        (("--device", "mars"), "--device"),
        (("--out", "nowhere"), "RUN"),
    ],
)
def test_what_cannot_be_profiled_is_bad_usage(arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2
    assert message in done.output
