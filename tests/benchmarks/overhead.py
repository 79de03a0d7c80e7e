"""Where the time of the default job goes, and its memory beside that of plain fine-tuning.

    python tests/benchmarks/overhead.py [EPOCHS]

Overhead is what is neither the training (dense or in a trial, its C steps aside) nor the evaluation of models.
Promised: at most 5% of the wall time, and 2% where trials take longer than 30 s; peak memory at most 1.25 times
that of fine-tuning the same model alone. Exits with 1 where it is more. EPOCHS of each trial; 30 by default.
"""

import functools
import inspect
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

MOST, MOST_OF_LONG, LONG_S, MOST_MEMORY = 0.05, 0.02, 30.0, 1.25
# What is timed, by the part it belongs to: a module and the name in it, as its user looks it up.
PARTS = {
    "import": (),
    "dense model": (("tuning", "digits"),),
    "training": (("learner", "Learner.l_step"), ("lc", "recalibrate_batchnorm")),
    "evaluation": (("task", "Task.evaluate"),),
    "C steps and realizing": (("trial", "realize"), ("lc", "c_step")),
    "counting and timing": (("trial", "compare"), ("conclusion", "compare"), ("study", "measure")),
    "suggesting": (("search", "posterior"), ("search", "answer"), ("study", "posterior"), ("study", "answer")),
    "saving": (("storage", "StudyFolder.save_trial"),),
    "exporting": (("conclusion", "export"),),
    "reporting": (("study", "write_report"),),
    "logging": (("tracking", "Tracker.finish"),),
}
USERS = ("dense model", "training", "evaluation")  # parts that the user would have paid for without us


class Split:
    """Seconds by part; a part within another counts for itself alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[list[Any]] = []

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            self._open.append([part, 0.0])
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.perf_counter() - began
                _, inside = self._open.pop()
                self.seconds[part] += spent - inside
                if self._open:
                    self._open[-1][1] += spent

        return run


def main() -> int:
    began = time.perf_counter()
    import importlib

    split = Split()
    from autocompress import tuning

    split.seconds["import"] = time.perf_counter() - began
    for part, names in PARTS.items():
        for module_name, name in names:
            home: Any = importlib.import_module(f"autocompress.{module_name}")
            *owners, leaf = name.split(".")
            for owner in owners:
                home = getattr(home, owner)
            if hasattr(home, leaf):
                setattr(home, leaf, split.timed(part, getattr(home, leaf)))
            else:
                print(f"note: there is no {module_name}.{name} to time")
    with tempfile.TemporaryDirectory() as out:
        epochs = float(sys.argv[1]) if len(sys.argv) > 1 else None
        result = tuning.tune(out=out, epochs=epochs)
    wall = time.perf_counter() - began
    for part in PARTS:
        print(f"{part:24s}{split.seconds[part]:8.2f} s {split.seconds[part] / wall:7.1%}")
    rest = wall - sum(split.seconds.values())
    print(f"{'the rest':24s}{rest:8.2f} s {rest / wall:7.1%}")
    overhead = 1 - sum(split.seconds[part] for part in USERS) / wall
    mean_s = sum(record.seconds for record in result.records) / max(1, len(result.records))
    most = MOST_OF_LONG if mean_s > LONG_S else MOST
    ours = peak_mb()
    theirs = fine_tuning_mb()
    n, times = len(result.records), ours / theirs
    print(f"{n} trials of {mean_s:.1f} s in {wall:.1f} s; overhead {overhead:.1%} (at most {most:.0%})")
    print(f"peak memory {ours:.0f} MB, of fine-tuning {theirs:.0f} MB: {times:.2f} (at most {MOST_MEMORY})")
    return 0 if overhead <= most and ours <= MOST_MEMORY * theirs else 1


def peak_mb() -> float:
    """Peak memory of this process since it began, in megabytes (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3


def fine_tuning_mb() -> float:
    """Peak memory of a process that trains the digits' network for an epoch, in megabytes."""
    # Not by getrusage, whose peak a child process has from the one that began it.
    code = (
        f"from pathlib import Path\n{inspect.getsource(peak_mb)}\n"
        "import torch; from autocompress.data import digits; task = digits()\n"
        "model, opt = task.model.train(), torch.optim.SGD(task.model.parameters(), lr=0.01)\n"
        "for x, y in task.train.batches(torch.Generator().manual_seed(0)):\n"
        "    opt.zero_grad(); task.loss(model(x), y).backward(); opt.step()\n"
        "print(peak_mb())"
    )
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


if __name__ == "__main__":
    sys.exit(main())
