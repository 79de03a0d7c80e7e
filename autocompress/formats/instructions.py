"""The ``README.md`` of an export: how to run each file, and why a file that was asked for is missing."""

from collections.abc import Collection, Mapping

from torch import Tensor

from autocompress.formats import bundle
from autocompress.formats.bundle import Provenance, dtype_name
from autocompress.formats.executorch_export import MAX_BATCH

FILES = {"pt2": "model.pt2", "onnx": "model.onnx", "executorch": "model.pte", "safetensors": bundle.WEIGHTS}

RUN_PT2 = """With torch alone:

```python
import torch

model = torch.export.load("model.pt2").module()
with torch.inference_mode():
    logits = model(torch.zeros({shape}, dtype=torch.{dtype}))
```
"""
RUN_ONNX = """With ONNX Runtime alone:

```python
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
(logits,) = session.run(["logits"], {{"input": np.zeros({shape}, dtype=np.{dtype})}})
```
"""
RUN_EXECUTORCH = """With ExecuTorch and XNNPACK, for batches of at most {max_batch}. Phones load the same file from
Java, Swift or C++:

```python
import torch
from executorch.runtime import Runtime

method = Runtime.get().load_program("model.pte").load_method("forward")
(logits,) = method.execute([torch.zeros({shape}, dtype=torch.{dtype})])
```
"""
REBUILD = """With autocompress, as a module to train or measure further, from `model.safetensors` and `plan.json`:
{load}.
"""
IN_FILE = """`{scheme}` is in a file of yours, which `autocompress.load` does not run: import it first.
"""
LOAD_NAMED = '`autocompress.load(".")`'
LOAD_OWN = '`autocompress.load(".", model)`, where `model` is any instance of the dense architecture'
NOT_FRESH = """`{file}` was checked in the process that wrote it, not in a fresh one: {reason}
"""
INTEGERS = """`model.onnx` computes in 8-bit integers: it is the file to deploy. The others store the same
integers and compute in float32 what they give, slower than the dense model. On x86 processors without VNNI,
ONNX Runtime adds up in 16 bits, which can saturate: check it there, or compress with `Quantize8(bits=7)`.
"""
INPUT_OUTPUT = """Input: {dtype} of shape (batch, {sample}), any batch size. {preprocessing}

Output: float32 logits of shape (batch, {classes}). {prediction}{names}
"""
ONE_CLASS = "The largest is the prediction; softmax makes\nprobabilities of them."
SEVERAL_LABELS = (
    "A label is predicted if its logit is\npositive; the sigmoid of a logit is the label's probability."
)


RUN = {"pt2": RUN_PT2, "onnx": RUN_ONNX, "executorch": RUN_EXECUTORCH, "safetensors": REBUILD}


def instructions(
    formats: Collection[str],
    sample: Tensor,
    classes: int,
    provenance: Provenance,
    refused: Mapping[str, str],
    integers: bool,
    not_fresh: Mapping[str, str],
) -> str:
    """The text of the ``README.md``.

    Args:
        formats: The formats that were asked for.
        sample: A batch of one sample, for its shape and type.
        classes: The number of logits.
        provenance: The origin of the model.
        refused: For each format that is not offered, the reason in one line.
        integers: Whether the model computes in 8-bit integers.
        not_fresh: For each format that was not checked in a fresh process, the reason in one line.
    """
    shape, dtype = tuple(sample.shape), dtype_name(sample.dtype)
    load = LOAD_OWN if provenance.architecture is None else LOAD_NAMED
    parts = [f"# {provenance.task}: {provenance.scheme} at density {provenance.density:.4g}\n"]
    for name, text in RUN.items():
        if name in refused:
            parts.append(f"`{FILES[name]}` is not offered: {refused[name]}\n")
        elif name in formats:
            parts.append(text.format(shape=shape, dtype=dtype, max_batch=MAX_BATCH, load=load))
            if name == "safetensors" and ".py:" in provenance.scheme:
                parts.append(IN_FILE.format(scheme=provenance.scheme))
            if name in not_fresh:
                parts.append(NOT_FRESH.format(file=FILES[name], reason=not_fresh[name]))
    if integers and "onnx" not in refused:
        parts.append(INTEGERS)
    parts.append(
        INPUT_OUTPUT.format(
            dtype=dtype,
            sample=", ".join(str(n) for n in shape[1:]),
            preprocessing=provenance.preprocessing or "Prepare it as the training data was.",
            classes=classes,
            prediction=SEVERAL_LABELS if provenance.several_labels else ONE_CLASS,
            names=f" In order: {', '.join(provenance.classes)}." if provenance.classes else "",
        )
    )
    return "\n".join(parts)
