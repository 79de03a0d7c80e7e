"""The product on a stand-in for a GPU, see second_device.py: it finds what it finds on the CPU."""

import copy
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import autocompress as ac
from autocompress.lc import LearningCompression
from autocompress.recovery import make_recovery
from autocompress.scheme import parse_scheme
from autocompress.sweeping import load_model
from autocompress.task import Task
from autocompress.trial import Bound, TrialResult, TrialSpec, run_trial

MakeSpec = Callable[..., TrialSpec]
Second = Callable[[], AbstractContextManager[None]]
CRITERIA = ("l1", "lamp", "taylor", "bn_scale", "fpgm", "activation", "hrank", "beta_rank", "random")


@pytest.fixture
def attentive(tiny_task: Task) -> Task:
    """The tiny task's images, their rows as tokens: a convolution, attention, LayerNorm, a hidden layer."""

    class Attentive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(1, 16, (1, 8))
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
            self.norm = nn.LayerNorm(16)
            self.mlp = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
            self.head = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.embed(x).flatten(2).transpose(1, 2)
            tokens = self.norm(tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0])
            return self.head((tokens + self.mlp(tokens)).mean(1))

    torch.manual_seed(0)
    return Task(Attentive(), tiny_task.train, tiny_task.val, tiny_task.test, name="tokens")


def on_both(
    make_spec: MakeSpec, second_device: Second, task: Task, *, analyzed_on: str = "cuda", **asked: object
) -> tuple[TrialResult, ...]:
    """A trial on the CPU and one on the stand-in, with the facts of a model on ``analyzed_on``."""
    here = run_trial(make_spec(task=task, **asked))
    with second_device():
        facts = make_spec(task=task.on(analyzed_on), **asked).facts
        return here, run_trial(make_spec(task=task, **asked, facts=facts, device="cuda"))


def assert_alike(here: TrialResult, there: TrialResult) -> None:
    assert here.model is not None and there.model is not None
    assert there.plan == here.plan
    assert (there.density, there.score, there.feasible) == (here.density, here.score, here.feasible)
    weights = here.model.state_dict()
    for name, value in there.model.state_dict().items():
        torch.testing.assert_close(value, weights[name], rtol=1e-3, atol=1e-4)


SCHEMES_OF = [
    *[f"StructPrune(criterion={criterion})" for criterion in CRITERIA],
    *[f"Prune(criterion={criterion})" for criterion in ("obd", "l2", "taylor", "lamp", "random")],
    *["StructPrune", "FilterPrune", "LowRank", "BlockPrune", "NMPrune"],
    *["Quantize16(dtype=bf16)", "Quantize8", "StructPrune+Quantize8"],
]
# In 16 bits, as GPUs train by default, results would differ.
EXACT = LearningCompression(epochs=4, c_steps=2, lr=0.05, precision="fp32")


@pytest.mark.parametrize("scheme", SCHEMES_OF)
def test_a_trial_is_the_one_of_the_cpu(
    make_spec: MakeSpec, tiny_task: Task, second_device: Second, scheme: str
) -> None:
    parsed = parse_scheme(scheme)
    density = 0.5 if parsed.takes_density else 1.0
    assert_alike(*on_both(make_spec, second_device, tiny_task, scheme=parsed, density=density, recovery=EXACT))


@pytest.mark.parametrize("scheme", ["StructPrune(criterion=hrank)", "LowRank", "PruneQuantize8"])
def test_a_coordinator_without_a_gpu(
    make_spec: MakeSpec, tiny_task: Task, second_device: Second, scheme: str
) -> None:
    """A cluster's workers may have the GPUs alone: the model is analyzed on the CPU then."""
    asked = {"scheme": parse_scheme(scheme), "recovery": EXACT, "analyzed_on": "cpu"}
    assert_alike(*on_both(make_spec, second_device, tiny_task, **asked))


@pytest.mark.parametrize("scheme", ["StructPrune", "NeuronPrune", "Prune", "LowRank", "NMPrune"])
def test_a_network_with_attention(
    make_spec: MakeSpec, attentive: Task, second_device: Second, scheme: str
) -> None:
    parsed = parse_scheme(scheme)
    assert_alike(*on_both(make_spec, second_device, attentive, scheme=parsed, density=0.8, recovery=EXACT))


@pytest.mark.parametrize("method", ["gradual", "iterative", "layerwise", "rewind", "finetune", "none"])
def test_each_recovery(make_spec: MakeSpec, tiny_task: Task, second_device: Second, method: str) -> None:
    settings = {} if method == "none" else {"epochs": 4, "lr": 0.05, "precision": "fp32"}
    asked = {"optimizer": "adamw"} if method == "finetune" else {}
    recovery = make_recovery(method, **settings, **asked)
    assert_alike(*on_both(make_spec, second_device, tiny_task, recovery=recovery))


@pytest.fixture
def scans(striped_file: Callable[..., str]) -> str:
    """A file of images of three classes, two of them rare."""
    sizes = {"train": 64, "val": 33, "test": 33}
    return striped_file(**{part: np.minimum(np.arange(n) % 7, 2) for part, n in sizes.items()})


def test_images_and_the_training_of_a_dense_model(make_spec: MakeSpec, scans: str, second_device: Second) -> None:
    made = {"train_epochs": 2, "metric": "f1", "balance": "weights", "augment": ("xray",), "batch_size": 16}
    with second_device():
        task = ac.make_task(data=scans, device="cuda", **made)
        assert not next(task.model.parameters()).is_cuda
        found = run_trial(make_spec(task=task, device="cuda", cheap=True, bound=Bound(0.9)))
    assert found.model is not None and np.isfinite(found.score) and found.starts


def test_a_study_to_its_files(tiny_task: Task, tmp_path: Path, second_device: Second) -> None:
    asked = {"max_drop": 0.9, "epochs": 2, "trials": 2, "constraints": ["sensitivity>=0", "params<=1G"]}
    with second_device():
        result = ac.tune(tiny_task, search="criterion=l2,taylor", device="cuda", out=tmp_path, **asked)
    assert result.model(tiny_task.example_input).device.type == "cpu"
    assert all(one.device == "cuda:0 stand-in for a GPU" for one in result.measurements.values())
    assert {one.format for one in result.exported.artifacts} == {"pt2", "onnx", "safetensors"}


def test_a_sweep(tiny_task: Task, tmp_path: Path, second_device: Second) -> None:
    asked = {
        "schemes": ["StructPrune", "Prune"],
        "timing": False,
        "densities": [0.5],
        "epochs": 2,
        "out": tmp_path,
    }
    with second_device():
        found = ac.sweep(tiny_task, **asked, device="cuda")
        assert load_model(found, 1, tiny_task)(tiny_task.example_input).device.type == "cpu"
    assert len(found.trials) == 3 and not found.failed


def test_a_measurement(tiny_task: Task, second_device: Second) -> None:
    with second_device():
        found = ac.measure(tiny_task.model, tiny_task.example_input, "cuda", batch_sizes=(1, 4), budget_s=0.1)
    assert found.device == "cuda:0 stand-in for a GPU"
    assert found.peak_memory_bytes > 2**20 and [one.batch for one in found.latency] == [1, 4]


# The stand-in


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x: x + torch.ones(3), "found at least two devices"),
        (lambda x: nn.Linear(3, 2)(x), "found at least two devices"),
        (lambda x: torch.rand(3, device="cuda", generator=torch.Generator()), "Expected a 'cuda' device type"),
        (lambda x: x.numpy(), "can't convert cuda:0"),
        (lambda x: x.index_fill_(0, torch.tensor([1]), 0.0), "found at least two devices"),
        (lambda x: pickle.dumps(x), "another process"),
    ],
)
def test_it_refuses_what_cuda_refuses(
    second_device: Second, wrong: Callable[[Tensor], object], message: str
) -> None:
    with second_device(), pytest.raises((RuntimeError, TypeError), match=message):
        wrong(torch.arange(3.0).to("cuda"))


def test_it_takes_what_cuda_takes(second_device: Second) -> None:
    with second_device():
        x = torch.arange(4.0, device="cuda", requires_grad=True)
        (x[torch.tensor([1, 2])] * torch.tensor(2.0)).sum().backward()
        assert x.grad is not None and x.grad.is_cuda and x.grad.tolist() == [0.0, 2.0, 2.0, 0.0]
        y = torch.zeros(4)
        y.copy_(x.detach())
        assert not y.is_cuda and torch.equal(y, torch.arange(4.0)) and copy.deepcopy(x).is_cuda
