"""The deployable artifact: files that run without autocompress.

``model.pt2`` needs torch alone, ``model.onnx`` ONNX Runtime alone; both take any batch size. On request there is
``model.pte`` for ExecuTorch. Beside them lies what gives the module itself back, see
`autocompress.formats.bundle`. Each is run in a fresh process and is offered only if it answers as the model does.
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

ON_REQUEST = ("executorch",)  # of the formats
TOLERANCE = 1e-4
TOLERANCE_FEWER_BITS = 5e-2


@dataclass(frozen=True)
class Artifact:
    """One exported file that has been checked.

    Attributes:
        format: ``"pt2"``, ``"onnx"``, ``"executorch"`` or ``"safetensors"``.
        path: The file.
        size_bytes: Its size on disk.
        max_error: The largest difference of a logit from the model's, relative to the largest logit.
        not_fresh: Why it was checked in the process that wrote it, in one line; empty where a fresh one did.
    """

    format: str
    path: Path
    size_bytes: int
    max_error: float
    not_fresh: str = ""


@dataclass(frozen=True)
class Staged:
    """Files that were written and checked, and are not yet where they are looked for.

    Attributes:
        folder: Where they lie.
        errors: `Artifact.max_error` of each format that is offered.
        refused: For each format that is not, the reason in one line.
        not_fresh: `Artifact.not_fresh` by format, where there is something to say.
    """

    folder: Path
    errors: Mapping[str, float]
    refused: Mapping[str, str]
    not_fresh: Mapping[str, str]


@dataclass(frozen=True)
class Export:
    """What `export` wrote, and for each format that it did not, the reason in one line."""

    artifacts: tuple[Artifact, ...]
    refused: Mapping[str, str]


def check_formats(formats: str | Sequence[str]) -> tuple[str, ...]:
    """Formats to write besides those that are always written.

    Raises:
        ValueError: If there is no such format, or what it needs is not installed.
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
    """Writes the model in every format, checks each, and keeps those that answer as the model does.

    What is there to run, ``model.pt2`` and ``model.onnx``, has BatchNorm folded; ``model.safetensors`` has it as
    it was trained.

    Files appear in ``directory`` one by one, each complete; those of an earlier export are replaced. It is `stage`
    and then `publish`.

    Args:
        model: As for `stage`, as are the others.
        example_input: A batch of at least one sample.
        directory: Where to write; made if it does not exist.
        provenance: What ``plan.json`` and ``README.md`` say of the model.
        dense: Any instance of the dense architecture.
        formats: What to write besides.
        tolerance: The largest `Artifact.max_error` to accept.

    Raises:
        ValueError: If ``example_input`` is no batch, or a format cannot be written here.
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
    """The part of `export` that takes long, and needs no more than the model: writes the files and checks them.

    Args:
        model: The realized model: logits of shape ``(n, classes)`` from a batch. It is not changed.
        example_input: A batch of at least one sample. None of it is stored.
        folder: Where to write; what is in it goes.
        provenance: What ``plan.json`` and ``README.md`` say of the model.
        dense: Any instance of the dense architecture, from which ``model.safetensors`` is rebuilt to see whether
            it answers as the model does. Without it only its weights are compared.
        formats: What to write besides, see `check_formats`.
        tolerance: The largest `Artifact.max_error` to accept; 1e-4 by default, and 5e-2 for a model in 16
            bits, because its ONNX file has the same weights and computes in float32, or in 8, because
            activations between two steps may be rounded the other way.

    Raises:
        ValueError: As `export`.
    """
    formats = check_formats(formats)
    if example_input.ndim < 2 or len(example_input) == 0:
        raise ValueError(f"example_input= must be a batch (n, ...), not of shape {tuple(example_input.shape)}")
    # Another memory layout is for speed here; exporters know the plain one best.
    stored = copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format).eval().requires_grad_(False)
    if tolerance is None:
        tolerance = TOLERANCE if weight_dtype(stored) == torch.float32 else TOLERANCE_FEWER_BITS
    shutil.rmtree(folder, ignore_errors=True)  # of another model, or left by an export that was killed
    folder.mkdir(parents=True)
    probes = _probes(example_input.detach().cpu())
    with torch.inference_mode():
        expected = [stored(x).float().numpy() for x in probes]
    answers, not_fresh = _write_all(stored, probes, folder, provenance, dense, formats)
    # Without answers it is what `bundle.save` has compared: its weights.
    errors = {"safetensors": 0.0} | {name: _error(found, expected) for name, found in answers.items()}
    refused = {name: why for name, error in errors.items() if (why := _refusal(error, tolerance))}
    integers = weight_dtype(stored) == torch.int8
    readme = instructions(errors, probes[0], expected[0].shape[-1], provenance, refused, integers, not_fresh)
    (folder / "README.md").write_text(readme, encoding="utf-8")
    offered = {name: float(errors[name]) for name in FILES if name in errors and name not in refused}
    return Staged(folder, offered, refused, not_fresh)


def publish(staged: Staged, directory: Path, results: Mapping[str, Any] | None = None) -> Export:
    """The rest of `export`: moves each file into place; what an earlier export left of another format goes.

    Args:
        staged: What `stage` gave; its files are moved.
        directory: Where to, on the same file system; made if it does not exist.
        results: What ``plan.json`` says of the model besides, such as its metric on val and test: JSON types only.
    """
    directory.mkdir(parents=True, exist_ok=True)
    wanted = {file: name in staged.errors for name, file in FILES.items()}
    wanted |= {bundle.PLAN: "safetensors" in staged.errors, "README.md": True}
    if results and wanted[bundle.PLAN]:
        bundle.add_results(staged.folder, results)
    for file, is_there in wanted.items():
        if is_there:
            (staged.folder / file).replace(directory / file)
        else:
            (directory / file).unlink(missing_ok=True)
    artifacts = []
    for name, error in staged.errors.items():
        path = directory / FILES[name]
        artifacts.append(Artifact(name, path, path.stat().st_size, error, staged.not_fresh.get(name, "")))
    return Export(tuple(artifacts), staged.refused)


def export_dense(model: nn.Module, example_input: Tensor, folder: Path) -> None:
    """Writes a model as it is deployed, unchecked. The next export of the process takes a fraction of the time.

    Args:
        model: It is not changed.
        example_input: A batch of at least one sample.
        folder: Where to write ``model.pt2`` and ``model.onnx``; made if it does not exist.
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
    """Sees to it that a fresh process waits to check the next export, and has run a model of each format before.

    Args:
        folder: Where `export_dense` has written.
        example_input: A batch for what it has written.
    """
    files = {name: folder / FILES[name] for name in ("pt2", "onnx")}
    have_waiting(folder, files, [_probes(example_input[:1].detach().cpu())[-1].numpy()])


def _probes(example: Tensor) -> list[Tensor]:
    """Batches of one and of five samples in the range of the example."""
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
    """Writes every format into ``folder`` and has it run.

    Returns:
        The answers of each, or why there are none, and `Artifact.not_fresh` by format. Without ``dense`` there are
        no answers of ``model.safetensors``.
    """
    # Zeros: exporters may store the input that they trace with, and the data is not ours to ship.
    traced = torch.zeros_like(probes[-1])
    # A copy, as the caller's is stored beside it, in the layout that exporters know best.
    runs = copy.deepcopy(deployed(model, probes[0])).to(memory_format=torch.contiguous_format)
    answers: dict[str, Arrays | str] = {}
    try:
        with quietly():
            program = capture(runs, traced)
    except Exception as error:  # whatever it raises for a model that it does not take
        program, answers["pt2"] = None, reason(error)
    writers = _writers(runs, traced, program)
    if "executorch" in formats:
        writers["executorch"] = lambda path: write_pte(runs, traced, path)
    # The last: it is loaded with autocompress, and the others must be known to run without.
    writers["safetensors"] = lambda path: bundle.save(model, probes[0], path.parent, provenance)
    inputs = [x.numpy() for x in probes]
    not_fresh: dict[str, str] = {}
    with FreshProcess(folder, inputs) as elsewhere:
        for done, (name, write) in enumerate(writers.items()):
            progress.report(done / (len(writers) + 1))  # the other process comes last
            try:
                with quietly():
                    write(folder / FILES[name])
            except Exception as error:  # an exporter may raise anything; it costs this one format
                answers[name] = reason(error)
            else:
                if name != "safetensors":
                    elsewhere.start(name, folder / FILES[name])
        progress.report(len(writers) / (len(writers) + 1))
        answers |= elsewhere.finish([name for name in writers if name not in (*answers, "safetensors")])
        if dense is not None and "safetensors" not in answers:
            answers["safetensors"], why_here = _rebuilt(elsewhere, folder, provenance, dense, inputs)
            not_fresh |= {"safetensors": why_here} if why_here else {}
    return answers, not_fresh


def _writers(
    model: nn.Module, batch: Tensor, program: ExportedProgram | None
) -> dict[str, Callable[[Path], None]]:
    """What writes the files that are always written, by format; without a program there is none for PyTorch's."""
    onnx: dict[str, Callable[[Path], None]] = {"onnx": lambda path: write_onnx(model, batch, path, program)}
    return onnx if program is None else {"pt2": lambda path: _write_pt2(program, path)} | onnx


def _rebuilt(
    elsewhere: FreshProcess, folder: Path, provenance: Provenance, dense: nn.Module, inputs: Arrays
) -> tuple[Arrays | str, str]:
    """What the module rebuilt from ``folder`` answers; why it was not in the fresh process, if it was here."""
    try:
        call = bundle.checking_call(folder, provenance, dense)
    except Exception as error:  # whatever a user's object raises that cannot be pickled
        why_here = reason(error)
    else:
        elsewhere.start_call("safetensors", call)
        answer = elsewhere.finish(["safetensors"])["safetensors"]
        if not isinstance(answer, Undelivered):
            return answer, ""
        why_here = str(answer)
    try:
        return bundle.answers_of(folder, dense, provenance.kinds, inputs), why_here
    except Exception as error:
        return reason(error), why_here


def _write_pt2(program: ExportedProgram, path: Path) -> None:
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # quotes the user's source, with its path
    program.example_inputs = None
    torch.export.save(program, path)


def _error(found: Arrays | str, expected: Arrays) -> float | str:
    """The largest difference relative to the largest logit; or why there is no such number."""
    if isinstance(found, str):
        return found
    if [a.shape for a in found] != [a.shape for a in expected]:
        return f"gave outputs of shape {found[-1].shape}, the model {expected[-1].shape}"
    if not all(np.isfinite(a).all() for a in (*found, *expected)):
        return "the logits are not all finite"
    scale = max(float(np.abs(a).max()) for a in expected) or 1.0
    return max(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True)) / scale


def _refusal(error: float | str, tolerance: float) -> str | None:
    if isinstance(error, str):
        return error
    too_far = f"its logits differ by {error:.1e} of the largest, more than the {tolerance:.0e} allowed"
    return None if error <= tolerance else too_far
