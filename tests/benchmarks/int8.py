"""ONNX Runtime on resnet18 at 224 x 224: float32 against 8-bit integers, at full and at about half width.

    python tests/benchmarks/int8.py [THREADS]

Weights are random: time does not depend on them. The four files take turns, and what is printed are medians
and their ratios to float32 at full width, so that other load on the machine meets all of them alike.
"""

import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import torchvision
from torch import nn

from autocompress.formats.onnx_export import write_onnx
from autocompress.scheme import Scheme, parse_scheme
from autocompress.testing import find_facts, masked_model

SCHEMES = {"int8": "Quantize8", "half width": "StructPrune", "half width, int8": "StructPrune+Quantize8"}
BATCHES, ROUNDS = (1, 16), 30
DENSITY = 0.25  # of the parameters, so that about half of each layer's channels are left


def realized(scheme: Scheme, model: nn.Module, x: torch.Tensor) -> nn.Module:
    facts = find_facts(scheme, model, x)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    theta = scheme.pi(weights, DENSITY if scheme.takes_density else 1.0, facts)
    return scheme.realize(masked_model(scheme, model, theta), theta, facts).eval()


def median_ms(sessions: dict[str, onnxruntime.InferenceSession], x: np.ndarray) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for i in range(ROUNDS + 3):
        for name, session in sessions.items():
            began = time.perf_counter()
            session.run(None, {"input": x})
            if i >= 3:  # the first passes allocate
                times[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 224, 224)
    model = torchvision.models.resnet18()
    with torch.no_grad():
        model.train()(x)
    models = {"float32": model.eval()}
    models |= {name: realized(parse_scheme(spec), model, x) for name, spec in SCHEMES.items()}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    sessions, megabytes = {}, {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about its own insides
        for name, each in models.items():
            file = Path(folder) / f"{name}.onnx"
            write_onnx(each, torch.zeros(2, 3, 224, 224), file)
            sessions[name] = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
            megabytes[name] = file.stat().st_size / 1e6
    print("batch  file                    MB        ms     times as fast")
    for n in BATCHES:
        medians = median_ms(sessions, torch.randn(n, 3, 224, 224).numpy())
        for name, ms in medians.items():
            print(
                f"{n:5d}  {name:18s}  {megabytes[name]:6.1f}  {ms:8.2f}  {medians['float32'] / ms:8.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
