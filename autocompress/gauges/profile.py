"""The costs of a model on this machine, dense beside compressed, before or after a search."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from autocompress.formats import bundle
from autocompress.gauges.macs import count_params
from autocompress.measurement import Measurement, compare
from autocompress.models import build
from autocompress.scheme import Evidence, Scheme, observe
from autocompress.splits import Batch
from autocompress.task import classification_loss

BUDGET_S = 5.0  # of timing per model, runtime and batch size
CALIBRATION = 16  # samples for schemes that look at data


@dataclass(frozen=True)
class Profiled:
    """Models to be profiled in comparison.

    Attributes:
        models: By name: ``"dense"`` and perhaps ``"compressed"``.
        kept: Parameters of each, as a density counts them.
        sample: A batch of one sample.
    """

    models: Mapping[str, nn.Module]
    kept: tuple[int, ...]
    sample: Tensor


def of_study(best: Path, model: nn.Module | None = None) -> Profiled:
    """The answer of a study, and its dense architecture with random weights (or those of ``model``).

    Args:
        best: The study's folder ``best``.
        model: A model of the dense architecture, where autocompress cannot make it from its name.

    Raises:
        ValueError: If there is no answer, or the architecture is not known.
    """
    plan = bundle.read_plan(best)
    compressed = bundle.load(best, model)
    dense = build(plan["architecture"]) if model is None else model
    sample = torch.zeros(plan["input"]["shape"], dtype=getattr(torch, plan["input"]["dtype"]))
    kept = round(plan["density"] * count_params(dense))
    return Profiled({"dense": dense.eval(), "compressed": compressed}, (count_params(dense), kept), sample)


def check_input(model: nn.Module, sample: Tensor) -> Tensor:
    """Returns the sample if the model accepts it as its input.

    Raises:
        ValueError: If it does not.
    """
    try:
        with torch.inference_mode():
            model.eval()(sample)
    except Exception as error:  # a model may raise anything on an input that it is not made for
        shape, reason = "x".join(map(str, sample.shape[1:])), str(error).partition("\n")[0]
        raise ValueError(
            f"the model does not take an input of shape {shape}: it raised {type(error).__name__}: {reason}"
        ) from error
    return sample


def of_model(model: nn.Module, sample: Tensor, scheme: Scheme | None = None, density: float = 0.25) -> Profiled:
    """A dense model and, if a scheme is given, its compressed form: not trained, to learn what that would cost.

    Args:
        model: The dense model.
        sample: A batch of one sample.
        scheme: How to compress; None for the dense model alone.
        density: The density to compress to, for schemes that take one.

    Raises:
        ValueError: If the scheme cannot compress the model, or not to this density.
    """
    model = model.eval()
    if scheme is None:
        return Profiled({"dense": model}, (count_params(model),), sample)
    facts = scheme.analyze(model, sample)
    evidence = Evidence(model, lambda: _random_batches(model, sample), classification_loss)
    facts = observe(scheme, evidence, facts)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    theta = scheme.pi(weights, density if scheme.takes_density else 1.0, facts)
    masked = copy.deepcopy(model)
    masked.load_state_dict(scheme.delta(theta), strict=False)
    realized = scheme.realize(masked, theta, facts).eval()
    return Profiled({"dense": model, "compressed": realized}, (count_params(model), theta.kept), sample)


def _random_batches(model: nn.Module, sample: Tensor) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(CALIBRATION, *sample.shape[1:], generator=generator)
    with torch.no_grad():
        classes = model(x[:1]).shape[1]
    yield x, torch.randint(classes, (CALIBRATION,), generator=generator)


def profile(
    profiled: Profiled,
    device: str = "cpu",
    *,
    runtimes: Sequence[str] = ("eager",),
    batch_sizes: Sequence[int] = (1, 16),
    budget_s: float = BUDGET_S,
) -> dict[str, Measurement]:
    """Measures the models; returns the measurements by name, see `autocompress.measurement.compare`."""
    measured = compare(
        list(profiled.models.values()),
        profiled.sample,
        device,
        dense_params=profiled.kept[0],
        params=profiled.kept,
        batch_sizes=batch_sizes,
        budget_s=budget_s,
        runtimes=runtimes,
    )
    return dict(zip(profiled.models, measured, strict=True))
