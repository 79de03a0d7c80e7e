"""The result of a sweep: a row for each model, means over repeats, and both as tables."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocompress.showing.comparison import as_bytes, as_count, ratio

if TYPE_CHECKING:
    import pandas as pd

DENSE = "dense"
COSTS = ("params", "macs", "size_bytes", "latency_ms", "peak_memory_bytes")


@dataclass(frozen=True)
class Sweep:
    """The result of a sweep.

    Attributes:
        name: The sweep's name.
        task: The task's name.
        metric: The name of the task's metric.
        higher_is_better: Whether a larger score of it is better.
        also: The names of further metrics.
        n_test: Number of test samples.
        cells: For each model, the dense one first: its ``row`` of plain values, the ``curves`` that recovery
            logged, and the ``timeline`` of the GPU (seconds, free bytes, percent utilized), empty without a GPU.
        failed: The cells that ended without a model: their ``number``, ``scheme``, ``density_asked``, ``repeat``
            and the ``reason``.
        stopped: The reason why the sweep ended, in words.
        seconds: Wall time of all trials, in seconds.
        device: The device on which trials ran.
        folder: The sweep's folder.
    """

    name: str
    task: str
    metric: str
    higher_is_better: bool
    also: tuple[str, ...]
    n_test: int
    cells: tuple[Mapping[str, Any], ...]
    failed: tuple[Mapping[str, Any], ...]
    stopped: str
    seconds: float
    device: str
    folder: Path

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the task's metric and the further ones."""
        return (self.metric, *self.also)

    @property
    def interrupted(self) -> bool:
        """Whether it was stopped by Ctrl-C."""
        return self.stopped == "interrupted"

    @property
    def trials(self) -> "pd.DataFrame":
        """A row for each model, the dense one first: scores on val and test, and costs."""
        import pandas as pd

        return pd.DataFrame([cell["row"] for cell in self.cells])

    @property
    def table(self) -> "pd.DataFrame":
        """A row for each scheme and density, the dense model first: means over the repeats.

        ``{metric}`` is the score on test; with repeats, ``{metric}_sd`` is their standard deviation. ``change`` is
        the task's metric on test, minus that of the dense model.
        """
        trials = self.trials
        groups = trials.groupby(["scheme", "density_asked"], sort=False, dropna=False)
        table = groups[["density", *COSTS]].mean().astype(float)
        table.insert(0, "runs", groups.size())
        for name in self.metrics:
            scores = groups[f"{name}_test"]
            table[name] = scores.mean()
            if table["runs"].max() > 1:
                table[f"{name}_sd"] = scores.std(ddof=1)
        table["change"] = table[self.metric] - table[self.metric].iloc[0]
        flat: pd.DataFrame = table.reset_index()
        return flat

    def to_rows(self) -> tuple[list[str], list[list[str]]]:
        """`table` as text: the header and the rows."""
        table = self.table
        points = [f"{name} on test" for name in self.metrics]
        header = ["scheme", "density", *points, "change", "parameters", "", "MACs", "", "on disk"]
        timed = bool(table["latency_ms"].notna().all())
        header += ["latency", ""] if timed else []
        dense, rows = table.iloc[0], []
        for _, at in table.iterrows():
            row = [at["scheme"], f"{at['density']:.4g}", *(self._score(at, name) for name in self.metrics)]
            row.append("" if at["scheme"] == DENSE else f"{100 * at['change']:+.2f} pp")
            for cost, show in (("params", lambda n: f"{n:,.0f}"), ("macs", as_count)):
                row += [show(at[cost]), "" if at["scheme"] == DENSE else ratio(dense[cost], at[cost])]
            row.append(as_bytes(at["size_bytes"]))
            if timed:
                faster = "" if at["scheme"] == DENSE else ratio(dense["latency_ms"], at["latency_ms"])
                row += [f"{at['latency_ms']:.3f} ms", faster]
            rows.append(row)
        return header, rows

    @staticmethod
    def _score(at: Mapping[str, Any], name: str) -> str:
        spread = at.get(f"{name}_sd")
        known = spread is not None and spread == spread  # NaN for a single run
        return f"{at[name]:.4f}" + (f" ± {spread:.4f}" if known else "")

    def to_markdown(self) -> str:
        """The table in Markdown, with a heading, failed cells and the figure."""
        header, rows = self.to_rows()
        lines = [
            f"# {self.name}",
            "",
            f"{self.task}: {self.metric} on {self.n_test} test samples, {len(self.cells) - 1} compressed models, "
            f"measured on {self.device}.",
            "",
            *_markdown_table(header, rows),
            "",
            *(f"- {self.failure(cell)}" for cell in self.failed),
        ]
        if self.failed:
            lines.append("")
        lines += [f"{self.note}", "", "![The sweep](figures/sweep.svg)", ""]
        return "\n".join(lines)

    @staticmethod
    def failure(cell: Mapping[str, Any]) -> str:
        """A sentence on a cell that ended without a model."""
        return f"{cell['scheme']} at density {cell['density_asked']:g}, run {cell['repeat']}: {cell['reason']}"

    @property
    def note(self) -> str:
        """A warning, shown with the table, not to select models by scores on test."""
        return (
            "Scores on test are for comparing. Who chooses the best row by them has used the test data up: "
            "autocompress tune searches on val and proves its answer on test."
        )

    def to_json(self) -> dict[str, Any]:
        """The content of ``result.json``: JSON types only."""
        return {"kind": "sweep", **asdict(self), "folder": str(self.folder)}

    @classmethod
    def from_json(cls, found: Mapping[str, Any], folder: Path) -> "Sweep":
        """A sweep from the result of `to_json`, with its present folder."""
        stored: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
        del stored["kind"]
        return cls(**stored | {"folder": folder})


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    return [line(header), line(["---"] * len(header)), *map(line, rows)]
