"""Exports a compressed model to files that run without autocompress.

``model.pt2`` needs torch alone, ``model.onnx`` ONNX Runtime alone; both take any batch size. On request there is
``model.pte`` for ExecuTorch. ``model.safetensors`` and ``plan.json`` restore the module itself, see
`autocompress.formats.bundle`. Each file is run in a fresh process, and is offered only if its outputs are the
model's.
"""

import copy
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from autocompress import progress
from autocompress.arguments import listing
from autocompress.formats import bundle
from autocompress.formats.bundle import Provenance
from autocompress.formats.executorch_export import check_executorch, write_pte
from autocompress.formats.instructions import FILES, instructions
from autocompress.formats.onnx_export import capture, quietly, weight_dtype, write_onnx
from autocompress.formats.parity import Arrays, FreshProcess, Undelivered, have_waiting, reason
from autocompress.networks.deployed import deployed

ON_REQUEST = ("executorch",)  # formats that are not always written
TOLERANCE = 1e-4  # largest `Artifact.max_error` of a model in float32
TOLERANCE_FEWER_BITS = 5e-2  # and of one in 16 or 8 bits


@dataclass(frozen=True)
class Artifact:
    """One exported file that has been checked.

    Attributes:
        format: ``"pt2"``, ``"onnx"``, ``"executorch"`` or ``"safetensors"``.
        path: The file.
        size_bytes: Its size on disk.
        max_error: The largest difference of a logit from the model's, relative to the largest logit.
        not_fresh: Why it was checked in this process and not in a fresh one, in one line; usually empty.
    """

    format: str
    path: Path
    size_bytes: int
    max_error: float
    not_fresh: str = ""


@dataclass(frozen=True)
class Staged:
    """Files that were written to a temporary folder and checked, for `publish` to move into place.

    Attributes:
        folder: The temporary folder.
        errors: `Artifact.max_error` of each format that passed its check.
        refused: The reason, in one line, of each format that did not.
        not_fresh: `Artifact.not_fresh` by format, where it is not empty.
    """

    folder: Path
    errors: Mapping[str, float]
    refused: Mapping[str, str]
    not_fresh: Mapping[str, str]


@dataclass(frozen=True)
class Export:
    """The files that `export` wrote, and for each format that it did not offer, the reason in one line."""

    artifacts: tuple[Artifact, ...]
    refused: Mapping[str, str]


def check_formats(formats: str | Sequence[str]) -> tuple[str, ...]:
    """Checks the formats of `ON_REQUEST` that a user asks for, and returns them without duplicates.

    Raises:
        ValueError: If there is no such format, or the package that writes it is not installed.
    """
    formats = listing(formats)
    if unknown := [name for name in formats if name not in ON_REQUEST]:
        raise ValueError(f"there is no format {unknown[0]!r} to ask for; there is {', '.join(ON_REQUEST)}")
    if "executorch" in formats:
        check_executorch()
    return tuple(dict.fromkeys(formats))


def export(
    model: nn.Module,
    example_input: Tensor,
    directory: Path,
    provenance: Provenance,
    *,
    dense: nn.Module | None = None,
    formats: Sequence[str] = (),
    tolerance: float | None = None,
) -> Export:
    """Writes the model in every format, checks each file, and keeps those whose outputs are the model's.

    BatchNorm is folded in ``model.pt2`` and ``model.onnx``, which are for inference; ``model.safetensors`` has it
    as it was trained.

    Files appear in ``directory`` one by one, each complete; those of an earlier export are replaced. It is
    `stage`, then `publish`.

    Args:
        model: See `stage`, as for all other arguments.
        example_input: A batch of at least one sample.
        directory: The folder to write to; created if it does not exist.
        provenance: What ``plan.json`` and ``README.md`` record about the model.
        dense: Any instance of the dense architecture.
        formats: Formats to write in addition.
        tolerance: The largest `Artifact.max_error` to accept.

    Raises:
        ValueError: If ``example_input`` is not a batch, or a format cannot be written here.
    """
    staging = directory / ".export"
    try:
        staged = stage(
            model, example_input, staging, provenance, dense=dense, formats=formats, tolerance=tolerance
        )
        return publish(staged, directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def stage(
    model: nn.Module,
    example_input: Tensor,
    folder: Path,
    provenance: Provenance,
    *,
    dense: nn.Module | None = None,
    formats: Sequence[str] = (),
    tolerance: float | None = None,
) -> Staged:
    """Writes the files of `export` to a temporary folder and checks them: the slow part of it.

    Args:
        model: The realized model, which maps a batch to logits of shape ``(n, classes)``. It is not changed.
        example_input: A batch of at least one sample. None of it is stored.
        folder: The folder to write to; its contents are deleted first.
        provenance: What ``plan.json`` and ``README.md`` record about the model.
        dense: Any instance of the dense architecture, from which the module is rebuilt with ``model.safetensors``
            to compare its outputs. Without it only the weights are compared.
        formats: Formats to write in addition, see `check_formats`.
        tolerance: The largest `Artifact.max_error` to accept. By default 1e-4; 5e-2 for a model in 16 bits, whose
            ONNX file has the same weights but computes in float32, and for one in 8 bits, whose activations may be
            rounded to either of two neighbouring steps.

    Raises:
        ValueError: As `export`.
    """
    formats = check_formats(formats)
    if example_input.ndim < 2 or len(example_input) == 0:
        raise ValueError(f"example_input= must be a batch (n, ...), not of shape {tuple(example_input.shape)}")
    # Channels last is for speed; exporters support the contiguous layout best.
    stored = copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format).eval().requires_grad_(False)
    if tolerance is None:
        tolerance = TOLERANCE if weight_dtype(stored) == torch.float32 else TOLERANCE_FEWER_BITS
    shutil.rmtree(folder, ignore_errors=True)  # files of another model, or of an export that was killed
    folder.mkdir(parents=True)
    probes = _probes(example_input.detach().cpu())
    with torch.inference_mode():
        expected = [stored(x).float().numpy() for x in probes]
    outputs, not_fresh = _write_all(stored, probes, folder, provenance, dense, formats)
    # Without ``dense``, model.safetensors has no outputs; `bundle.save` has compared its weights.
    errors = {"safetensors": 0.0} | {name: _error(found, expected) for name, found in outputs.items()}
    refused = {name: why for name, error in errors.items() if (why := _refusal(error, tolerance))}
    integers = weight_dtype(stored) == torch.int8
    readme = instructions(errors, probes[0], expected[0].shape[-1], provenance, refused, integers, not_fresh)
    (folder / "README.md").write_text(readme, encoding="utf-8")
    passed = {name: float(errors[name]) for name in FILES if name in errors and name not in refused}
    return Staged(folder, passed, refused, not_fresh)


def publish(
    staged: Staged, directory: Path, results: Mapping[str, Any] | None = None, advice: Sequence[str] = ()
) -> Export:
    """Moves staged files into place and removes files of other formats that an earlier export left.

    Args:
        staged: The result of `stage`; its files are moved.
        directory: The folder to move to, on the same file system; created if it does not exist.
        results: Further entries of ``plan.json``, such as the metric on val and test: JSON types only.
        advice: Further paragraphs of ``README.md``, such as the decision threshold.
    """
    directory.mkdir(parents=True, exist_ok=True)
    is_staged = {file: name in staged.errors for name, file in FILES.items()}
    is_staged |= {bundle.PLAN: "safetensors" in staged.errors, "README.md": True}
    if results and is_staged[bundle.PLAN]:
        bundle.add_results(staged.folder, results)
    with (staged.folder / "README.md").open("a", encoding="utf-8") as readme:
        readme.writelines(f"\n{paragraph}\n" for paragraph in advice)
    for file, staged_now in is_staged.items():
        if staged_now:
            (staged.folder / file).replace(directory / file)
        else:
            (directory / file).unlink(missing_ok=True)
    artifacts = []
    for name, error in staged.errors.items():
        path = directory / FILES[name]
        artifacts.append(Artifact(name, path, path.stat().st_size, error, staged.not_fresh.get(name, "")))
    return Export(tuple(artifacts), staged.refused)


def export_dense(model: nn.Module, example_input: Tensor, folder: Path) -> None:
    """Writes a model in its deployed form, unchecked. It also warms up the exporters for the next export.

    Args:
        model: The model; it is not changed.
        example_input: A batch of at least one sample.
        folder: The folder to write ``model.pt2`` and ``model.onnx`` to; created if it does not exist.
    """
    plain = copy.deepcopy(deployed(model, example_input)).cpu().to(memory_format=torch.contiguous_format).eval()
    traced = torch.zeros_like(_probes(example_input[:1].detach().cpu())[-1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, write in _writers(plain, traced, capture(plain, traced)).items():
        unfinished = folder / f".{FILES[name]}"
        write(unfinished)
        unfinished.replace(folder / FILES[name])
    have_checker(folder, example_input)


def have_checker(folder: Path, example_input: Tensor) -> None:
    """Starts a process that waits to check the next export, warmed up by running the files of `export_dense`.

    Args:
        folder: The folder that `export_dense` has written to.
        example_input: A batch of at least one sample for these files.
    """
    files = {name: folder / FILES[name] for name in ("pt2", "onnx")}
    have_waiting(folder, files, [_probes(example_input[:1].detach().cpu())[-1].numpy()])


def _probes(example: Tensor) -> list[Tensor]:
    """Random batches of one and of five samples, in the range of the example's values."""
    generator = torch.Generator().manual_seed(0)
    probes = []
    for n in (1, 5):
        x = example[:1].expand(n, *example.shape[1:])
        if x.dtype.is_floating_point:
            spread = x.float().std(correction=0).item() or 1.0
            noise = torch.randn(x.shape, generator=generator)
            probes.append((x.float().mean() + spread * noise).to(x.dtype))
        else:
            order = torch.rand(x.shape, generator=generator).flatten(1).argsort(1)
            probes.append(x.flatten(1).gather(1, order).reshape(x.shape))
    return probes


def _write_all(
    model: nn.Module,
    probes: Sequence[Tensor],
    folder: Path,
    provenance: Provenance,
    dense: nn.Module | None,
    formats: Sequence[str],
) -> tuple[dict[str, Arrays | str], dict[str, str]]:
    """Writes every format into ``folder`` and runs each file in a fresh process.

    Returns:
        By format, the outputs on ``probes`` or the reason why there are none, and `Artifact.not_fresh`. Without
        ``dense`` there are no outputs of ``model.safetensors``.
    """
    # Zeros: exporters may store the input that they trace with, and the user's data must not be shipped.
    traced = torch.zeros_like(probes[-1])
    # A copy, because `bundle.save` needs ``model`` unchanged; in the layout that exporters support best.
    plain = copy.deepcopy(deployed(model, probes[0])).to(memory_format=torch.contiguous_format)
    outputs: dict[str, Arrays | str] = {}
    try:
        with quietly():
            program = capture(plain, traced)
    except Exception as error:  # whatever torch.export raises for a model that it does not support
        program, outputs["pt2"] = None, reason(error)
    writers = _writers(plain, traced, program)
    if "executorch" in formats:
        writers["executorch"] = lambda path: write_pte(plain, traced, path)
    # Last, because its check imports autocompress, and the other files must be checked in a process without it.
    writers["safetensors"] = lambda path: bundle.save(model, probes[0], path.parent, provenance)
    inputs = [x.numpy() for x in probes]
    not_fresh: dict[str, str] = {}
    with FreshProcess(folder, inputs) as fresh_process:
        for done, (name, write) in enumerate(writers.items()):
            progress.report(done / (len(writers) + 1))  # waiting for the fresh process is the last step
            try:
                with quietly():
                    write(folder / FILES[name])
            except Exception as error:  # an exporter may raise anything; only this format is lost
                outputs[name] = reason(error)
            else:
                if name != "safetensors":
                    fresh_process.start(name, folder / FILES[name])
        progress.report(len(writers) / (len(writers) + 1))
        outputs |= fresh_process.finish([name for name in writers if name not in (*outputs, "safetensors")])
        if dense is not None and "safetensors" not in outputs:
            outputs["safetensors"], why_here = _run_rebuilt(fresh_process, folder, provenance, dense, inputs)
            not_fresh |= {"safetensors": why_here} if why_here else {}
    return outputs, not_fresh


def _writers(
    model: nn.Module, batch: Tensor, program: ExportedProgram | None
) -> dict[str, Callable[[Path], None]]:
    """Functions that write ``model.pt2``, if there is an exported program, and ``model.onnx``, by format."""
    onnx: dict[str, Callable[[Path], None]] = {"onnx": lambda path: write_onnx(model, batch, path, program)}
    return onnx if program is None else {"pt2": lambda path: _write_pt2(program, path)} | onnx


def _run_rebuilt(
    fresh_process: FreshProcess, folder: Path, provenance: Provenance, dense: nn.Module, inputs: Arrays
) -> tuple[Arrays | str, str]:
    """Runs the module rebuilt from ``folder``, in this process if it cannot be run in the fresh one.

    Returns:
        Its outputs or the reason why there are none, and `Artifact.not_fresh`.
    """
    try:
        call = bundle.checking_call(folder, provenance, dense)
    except Exception as error:  # whatever a user's object raises that cannot be pickled
        why_here = reason(error)
    else:
        fresh_process.start_call("safetensors", call)
        outputs = fresh_process.finish(["safetensors"])["safetensors"]
        if not isinstance(outputs, Undelivered):
            return outputs, ""
        why_here = str(outputs)
    try:
        return bundle.answers_of(folder, dense, provenance.kinds, inputs), why_here
    except Exception as error:
        return reason(error), why_here


def _write_pt2(program: ExportedProgram, path: Path) -> None:
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # it quotes the user's source code and its path
    program.example_inputs = None
    torch.export.save(program, path)


def _error(found: Arrays | str, expected: Arrays) -> float | str:
    """The largest difference relative to the largest logit; or the reason why there is no such number."""
    if isinstance(found, str):
        return found
    if [a.shape for a in found] != [a.shape for a in expected]:
        return f"gave outputs of shape {found[-1].shape}, the model {expected[-1].shape}"
    if not all(np.isfinite(a).all() for a in (*found, *expected)):
        return "the logits are not all finite"
    scale = max(float(np.abs(a).max()) for a in expected) or 1.0
    return max(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True)) / scale


def _refusal(error: float | str, tolerance: float) -> str | None:
    """The reason, in words, to refuse a file with this error; None to accept it."""
    if isinstance(error, str):
        return error
    too_far = f"its logits differ by {error:.1e} of the largest, more than the {tolerance:.0e} allowed"
    return None if error <= tolerance else too_far
