"""Limits on latency: torchvision's resnet18 at 224 x 224 dense, at half width, in bf16 and in integers.

    python tests/benchmarks/latency.py [THREADS] [SECONDS]

First two controls, whose ratio must be 1: the dense model against itself (within 3%), and against a model that is
only masked, with 95% zeros. Then the required speed-ups, as shares of the ratio of the MACs:

- PyTorch, half width: 75% at batch 1 and 90% at batch 16; in bf16 a further 1.5 times as fast
- ONNX Runtime, half width: 95%; half width in integers 6 times as fast as dense at batch 1, 7.5 times at batch 16

On two cores of an EPYC with VNNI and bf16 dot products, without AMX, batch 1 and 16: PyTorch 0.83 and 0.99, in
bf16 1.52 and 1.74 times as fast; ONNX Runtime 0.97 and 1.00, in integers 8.2 and 7.8. On a busy machine ONNX
Runtime reached 0.90 and 1.00, in integers 5.5 and 6.4 times as fast. With a single sample PyTorch uses its own,
slower convolution for small inputs in float32, and in bf16 spends most of a pass in some twenty short
convolutions, each of which reorders its weights again.

Weights are random: time does not depend on them. Exits with 1 if a limit is missed. Run it on a machine that does
nothing else. SECONDS is the time for each model and batch; 10 by default.
"""

import sys
from collections.abc import Callable

import torch
import torchvision
from torch import nn

from autocompress.gauges.latency import PRECISION
from autocompress.gauges.profile import of_model
from autocompress.measurement import Measurement, compare
from autocompress.scheme import parse_scheme

BATCHES, SHAPE = (1, 16), (1, 3, 224, 224)
HALF = "StructPrune(spread=uniform, align=8)"
DENSITY = 0.264  # of the parameters, so that half of each layer's channels are left


def dense() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.resnet18().eval()


def compressed(spec: str) -> nn.Module:
    return of_model(dense(), torch.zeros(SHAPE), parse_scheme(spec), DENSITY).models["compressed"]


def masked() -> nn.Module:
    model = dense()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= torch.rand_like(parameter) < 0.05
    return model


def times(runtime: str, seconds: float, *models: nn.Module) -> list[list[float]]:
    """Returns, for each batch size, the speed of each model relative to the first."""
    measured = compare(models, torch.zeros(SHAPE), batch_sizes=BATCHES, budget_s=seconds, runtimes=(runtime,))
    for i, one in enumerate(measured):
        said = [f"{at.p50_ms:8.2f} ms ± {100 * (at.interval or 0):.1f}%" for at in one.latency]
        unsure = any((at.interval or 0) > PRECISION for at in one.latency)
        print(f"    model {i + 1}: {'   '.join(said)}{'   too noisy a machine' if unsure else ''}", flush=True)
    return [
        [before.p50_ms / one.latency[b].p50_ms for one in measured] for b, before in enumerate(measured[0].latency)
    ]


def macs_ratio(measured: list[Measurement]) -> float:
    return measured[0].macs / measured[1].macs


def main() -> int:
    if len(sys.argv) > 1:
        torch.set_num_threads(int(sys.argv[1]))
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 10.0
    half, bf16 = compressed(HALF), compressed(f"{HALF}+Quantize16(dtype=bf16)")
    integers = compressed(f"{HALF}+Quantize8")
    bound = macs_ratio(compare([dense(), half], torch.zeros(SHAPE), timing=False))
    print(f"{torch.get_num_threads()} threads; at half width {bound:.2f} times fewer MACs", flush=True)
    held: list[bool] = []

    def check(what: str, found: float, holds: Callable[[float], bool], promised: str) -> None:
        held.append(holds(found))
        print(f"{what:48s}{found:8.3f}   {promised:14s}{'' if held[-1] else 'MISSED'}", flush=True)

    for b, (itself, zeros) in enumerate(row[1:] for row in times("eager", seconds, dense(), dense(), masked())):
        check(f"dense beside itself, batch {BATCHES[b]}", itself, lambda x: abs(x - 1) <= 0.03, "1.00 ± 0.03")
        check(f"masked only, batch {BATCHES[b]}", zeros, lambda x: abs(x - 1) <= 0.1, "about 1.0")
    shares = {1: 0.75, 16: 0.90}
    for batch, (_, narrow, short) in zip(BATCHES, times("eager", seconds, dense(), half, bf16), strict=True):
        least = shares[batch]
        check(f"PyTorch, half width: share, batch {batch}", narrow / bound, lambda x: x >= least, f">= {least}")  # noqa: B023
        check(f"PyTorch, bf16 beside float32, batch {batch}", short / narrow, lambda x: x >= 1.5, ">= 1.5")
    factors = {1: 6.0, 16: 7.5}
    for batch, (_, narrow, whole) in zip(
        BATCHES, times("onnxruntime", seconds, dense(), half, integers), strict=True
    ):
        least = factors[batch]
        check(f"ONNX Runtime, half width: share, batch {batch}", narrow / bound, lambda x: x >= 0.95, ">= 0.95")
        check(f"ONNX Runtime, half width int8, batch {batch}", whole, lambda x: x >= least, f">= {least}")  # noqa: B023
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
