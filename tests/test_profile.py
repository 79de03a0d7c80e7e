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
