"""A recovery as a value: its state between two L steps, with checkpoints, and its result."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from autocompress.learning.learner import Penalty, Snapshot
from autocompress.scheme import Theta, Weights

AGREED = 1e-3  # primal residual below which w and θ count as equal


@dataclass(frozen=True)
class Recovered:
    """The result of a recovery; the model that it was given carries the decompressed θ.

    Attributes:
        theta: The compressed weights.
        curves: Logged values by name, one number per C step.
        steps: Gradient steps taken.
        given_up_at: The share of the polish after which it was given up as hopeless; None if it was completed.
    """

    theta: Theta
    curves: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    steps: int = 0
    given_up_at: float | None = None


@dataclass(frozen=True)
class State:
    """The state of a recovery between two L steps: all that it needs to continue.

    Attributes:
        c_steps: C steps taken.
        initial: The density at which it started.
        growth: The factor by which μ has grown since the first C step.
        curves: Logged values by name, one number per C step.
        penalty: The penalty of the last L step, which holds θ and the multipliers; only in a checkpoint.
        learner: The weights, the optimizer and the position in the data; only in a checkpoint.
    """

    c_steps: int = 0
    initial: float = 1.0
    growth: float = 1.0
    curves: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    penalty: Penalty = field(default_factory=Penalty.none)
    learner: Snapshot | None = None

    def after(self, growth: float, **logged: float) -> "State":
        """The state after one more C step and its L step.

        Args:
            growth: The factor on μ until the next C step.
            logged: Values to append to the curves, by name.
        """
        curves = {name: (*self.curves.get(name, ()), value) for name, value in logged.items()}
        return replace(self, c_steps=self.c_steps + 1, growth=self.growth * growth, curves=curves)

    def has_agreed(self, density: float) -> bool:
        """Whether w and θ were equal already at the last C step, and that was at the target density."""
        if not self.c_steps:
            return False
        return self.curves["lc_density"][-1] == density and self.curves["lc_residual"][-1] <= AGREED

    @classmethod
    def warm(cls, density: float, model: Weights) -> "State":
        """The start of a recovery from a model's state dict that is already compressed to ``density``."""
        return cls(initial=density, learner=Snapshot({f"model/{name}": t for name, t in model.items()}, {}))

    def save(self, file: Path | str) -> None:
        """Writes a checkpoint to a safetensors file."""
        assert self.learner is not None, "only a checkpoint can be saved"
        tensors = {f"learner/{name}": t for name, t in self.learner.tensors.items()}
        tensors |= {f"target/{name}": t for name, t in self.penalty.target.items()}
        tensors |= {f"to_zero/{name}": t for name, t in self.penalty.to_zero.items()}
        numbers = {
            "c_steps": self.c_steps,
            "initial": self.initial,
            "growth": self.growth,
            "mu": self.penalty.mu,
            "curves": self.curves,
            "learner": self.learner.numbers,
        }
        contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        save_file(contiguous, file, metadata={"state": json.dumps(numbers)})

    @classmethod
    def load(cls, file: Path | str, device: torch.device | str = "cpu") -> "State":
        """Reads a checkpoint that `save` wrote, onto ``device``.

        Raises:
            ValueError: If the file is not a checkpoint, or one of an incompatible version.
        """
        try:
            with safe_open(file, framework="pt", device=str(device)) as opened:
                numbers = json.loads(opened.metadata()["state"])
                tensors: dict[str, Weights] = {"learner": {}, "target": {}, "to_zero": {}}
                for entry in opened.keys():  # noqa: SIM118  # it is no mapping
                    kind, name = entry.split("/", 1)
                    tensors[kind][name] = opened.get_tensor(entry)
            return cls(
                numbers["c_steps"],
                numbers["initial"],
                numbers["growth"],
                {name: tuple(values) for name, values in numbers["curves"].items()},
                Penalty(numbers["mu"], tensors["target"], tensors["to_zero"]),
                Snapshot(tensors["learner"], numbers["learner"]),
            )
        except (KeyError, TypeError, ValueError, SafetensorError) as error:
            raise ValueError(
                f"{file} is not a checkpoint of this version ({type(error).__name__}: {error}); begin the "
                "recovery anew"
            ) from error
