"""The compressed module on disk: ``model.safetensors``, and ``plan.json`` with all that is needed to rebuild it.

It is for users who want the module itself, to fine-tune it or to measure it again. Nothing is pickled.
"""

import copy
import hashlib
import json
import math
import warnings
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
MOST_INPUTS = 10**8  # the most numbers in a sample: a damaged plan must not fill the memory
_NEEDED: dict[str, tuple[type, ...]] = {
    "scheme": (str,),
    "density": (float, int),
    "architecture": (str, dict, type(None)),
    "input": (dict,),
    "plan": (dict,),
}


@dataclass(frozen=True)
class Provenance:
    """The origin of a compressed model; written beside it, and needed to rebuild it.

    Attributes:
        scheme: The scheme as `autocompress.scheme.parse_scheme` reads it, e.g. ``"StructPrune+Quantize16"``.
        plan: `Theta.plan` of the model: JSON types only.
        density: Parameters kept over parameters of the dense model.
        task: The task's name.
        architecture: The arguments of `autocompress.models.build` that make the dense architecture; None where
            they are not known.
        classes: Names of the logits, in order.
        preprocessing: The preprocessing of the model's inputs, in words.
        input: The preprocessing for programs: JSON types only.
        kinds: The classes of the scheme's parts: other processes do not know those from a script or a file.
        several_labels: Whether each logit is of a label that a sample has or has not, beside the others.
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
    several_labels: bool = False


def save(model: nn.Module, sample: Tensor, directory: Path, provenance: Provenance) -> None:
    """Writes ``model.safetensors`` and ``plan.json``.

    Args:
        model: The realized model.
        sample: A batch of one sample, for its shape and type.
        directory: An existing directory.
        provenance: The origin of the model.

    Raises:
        ValueError: If the weights read back differ from the model's, or ``provenance`` is not JSON.
    """
    path = directory / WEIGHTS
    state = model.state_dict()
    weights.save(state, path)
    stored = weights.load(path)
    if stored.keys() != state.keys() or not all(_same(stored[name], state[name]) for name in state):
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
    """Adds results that are known after `save` to ``plan.json``, such as the metric on val and test.

    Args:
        directory: The directory that `save` wrote to.
        results: The results: JSON types only.

    Raises:
        ValueError: If they are not JSON types.
    """
    plan = json.loads((directory / PLAN).read_text(encoding="utf-8"))
    _write_plan(plan | {"results": dict(results)}, directory / PLAN)


def _write_plan(plan: Mapping[str, Any], path: Path) -> None:
    try:
        # One line per key: a plan lists thousands of channels, and the rest should stay readable.
        lines = [f"  {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in plan.items()]
    except (TypeError, ValueError) as error:  # ValueError: a number that is not finite
        raise ValueError(f"the plan and the results must be JSON: {error}") from None
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def load(directory: Path, model: nn.Module | None = None, example_input: Tensor | None = None) -> nn.Module:
    """Loads the compressed module from a directory that `save` or `autocompress.export.export` wrote.

    See `autocompress.load`, which also takes the folder of a study, for arguments and errors.
    """
    plan = read_plan(directory)
    if model is None:
        model = _known_architecture(plan["architecture"], directory)
    scheme = parse_scheme(plan["scheme"], run_files=False)  # the directory may not be trustworthy
    if example_input is None:
        example_input = _zeros(plan["input"], directory / PLAN)
    dense = copy.deepcopy(model).cpu().eval()
    state = weights.load(directory / WEIGHTS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the layers left whole, which the study has noted
            facts = scheme.analyze(dense, example_input)
        return rebuild(scheme, dense, facts, plan["plan"], plan["density"], state)
    except Exception as error:  # an architecture that does not fit may fail anywhere, also in others' schemes
        named = f" ({plan['architecture']})" if plan["architecture"] else ""
        raise ValueError(
            f"model= must have the architecture that {directory} was compressed from{named}: {reason(error)}"
        ) from error


def rebuild(
    scheme: Scheme, dense: nn.Module, facts: Facts, plan: Mapping[str, Any], density: float, state: Weights
) -> nn.Module:
    """Rebuilds a realized model, in eval mode on the device of ``dense``.

    Args:
        scheme: The scheme that it was compressed with.
        dense: A model of the dense architecture with any weights; not changed.
        facts: What the scheme found out about that architecture.
        plan: `Theta.plan` of the realized model.
        density: The realized model's density.
        state: The realized model's state dict.
    """
    kept = round(density * sum(p.numel() for p in dense.parameters()))
    realized = scheme.realize(dense, Theta(values={}, support={}, kept=kept, plan=plan), facts)
    realized.load_state_dict(state)
    return realized.eval()


def checking_call(directory: Path, provenance: Provenance, dense: nn.Module) -> bytes:
    """A call of `answers_of` for a fresh process: the function and all but its last argument, pickled.

    Raises:
        Exception: Any error of an object of the user's that cannot be pickled.
    """
    # An architecture that can be made from its description is, as it will be when users load the model.
    model = dense if provenance.architecture is None else None
    return pack((answers_of, (directory, model, provenance.kinds)))


def answers_of(directory: Path, model: nn.Module | None, kinds: Sequence[type[Scheme]], inputs: Arrays) -> Arrays:
    """Loads a module and runs it on the inputs; returns its logits, an array for each batch.

    Args:
        directory: See `load`.
        model: See `load`.
        kinds: See `Provenance`.
        inputs: Batches.

    Raises:
        ValueError: See `load`.
    """
    for kind in kinds:
        register_scheme(kind)
    try:
        loaded = load(directory, model)
    except ValueError as error:
        raise ValueError(str(error)) from None  # its message is clearer than that of its cause
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
    """A batch of zeros of the shape and type that the plan describes."""
    shape, dtype = described.get("shape"), getattr(torch, str(described.get("dtype")), None)
    sizes = shape if isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape) else []
    if not 0 < math.prod(sizes) <= MOST_INPUTS or not sizes or not isinstance(dtype, torch.dtype):
        raise ValueError(
            f"{where} is damaged: {dict(described)} does not describe an input; export the model again"
        )
    return torch.zeros(sizes, dtype=dtype)


def read_plan(directory: Path) -> dict[str, Any]:
    """Reads ``plan.json``, and checks it and that it belongs to the weights beside it.

    Raises:
        ValueError: If a file is missing or damaged, or the two do not belong together.
    """
    path, stored = directory / PLAN, directory / WEIGHTS
    for file in (path, stored):
        if not file.is_file():
            raise ValueError(f"there is no {file}; name a directory that autocompress exported to")
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); export the model again") from None
    written = plan.get("format") if isinstance(plan, dict) else None
    if not isinstance(plan, dict) or written != PLAN_FORMAT:
        raise ValueError(f"{path} has format {written}; this version of autocompress reads {PLAN_FORMAT}")
    if _sha256(stored) != plan.get("sha256"):
        raise ValueError(f"{stored} is not the file that {PLAN} describes (sha256); export the model again")
    for key, types in _NEEDED.items():
        if not isinstance(plan.get(key), types):
            raise ValueError(f"{path} is damaged: {key} is {plan.get(key)!r}; export the model again")
    return {"architecture": None, **plan}


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def _same(stored: Tensor, tensor: Tensor) -> bool:
    """Whether two tensors hold the same values; NaN equals NaN, and -0.0 equals 0.0."""
    tensor = tensor.detach().cpu()
    if stored.dtype != tensor.dtype or stored.shape != tensor.shape:
        return False
    return bool(((stored == tensor) | ((stored != stored) & (tensor != tensor))).all())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
