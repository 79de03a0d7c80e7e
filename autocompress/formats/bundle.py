"""The compressed module on disk: ``model.safetensors``, and ``plan.json`` that says how to rebuild it.

For whoever wants the module itself, to fine-tune it or to measure it again. Nothing is pickled.
"""

import copy
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.formats import weights
from autocompress.formats.parity import Arrays, reason
from autocompress.processes.parcel import pack
from autocompress.scheme import Facts, Scheme, Theta, Weights, parse_scheme, register_scheme

WEIGHTS, PLAN = "model.safetensors", "plan.json"
PLAN_FORMAT = 1
MOST_INPUTS = 10**8  # numbers in a sample
_NEEDED: dict[str, tuple[type, ...]] = {
    "scheme": (str,),
    "density": (float, int),
    "architecture": (str, dict, type(None)),
    "input": (dict,),
    "plan": (dict,),
}


@dataclass(frozen=True)
class Provenance:
    """Where a model comes from; written beside it, and needed to rebuild it.

    Attributes:
        scheme: What `autocompress.scheme.parse_scheme` reads, e.g. ``"StructPrune+Quantize16"``.
        plan: `Theta.plan` of the model: JSON types only.
        density: Parameters kept over parameters of the dense model.
        task: The task's name.
        architecture: How the dense architecture can be made again, where that is known.
        classes: Names of the logits, in order.
        preprocessing: What was done to a sample before the model saw it, in words.
        input: The same for programs: JSON types only.
        kinds: The classes that the scheme is made of: those of a script or a file are known to no other process.
    """

    scheme: str
    plan: Mapping[str, Any]
    density: float
    task: str
    architecture: str | Mapping[str, Any] | None = None
    classes: Sequence[str] = ()
    preprocessing: str = ""
    input: Mapping[str, Any] = field(default_factory=dict)
    kinds: Sequence[type[Scheme]] = ()


def save(model: nn.Module, sample: Tensor, directory: Path, provenance: Provenance) -> None:
    """Writes ``model.safetensors`` and ``plan.json``.

    Args:
        model: The realized model.
        sample: A batch of one sample, for its shape and type.
        directory: An existing directory.
        provenance: Where the model comes from.

    Raises:
        ValueError: If the file does not give back each weight, or ``provenance`` is not JSON.
    """
    path = directory / WEIGHTS
    state = model.state_dict()
    weights.save(state, path)
    found = weights.load(path)
    if found.keys() != state.keys() or not all(_same(found[name], state[name]) for name in state):
        raise ValueError(f"{path.name} does not give back the weights that were saved")
    plan = {
        "format": PLAN_FORMAT,
        "scheme": provenance.scheme,
        "density": provenance.density,
        "task": provenance.task,
        "architecture": provenance.architecture,
        "classes": list(provenance.classes),
        "preprocessing": provenance.preprocessing,
        "dtype": dtype_name(next(model.parameters()).dtype),
        "input": {"shape": list(sample.shape), "dtype": dtype_name(sample.dtype), **provenance.input},
        "sha256": _sha256(path),
        "versions": {name: version(name) for name in ("autocompress", "torch")},
        "results": {},
        "plan": dict(provenance.plan),
    }
    _write_plan(plan, directory / PLAN)


def add_results(directory: Path, results: Mapping[str, Any]) -> None:
    """Adds to ``plan.json`` what was found out about the model since `save`, such as its metric on val and test.

    Args:
        directory: Where `save` wrote.
        results: JSON types only.

    Raises:
        ValueError: If they are not.
    """
    plan = json.loads((directory / PLAN).read_text(encoding="utf-8"))
    _write_plan(plan | {"results": dict(results)}, directory / PLAN)


def _write_plan(plan: Mapping[str, Any], path: Path) -> None:
    try:
        # One key a line: a plan lists thousands of channels, and the rest should stay readable.
        lines = [f"  {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in plan.items()]
    except (TypeError, ValueError) as error:  # the latter: it is no finite number
        raise ValueError(f"the plan and the results must be JSON: {error}") from None
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def load(directory: Path, model: nn.Module | None = None, example_input: Tensor | None = None) -> nn.Module:
    """The compressed module from where `save`, or `autocompress.export.export`, wrote.

    Otherwise as `autocompress.load`, which knows studies as well.
    """
    plan = read_plan(directory)
    if model is None:
        model = _known_architecture(plan["architecture"], directory)
    scheme = parse_scheme(plan["scheme"], run_files=False)  # it may come from elsewhere
    if example_input is None:
        example_input = _zeros(plan["input"], directory / PLAN)
    dense = copy.deepcopy(model).cpu().eval()
    state = weights.load(directory / WEIGHTS)
    try:
        facts = scheme.analyze(dense, example_input)
        return rebuild(scheme, dense, facts, plan["plan"], plan["density"], state)
    except Exception as error:  # what does not fit may fail anywhere on the way, in a third party's scheme too
        named = f" ({plan['architecture']})" if plan["architecture"] else ""
        raise ValueError(
            f"model= must have the architecture that {directory} was compressed from{named}: {reason(error)}"
        ) from error


def rebuild(
    scheme: Scheme, dense: nn.Module, facts: Facts, plan: Mapping[str, Any], density: float, state: Weights
) -> nn.Module:
    """A realized model from what was saved of it, in eval mode on the device of ``dense``.

    Args:
        scheme: How it was compressed.
        dense: The dense architecture with any weights; not changed.
        facts: What the scheme found out about it.
        plan: `Theta.plan` of the model.
        density: Its density.
        state: Its state dict.
    """
    kept = round(density * sum(p.numel() for p in dense.parameters()))
    realized = scheme.realize(dense, Theta(values={}, support={}, kept=kept, plan=plan), facts)
    realized.load_state_dict(state)
    return realized.eval()


def checking_call(directory: Path, provenance: Provenance, dense: nn.Module) -> bytes:
    """`answers_of` what was saved, for a fresh process: the function and all but its last argument, pickled.

    Raises:
        Exception: Whatever an object of the user's raises that cannot be pickled.
    """
    # What can be made by its name must be: whoever loads it later has no other.
    model = dense if provenance.architecture is None else None
    return pack((answers_of, (directory, model, provenance.kinds)))


def answers_of(directory: Path, model: nn.Module | None, kinds: Sequence[type[Scheme]], inputs: Arrays) -> Arrays:
    """What the module of `load` gives for the inputs, an array for each.

    Args:
        directory: As for `load`.
        model: As for `load`.
        kinds: See `Provenance`.
        inputs: Batches.

    Raises:
        ValueError: As `load`.
    """
    for kind in kinds:
        register_scheme(kind)
    try:
        loaded = load(directory, model)
    except ValueError as error:
        raise ValueError(str(error)) from None  # what it says is more to the point than what caused it
    with torch.inference_mode():
        return [loaded(torch.from_numpy(x)).float().numpy() for x in inputs]


def _known_architecture(description: str | Mapping[str, Any] | None, directory: Path) -> nn.Module:
    from autocompress.models import build  # torchvision takes a second to import

    if description is None:
        raise ValueError(
            f"{directory} was compressed from an architecture of your own; pass model=, its dense form"
        )
    return build(description)


def _zeros(described: Mapping[str, Any], where: Path) -> Tensor:
    """An input as the plan describes it."""
    shape, dtype = described.get("shape"), getattr(torch, str(described.get("dtype")), None)
    sizes = shape if isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape) else []
    if not 0 < math.prod(sizes) <= MOST_INPUTS or not sizes or not isinstance(dtype, torch.dtype):
        raise ValueError(
            f"{where} is damaged: {dict(described)} does not describe an input; export the model again"
        )
    return torch.zeros(sizes, dtype=dtype)


def read_plan(directory: Path) -> dict[str, Any]:
    """What ``plan.json`` says, once it is known to belong to the weights beside it."""
    path, stored = directory / PLAN, directory / WEIGHTS
    for file in (path, stored):
        if not file.is_file():
            raise ValueError(f"there is no {file}; name a directory that autocompress exported to")
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); export the model again") from None
    if not isinstance(plan, dict) or plan.get("format") != PLAN_FORMAT:
        found = plan.get("format") if isinstance(plan, dict) else None
        raise ValueError(f"{path} has format {found}; this version of autocompress reads {PLAN_FORMAT}")
    if _sha256(stored) != plan.get("sha256"):
        raise ValueError(f"{stored} is not the file that {PLAN} describes (sha256); export the model again")
    for key, types in _NEEDED.items():
        if not isinstance(plan.get(key), types):
            raise ValueError(f"{path} is damaged: {key} is {plan.get(key)!r}; export the model again")
    return {"architecture": None, **plan}


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def _same(found: Tensor, tensor: Tensor) -> bool:
    """Whether two tensors hold the same values; NaN is the same as NaN, and -0.0 as 0.0."""
    tensor = tensor.detach().cpu()
    if found.dtype != tensor.dtype or found.shape != tensor.shape:
        return False
    return bool(((found == tensor) | ((found != found) & (tensor != tensor))).all())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
