import copy
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
import types
import warnings
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import cloudpickle
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from autocompress.export import Export, _error, check_formats, export
from autocompress.formats import bundle, parity
from autocompress.formats.bundle import Provenance, load
from autocompress.formats.onnx_export import capture, quietly, write_onnx
from autocompress.formats.parity import reason
from autocompress.formats.weights import save as save_weights
from autocompress.scheme import Theta, register_scheme


class TinyConvNet(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, 3)
        for bn in (self.bn1, self.bn2):
            nn.init.normal_(bn.running_mean)
            nn.init.uniform_(bn.running_var, 0.5, 2.0)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)) + x)
        return self.fc(x.mean((2, 3)))


class In16Bits(nn.Module):
    def __init__(self, inner, dtype):
        super().__init__()
        self.inner = inner.to(dtype)

    def forward(self, x):
        return self.inner(x.to(next(self.inner.parameters()).dtype)).float()


def mlp(hidden=6):
    return nn.Sequential(nn.Flatten(), nn.Linear(16, hidden), nn.ReLU(), nn.Linear(hidden, 3))


@register_scheme
@dataclass(frozen=True)
class HalvesHidden:
    """Keeps the hidden neurons that the plan names."""

    takes_density: ClassVar[bool] = True
    tolerance: ClassVar[float] = 1e-5
    only_in: ClassVar[int | None] = None  # the process that gets one neuron more than the plan names

    def analyze(self, model, example_input):
        assert model(example_input).shape == (1, 3)

    def lowest_density(self, facts):
        return 0.5

    def pi(self, weights, density, facts):
        return Theta(weights, {}, 3, {"kept": [0, 2, 5]})

    def delta(self, theta):
        return theta.values

    def realize(self, model, theta, facts):
        model = copy.deepcopy(model)
        kept = theta.plan["kept"] + [1] * (self.only_in == os.getpid())
        hidden, out = nn.Linear(16, len(kept)), nn.Linear(len(kept), 3)
        hidden.weight.data, hidden.bias.data = model[1].weight.data[kept], model[1].bias.data[kept]
        out.weight.data, out.bias.data = model[3].weight.data[:, kept], model[3].bias.data
        model[1], model[3] = hidden, out
        return model


cloudpickle.register_pickle_by_value(sys.modules[__name__])  # as a script's; pytest alone can import it
PROVENANCE = Provenance("HalvesHidden", {"kept": [0, 2, 5]}, 0.5, "toy", kinds=(HalvesHidden,))
IMAGE = torch.linspace(-1, 2, 64).reshape(1, 1, 8, 8)
FRESH = "import sys; sys.modules['autocompress'] = None; exec(sys.stdin.read())"


def offered(result: Export) -> dict:
    return {artifact.format: artifact for artifact in result.artifacts}


def run_onnx(path, x):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"input": x.numpy()})[0])


def check_any_batch(directory, model, tolerance, shape=(1, 8, 8)):
    program = torch.export.load(directory / "model.pt2").module()
    for n in (1, 3, 32):
        x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(n))
        with torch.no_grad():
            expected = model(x)
            for found in (program(x), run_onnx(directory / "model.onnx", x)):
                assert found.shape == expected.shape and found.dtype == torch.float32
                assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def run_readme(directory: Path) -> int:
    """Runs each block of Python in the README of an export; how many there are."""
    blocks = re.findall(r"```python\n(.*?)```", (directory / "README.md").read_text(), flags=re.DOTALL)
    for block in blocks:
        assert len(block.splitlines()) <= 10
        code = f"{block}\nassert tuple(logits.shape) == (1, 3)\n"
        run = subprocess.run(
            [sys.executable, "-c", FRESH], input=code, cwd=directory, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
    return len(blocks)


@pytest.fixture(scope="module")
def fp32(tmp_path_factory, fresh):
    torch.manual_seed(0)
    model = TinyConvNet().train()
    directory = tmp_path_factory.mktemp("study") / "best"
    (directory / ".export").mkdir(parents=True)
    (directory / ".export" / "model.pt2").write_text("half a file, left by an export that was killed")
    provenance = replace(PROVENANCE, classes=("cat", "dog", "cow"), preprocessing="Pixels in {0, ..., 1}.")
    before = copy.deepcopy(model.state_dict())
    with fresh.left_alone():
        result = export(model, IMAGE, directory, provenance)
    assert model.training and all(module.training for module in model.modules())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert all(p.requires_grad for p in model.parameters())
    return model.eval(), directory, result


def test_every_format_is_offered_and_exact(fp32):
    model, directory, result = fp32
    assert result.refused == {}
    assert list(offered(result)) == ["pt2", "onnx", "safetensors"]
    for artifact in result.artifacts:
        assert artifact.path.stat().st_size == artifact.size_bytes
        assert artifact.max_error < 1e-5
    assert {path.name for path in directory.iterdir()} == {
        *("model.pt2", "model.onnx", "model.safetensors", "plan.json", "README.md")
    }
    check_any_batch(directory, model, 1e-5)


def test_files_quote_neither_source_nor_data(fp32):
    _, directory, _ = fp32
    for name in ("model.pt2", "model.onnx"):
        content = (directory / name).read_bytes()
        assert b".py" not in content.replace(b"model.pt", b"")
        assert str(Path.cwd()).encode() not in content
        assert IMAGE.numpy().tobytes() not in content


def test_onnx_interface(fp32):
    _, directory, _ = fp32
    graph = onnx.load(directory / "model.onnx").graph
    shapes = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.input]
    assert [v.name for v in graph.input] == ["input"] and shapes == [["batch", 1, 8, 8]]
    assert [v.name for v in graph.output] == ["logits"]


def test_readme_code_runs_without_autocompress(fp32):
    _, directory, _ = fp32
    text = (directory / "README.md").read_text()
    assert run_readme(directory) == 2
    assert "cat, dog, cow" in text and "Pixels in {0, ..., 1}." in text
    assert '`autocompress.load(".", model)`' in text
    assert "float32 of shape (batch, 1, 8, 8)" in text


@pytest.mark.skipif(find_spec("executorch") is not None, reason="the extra is installed here")
def test_executorch_where_it_is_not_installed_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"not installed here; pip install 'autocompress\[executorch\]'"):
        check_formats(["executorch"])


def test_a_format_that_nobody_knows_is_refused():
    with pytest.raises(ValueError, match="no format 'torchscript' to ask for; there is executorch"):
        check_formats(["torchscript"])


@pytest.mark.slow
def test_executorch_answers_as_the_model_does_and_its_code_runs(tmp_path):
    pytest.importorskip("executorch", reason="the extra executorch is not installed here")
    model = TinyConvNet().eval()
    result = export(model, IMAGE, tmp_path, PROVENANCE, formats=["executorch"])
    assert list(offered(result)) == ["pt2", "onnx", "executorch", "safetensors"], result.refused
    assert all(artifact.max_error <= 1e-4 for artifact in result.artifacts)
    assert run_readme(tmp_path) == 3
    export(model, IMAGE, tmp_path, PROVENANCE)
    assert not (tmp_path / "model.pte").exists()  # it was not asked for again


def test_plan_says_where_the_model_comes_from(fp32):
    _, directory, _ = fp32
    plan = json.loads((directory / "plan.json").read_text())
    assert plan["scheme"] == "HalvesHidden" and plan["plan"] == {"kept": [0, 2, 5]}
    assert plan["input"] == {"shape": [1, 1, 8, 8], "dtype": "float32"}
    assert plan["versions"]["torch"] == torch.__version__.split("+")[0]


def kinds(path):
    return {i.name: i.data_type for i in onnx.load(path).graph.initializer if i.dims}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_onnx_stores_16_bit_weights_in_16_bits_and_is_exact(dtype, tmp_path):
    torch.manual_seed(1)
    model = In16Bits(TinyConvNet(width=24), dtype).eval()
    path = tmp_path / "model.onnx"
    write_onnx(model, torch.zeros(2, 1, 8, 8), path)
    assert next(model.parameters()).dtype == dtype
    assert onnx.TensorProto.FLOAT not in kinds(path).values()
    assert path.stat().st_size < 2 * sum(p.numel() for p in model.parameters()) + 6_000
    in_float32 = copy.deepcopy(model).float()
    for n in (1, 5, 32):
        x = torch.randn(n, 1, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(run_onnx(path, x), in_float32(x), rtol=1e-5, atol=1e-5)


def test_weights_that_are_not_16_bit_stay_as_they_are(tmp_path):
    torch.manual_seed(2)
    model = nn.Sequential(In16Bits(TinyConvNet(), torch.bfloat16), nn.Linear(3, 4)).eval()
    write_onnx(model, torch.zeros(2, 1, 8, 8), tmp_path / "model.onnx")
    found = kinds(tmp_path / "model.onnx")
    assert found["1.weight"] == onnx.TensorProto.FLOAT
    assert found["0.inner.conv2.weight.16bit"] == onnx.TensorProto.BFLOAT16


def test_a_model_in_16_bits_is_offered_in_every_format(tmp_path):
    torch.manual_seed(3)
    model = In16Bits(TinyConvNet(), torch.bfloat16)
    result = export(model, IMAGE, tmp_path, PROVENANCE)
    assert result.refused == {}
    check_any_batch(tmp_path, model.eval(), 5e-2)
    assert json.loads((tmp_path / "plan.json").read_text())["dtype"] == "bfloat16"


class BranchesOnData(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 3)

    def forward(self, x):
        x = x.flatten(1)
        return self.linear(x) if x.sum() > 0 else -self.linear(x)


def test_a_format_that_fails_is_refused_with_a_reason_and_leaves_no_file(tmp_path, capfd):
    (tmp_path / "model.pt2").write_text("from an earlier export")
    result = export(BranchesOnData(), IMAGE[..., :4, :4], tmp_path, PROVENANCE)
    assert list(offered(result)) == ["safetensors"]
    assert "data-dependent" in result.refused["pt2"]
    assert all("\n" not in reason for reason in result.refused.values())
    assert not (tmp_path / "model.pt2").exists() and not (tmp_path / "model.onnx").exists()
    assert "`model.pt2` is not offered: GuardOnDataDependent" in (tmp_path / "README.md").read_text()
    assert capfd.readouterr() == ("", "")
    assert logging.root.manager.disable == 0


def test_a_module_that_only_this_process_can_rebuild_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(HalvesHidden, "only_in", os.getpid())
    image, dense = torch.randn(1, 1, 4, 4), mlp().eval()
    narrow = HalvesHidden().realize(dense, Theta({}, {}, 3, PROVENANCE.plan), None)
    result = export(narrow, image, tmp_path, PROVENANCE, dense=dense)
    assert "must have the architecture" in result.refused["safetensors"]
    assert not (tmp_path / "model.safetensors").exists() and not (tmp_path / "plan.json").exists()
    assert list(offered(result)) == ["pt2", "onnx"]


def test_an_architecture_that_cannot_be_sent_is_rebuilt_here_and_the_readme_says_so(tmp_path, monkeypatch):
    generated = types.ModuleType("generated")
    exec("import torch\nclass Net(torch.nn.Sequential): pass", generated.__dict__)
    monkeypatch.setitem(sys.modules, "generated", generated)
    dense = generated.Net(*mlp())
    result = export(saved(tmp_path), torch.zeros(1, 1, 4, 4), tmp_path, PROVENANCE, dense=dense)
    assert result.refused == {} and offered(result)["safetensors"].max_error == 0
    why = "ModuleNotFoundError: No module named 'generated'"
    assert {name: one.not_fresh for name, one in offered(result).items()} == {
        **{"pt2": "", "onnx": "", "safetensors": why}
    }
    assert (
        f"was checked in the process that wrote it, not in a fresh one: {why}"
        in (tmp_path / "README.md").read_text()
    )


def test_a_captured_program_gives_the_file_that_its_model_gives(tmp_path):
    model, batch = mlp().eval(), torch.zeros(2, 1, 4, 4)
    for name, program in (("model", None), ("program", capture(model, batch))):
        with quietly():
            write_onnx(model, batch, tmp_path / name, program)
    assert (tmp_path / "program").read_bytes() == (tmp_path / "model").read_bytes()


def test_a_model_that_cannot_be_captured_for_pt2_may_still_go_to_onnx(tmp_path, monkeypatch):
    def refuse(model, batch):
        raise RuntimeError("no such graph\nand much advice")

    monkeypatch.setattr("autocompress.export.capture", refuse)
    result = export(mlp(), IMAGE[..., :4, :4], tmp_path, PROVENANCE)
    assert list(offered(result)) == ["onnx", "safetensors"]
    assert result.refused == {"pt2": "RuntimeError: no such graph"}


def test_a_file_that_answers_otherwise_is_refused(tmp_path, monkeypatch):
    def write_another(model, batch, path, program):
        model = copy.deepcopy(model)
        model[3].weight.data *= 1.001
        write_onnx(model, batch, path)

    monkeypatch.setattr("autocompress.export.write_onnx", write_another)
    result = export(mlp(), IMAGE[..., :4, :4], tmp_path, PROVENANCE)
    assert list(offered(result)) == ["pt2", "safetensors"]
    assert re.fullmatch(r"its logits differ by \S+e-04 of the largest, .*", result.refused["onnx"])
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize(
    ("found", "error"),
    [
        ([[1.0, -4.0]], 0.0),
        ([[2.0, -4.0]], 0.25),
        ([[np.nan, -4.0]], "the logits are not all finite"),
        ([[1.0]], "gave outputs of shape (1, 1), the model (1, 2)"),
        ("it crashed", "it crashed"),
    ],
)
def test_error_is_relative_to_the_largest_logit(found, error):
    answer = found if isinstance(found, str) else [np.array(found)]
    assert _error(answer, [np.array([[1.0, -4.0]])]) == error


def test_a_reason_that_announces_another_says_that():
    with pytest.raises(RuntimeError) as caught:
        mlp().load_state_dict({})
    assert reason(caught.value).endswith(
        'for Sequential: Missing key(s) in state_dict: "1.weight", "1.bias", "3.weight", "3.bias".'
    )


def test_the_root_cause_is_the_reason(tmp_path):
    class Eigenvalues(nn.Module):
        def forward(self, x):
            return torch.linalg.eigvalsh(x)

    with pytest.raises(Exception) as caught:
        write_onnx(Eigenvalues().eval(), torch.zeros(2, 3, 3), tmp_path / "model.onnx")
    assert "No ONNX function found" in reason(caught.value)


@pytest.mark.slow
def test_integer_inputs(tmp_path):
    model = nn.Sequential(nn.Embedding(20, 4), nn.Flatten(), nn.Linear(24, 3))
    result = export(model, torch.arange(6)[None], tmp_path, PROVENANCE)
    assert result.refused == {}
    assert "int64 of shape (batch, 6)" in (tmp_path / "README.md").read_text()


def test_an_input_that_is_no_batch_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="must be a batch"):
        export(mlp(), torch.zeros(16), tmp_path, PROVENANCE)


def test_a_process_that_dies_is_reported(tmp_path, monkeypatch, from_nothing):
    crash = tmp_path / "crash.py"
    crash.write_text("raise SystemExit('no memory left')")
    monkeypatch.setattr(parity, "__file__", str(crash))
    with parity.FreshProcess(tmp_path, [np.zeros(1)]) as process:
        process._python._process.wait()
        process.start("pt2", tmp_path / "model.pt2")
        answers = process.finish(["pt2"])
    assert answers == {"pt2": "the process that ran it died with code 1: no memory left"}


QUICK = """
import json, os, pathlib, sys
for line in sys.stdin:
    match json.loads(line):
        case str(said):
            folder = pathlib.Path(said)
        case [name, _] | {"format": name}:
            (folder / f"{name}.said").write_text(str(os.getpid()))
            (folder / f"{name}.said").replace(folder / f"{name}.error")
"""  # answers who it is, without the imports of the real one


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """Fresh processes that answer who they are, and none that waits."""
    monkeypatch.setattr(parity, "_waiting", [])
    script = tmp_path / "quick.py"
    script.write_text(QUICK)
    monkeypatch.setattr(parity, "__file__", str(script))
    yield
    for python in parity._waiting:
        python.end()


def have_waiting(folder) -> int:
    """Has a process wait; the number of the one that does."""
    parity.have_waiting(folder, {"pt2": folder / "model.pt2"}, [np.zeros(1)])
    (python,) = [one for one in parity._waiting if not one.knows]
    return python._process.pid


def who_runs(folder) -> tuple[int, int]:
    """The processes that run a file and, after it, a call; what they have exchanged is removed."""
    with (
        tempfile.TemporaryDirectory(dir=folder) as exchange,
        parity.FreshProcess(Path(exchange), [np.zeros(1)]) as process,
    ):
        process.start("pt2", folder / "model.pt2")
        process.start_call("safetensors", b"")
        answers = process.finish(["pt2", "safetensors"])
    return int(answers["pt2"]), int(answers["safetensors"])


def test_processes_wait_for_one_export_after_the_other(tmp_path, quick):
    first = have_waiting(tmp_path)
    assert have_waiting(tmp_path) == first  # one is enough
    assert who_runs(tmp_path) == (first, first)
    second = have_waiting(tmp_path)  # the first may have imported autocompress
    assert second != first
    assert who_runs(tmp_path) == who_runs(tmp_path) == (second, first)
    assert have_waiting(tmp_path) == second


def test_a_process_that_nobody_has_wait_is_ended(tmp_path, quick):
    (first, _), (second, _) = who_runs(tmp_path), who_runs(tmp_path)
    assert first != second and not parity._waiting


def test_a_process_that_died_or_is_stuck_while_it_waited_is_not_used(tmp_path, quick, monkeypatch):
    died = have_waiting(tmp_path)
    (python,) = parity._waiting
    python._process.kill()
    while python.is_alive:
        time.sleep(0.01)
    assert died not in who_runs(tmp_path) and not parity._waiting
    stuck = tmp_path / "stuck.py"
    stuck.write_text("import sys\nfor line in sys.stdin:\n    pass\n")
    with monkeypatch.context() as context:
        context.setattr(parity, "__file__", str(stuck))
        have_waiting(tmp_path)
    (python,) = parity._waiting
    monkeypatch.setattr(parity, "GETS_READY_S", 0.1)
    assert python._process.pid not in who_runs(tmp_path) and not python.is_alive


def test_a_process_that_has_not_answered_does_not_wait_again(tmp_path, quick):
    waiting = have_waiting(tmp_path)
    with pytest.raises(KeyboardInterrupt), parity.FreshProcess(tmp_path, [np.zeros(1)]) as process:
        process._python.ask("onnx", 0)  # to which it says nothing
        raise KeyboardInterrupt
    assert not parity._waiting and have_waiting(tmp_path) != waiting


def test_a_file_that_cannot_be_loaded_is_reported(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with parity.FreshProcess(tmp_path, [np.zeros((1, 1))]) as process:
        process.start("onnx", tmp_path / "model.onnx")
        (answer,) = process.finish(["onnx"]).values()
    assert isinstance(answer, str) and "model.onnx" in answer


def saved(directory):
    dense = mlp()
    scheme = HalvesHidden()
    theta = scheme.pi({}, 0.5, None)
    realized = scheme.realize(dense, theta, None)
    directory.mkdir(exist_ok=True)
    bundle.save(realized, torch.zeros(1, 1, 4, 4), directory, PROVENANCE)
    return realized


def test_a_plan_that_is_not_json_is_an_error(tmp_path):
    provenance = replace(PROVENANCE, plan={"kept": np.float32(1)})
    with pytest.raises(ValueError, match="the plan and the results must be JSON"):
        bundle.save(mlp(), torch.zeros(1, 1, 4, 4), tmp_path, provenance)


@pytest.mark.parametrize("score", [np.float32(0.5), float("nan")])
def test_results_that_are_not_json_are_an_error_and_leave_the_plan_as_it_was(tmp_path, score):
    saved(tmp_path)
    before = (tmp_path / "plan.json").read_bytes()
    with pytest.raises(ValueError, match="the plan and the results must be JSON"):
        bundle.add_results(tmp_path, {"val": score})
    assert (tmp_path / "plan.json").read_bytes() == before


def test_load_gives_the_module_back(tmp_path):
    realized = saved(tmp_path)
    dense = mlp().train()
    again = load(tmp_path, dense)
    x = torch.randn(3, 1, 4, 4)
    assert torch.equal(again(x), realized(x))
    assert not again.training and dense.training and dense[1].out_features == 6
    assert torch.equal(load(tmp_path, dense, x[:1])(x), realized(x))


def test_load_does_not_warn_again_of_layers_left_whole(tmp_path, monkeypatch):
    realized = saved(tmp_path)
    monkeypatch.setattr(HalvesHidden, "analyze", lambda *_: warnings.warn("left at full width", stacklevel=2))
    x = torch.randn(3, 1, 4, 4)
    assert torch.equal(load(tmp_path, mlp())(x), realized(x))  # a warning would be an error


def test_save_takes_negative_zeros_and_nan(tmp_path):
    model = mlp()
    model[1].weight.data *= -(model[1].weight.data > 0.2).float()
    model[3].weight.data[0, 0] = torch.nan
    bundle.save(model, torch.zeros(1, 1, 4, 4), tmp_path, PROVENANCE)


def test_weights_that_do_not_come_back_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("autocompress.formats.weights.save", lambda state, path: save_weights({}, path))
    with pytest.raises(ValueError, match="does not give back the weights"):
        bundle.save(mlp(), torch.zeros(1, 1, 4, 4), tmp_path, PROVENANCE)


def damage_weights(directory):
    (directory / "model.safetensors").write_bytes(b"another file")


def remove_plan(directory):
    (directory / "plan.json").unlink()


def cut_plan(directory):
    (directory / "plan.json").write_text("{")


def age_plan(directory):
    (directory / "plan.json").write_text('{"format": 7}')


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (damage_weights, r"model\.safetensors is not the file that plan\.json describes"),
        (remove_plan, r"there is no .*plan\.json"),
        (cut_plan, r"plan\.json is not JSON"),
        (age_plan, r"plan\.json has format 7; this version of autocompress reads 1"),
    ],
)
def test_load_refuses_damaged_files_in_one_line(harm, message, tmp_path):
    saved(tmp_path)
    harm(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path, mlp())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("other", [mlp(hidden=4), TinyConvNet(), nn.Sequential(mlp())])
def test_load_refuses_another_architecture_in_one_line(other, tmp_path):
    saved(tmp_path)
    with pytest.raises(ValueError, match="model= must have the architecture") as caught:
        load(tmp_path, other)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_pruned_resnet18(tmp_path):
    import torch_pruning
    from torchvision.models import resnet18

    torch.manual_seed(0)
    model = resnet18(num_classes=10).eval()
    x = torch.randn(1, 3, 64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the pruner's own deprecations are not what is tested
        importance = torch_pruning.importance.MagnitudeImportance()
        torch_pruning.pruner.MagnitudePruner(
            model,
            (x,),
            importance,
            pruning_ratio=0.75,
            ignored_layers=[model.fc],
            in_channel_groups={},
            out_channel_groups={},
            num_heads={},
        ).step()
    result = export(model, x, tmp_path, PROVENANCE)
    assert result.refused == {}
    check_any_batch(tmp_path, model, 1e-4, shape=(3, 64, 64))
