"""Where the time of the default job goes, and its memory beside that of plain fine-tuning.

    python tests/benchmarks/overhead.py [EPOCHS]

The overhead is the time that plain fine-tuning of the same models would not take: everything but the imports that
fine-tuning needs as well, the training (of the dense model, or a trial's recovery with its C steps, whose cost
lc_overhead.py measures) and the evaluation of models. These three count only while the main thread computes: if it
waits in them, it waits for another thread of autocompress, or the machine is busy. On a busy machine the other
columns are more informative: the second has the seconds in which the main thread computes, the third (Linux) those
in which it was ready but had no core. Waiting for the background process, which logs, exports and draws, counts
for the part that waits; exporting consists of this wait only, which is almost zero if the answer was known before
the last trials.

Limits: 5% of the wall time, or 2% if trials take longer than 30 s; peak memory of the process that trains 1.25
times that of fine-tuning the same model. The memory of the background process, which does not depend on the
model's size, comes on top. Exits with 1 if a limit is exceeded. EPOCHS is the budget of each trial, instead of the
default.
"""

import functools
import inspect
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any

MOST, MOST_OF_LONG, LONG_S, MOST_MEMORY = 0.05, 0.02, 30.0, 1.25
# What is timed, by the part it belongs to: a module and the name in it, as its user looks it up.
PARTS = {
    "import": (),
    "dense model": (("data", "digits"),),
    "recovery": (("trial", "_recover"),),
    "C steps": (("lc", "c_step"),),
    "evaluation": (("task", "Task.evaluate"),),
    "analyzing": (("studies.analysis", "Analyses.open_space"),),
    "realizing": (("trial", "realize"), ("studies.records", "rebuild")),
    "counting and timing": (("trial", "compare"), ("studies.conclusion", "compare"), ("study", "measure")),
    "suggesting": (
        ("search", "posterior"),
        ("search", "answer"),
        ("studies.records", "posterior"),
        ("studies.records", "answer"),
    ),
    "saving": (("disk.storage", "StudyFolder.save_trial"),),
    "exporting": (("studies.conclusion", "Conclusion._export"),),
    "drawing": (("study", "Study._report"),),
    "logging": (("tracking", "Tracker.flush"), ("tracking", "Tracker.finish")),
}
USERS = ("dense model", "recovery", "C steps", "evaluation")  # parts that fine-tuning would have had, too
END = ("exporting", "drawing")  # what is left to do of what ships when the last trial is over
THEIRS = "import torch, torchvision, sklearn.datasets, sklearn.model_selection"


def now() -> tuple[float, float, float]:
    """Seconds on the wall, those that this thread has computed, and those that it was ready to but had no core."""
    queued_ns = int(Path("/proc/thread-self/schedstat").read_text(encoding="ascii").split()[1])
    return time.perf_counter(), time.thread_time(), queued_ns / 1e9


class Split:
    """The main thread's seconds by part, as `now`; one within another counts for itself alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
        self._open: list[list[float]] = []

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            if current_thread() is not main_thread():  # what is waited for is in the part that waits
                return function(*args, **kwargs)
            began = now()
            self._open.append([0.0, 0.0, 0.0])
            try:
                return function(*args, **kwargs)
            finally:
                inside = self._open.pop()
                for i, (end, begin) in enumerate(zip(now(), began, strict=True)):
                    self.seconds[part][i] += end - begin - inside[i]
                    if self._open:
                        self._open[-1][i] += end - begin

        return run


def main() -> int:
    # Imports are then as any but the first on a machine, which reads a gigabyte of libraries and compiles ours.
    compiles = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run([sys.executable, "-c", f"{THEIRS}; from autocompress import tuning"], check=True, env=compiles)
    began = now()
    import importlib

    split = Split()
    from autocompress import tuning

    split.seconds["import"] = [end - begin for end, begin in zip(now(), began, strict=True)]
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
    whole = [end - begin for end, begin in zip(now(), began, strict=True)]
    wall, computed, queued = whole
    ours_mb = peak_mb()
    theirs_mb, imports = fine_tuning()
    split.seconds["the rest"] = [
        all_of_it - sum(one[i] for one in split.seconds.values()) for i, all_of_it in enumerate(whole)
    ]
    split.seconds["import, of fine-tuning"] = imports
    print(f"{'':24s}{'wall':>10s}{'computed':>10s}{'no core':>10s}")
    for part in (*PARTS, "the rest", "import, of fine-tuning"):
        print(f"{part:24s}" + "".join(f"{seconds:8.2f} s" for seconds in split.seconds[part]))
    users = sum(split.seconds[part][1] for part in USERS)
    waited = sum(split.seconds[part][0] - split.seconds[part][2] for part in USERS) - users
    print(f"{'training that waited':24s}{waited:8.2f} s")
    overhead, ours, alone = (
        1 - (min(imports[i], split.seconds["import"][i]) + users) / of
        for i, of in ((0, wall), (1, computed), (1, wall - queued))
    )
    end = sum(split.seconds[part][0] for part in END)
    mean_s = sum(record.seconds for record in result.records) / max(1, len(result.records))
    most = MOST_OF_LONG if mean_s > LONG_S else MOST
    n, times = len(result.records), ours_mb / theirs_mb
    print(
        f"{n} trials of {mean_s:.1f} s in {wall:.1f} s; overhead {overhead:.1%} of the wall time (at most "
        f"{most:.0%}), {alone:.1%} without the seconds that had no core, {ours:.1%} of what was computed; "
        f"{end / wall:.1%} of it {' and '.join(END)}, {overhead - end / wall:.1%} all else"
    )
    print(f"peak memory {ours_mb:.0f} MB, of fine-tuning {theirs_mb:.0f} MB: {times:.2f} (at most {MOST_MEMORY})")
    return 0 if overhead <= most and times <= MOST_MEMORY else 1


def peak_mb() -> float:
    """Peak memory of this process since it began, in megabytes (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3


def fine_tuning() -> tuple[float, list[float]]:
    """A process that trains the digits' network for an epoch: its peak in MB, its imports in seconds as `now`."""
    # Not by getrusage, whose peak a child process has from the one that began it.
    code = (
        f"import time; from pathlib import Path\n{inspect.getsource(peak_mb)}\n{inspect.getsource(now)}\n"
        f"began = now(); {THEIRS}; ended = now()\n"
        "from autocompress.data import digits; task = digits()\n"
        "model, opt = task.model.train(), torch.optim.SGD(task.model.parameters(), lr=0.01)\n"
        "for x, y in task.train.batches(torch.Generator().manual_seed(0)):\n"
        "    opt.zero_grad(); task.loss(model(x), y).backward(); opt.step()\n"
        "print(peak_mb(), *(end - begin for end, begin in zip(ended, began)))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    memory_mb, *seconds = map(float, said.split())
    return memory_mb, seconds


if __name__ == "__main__":
    sys.exit(main())
