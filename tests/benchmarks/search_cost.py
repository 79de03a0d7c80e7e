"""The search against an exhaustive grid: ``python tests/benchmarks/search_cost.py``.

For every seed, of data split, dense network, search and training, the digits are compressed twice: by an
exhaustive grid of 20 densities, each recovered from the dense model with the whole budget, and by the default
search, or with ``--cheap`` by cheap trials. Prints the cost of the search as a share of the grid's gradient steps
(all trials, including the answer's), and the density of its answer divided by that of

- the grid's answer: the same rule, 90% probability to be within the bound, given the grid's 20 trials;
- the oracle: the lowest density of the grid whose network was observed within the bound on val, the luckiest of
  the twenty.

The goal: a share of at most 0.125, and a median density of at most 1.15 times the oracle's. Exit status 1 if not.

At the end it prints the limit for any search: the slope of the drop of the grids' trials around the threshold,
their scatter about that line, and how much denser than the threshold an answer has to be that is within the bound
with 90% probability after the same number of trials, if all of them were at the threshold and the slope were
known.
"""

import argparse
import math
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np

import autocompress as ac

MAX_SHARE, MAX_RATIO = 0.125, 1.15
GRID = {"sampler": "grid", "trials": 20}
AROUND = (0.01, 0.1)  # densities, the threshold of one point near their middle
Z_90 = 1.2816


def study(out: Path, name: str, seed: int, scheme: str, **settings: object) -> ac.Result:
    """The study of that name, continued if it exists."""
    which = "resume" if (out / name / "journal.log").exists() else "name"
    task = ac.digits(seed=seed, cache=out / "cache")
    return ac.tune(task, scheme, seed=seed, out=out, **{which: name}, **settings)  # type: ignore[arg-type]  # settings


def main() -> int:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--scheme", default="StructPrune")
    parser.add_argument("--trials", type=int, help="of the search, in place of the default")
    parser.add_argument("--cheap", action="store_true", help="search by cheap trials")
    parser.add_argument("--out", type=Path, help="keeps the studies, and goes on with those that are there")
    given = parser.parse_args()
    searched: dict[str, object] = {"cheap_trials": given.cheap}
    searched |= {"trials": given.trials} if given.trials else {}
    shares, ratios, of_rule, grids = [], [], [], []
    print("seed  share of steps  trials  density  drop val, test [pp]   grid's answer  drop val, test   oracle")
    with tempfile.TemporaryDirectory() as temporary:
        out = given.out or Path(temporary)
        for seed in range(given.seeds):
            grid = study(out, f"grid-{given.scheme}-{seed}", seed, given.scheme, **GRID)
            found = study(out, f"search-{given.scheme}-{seed}", seed, given.scheme, **searched)
            grids.append(grid)
            oracle = min(record.density for record in grid.records if record.feasible)
            shares.append(sum(r.steps for r in found.records) / sum(r.steps for r in grid.records))
            ratios.append(found.density / oracle)
            of_rule.append(found.density / grid.density)
            print(
                f"{seed:4d}  {shares[-1]:14.3f}  {len(found.records):6d}  {found.density:7.4f}  {drops(found)}"
                f"   {grid.density:13.4f}  {drops(grid)}   {oracle:.4f}",
                flush=True,
            )
    share, ratio = statistics.mean(shares), statistics.median(ratios)
    print(f"mean share of the grid's steps {share:.3f} (goal: {MAX_SHARE})")
    print(f"median density over the oracle's {ratio:.2f} (goal: {MAX_RATIO}), ", end="")
    print(f"over that of the grid's answer {statistics.median(of_rule):.2f}")
    slope, scatter = steepness(grids)
    least = math.exp(Z_90 * scatter / slope / math.sqrt(20 * share))
    print(
        f"around the threshold the drop rises by {slope:.2f} pp for each factor e of density, trials scatter by ",
        end="",
    )
    print(f"{scatter:.2f} pp: {20 * share:.1f} trials cannot know it better than to a factor {least:.2f}")
    return 0 if share <= MAX_SHARE and ratio <= MAX_RATIO else 1


def steepness(grids: list[ac.Result]) -> tuple[float, float]:
    """How steeply the drop on val rises around the threshold, and the trials' scatter about it, in points.

    Least squares: one line in the logarithm of the density for all grids, each at a height of its own.
    """
    low, high = AROUND
    near = [(i, r) for i, grid in enumerate(grids) for r in grid.records if low <= r.density <= high]
    drop = np.array([100 * record.drop for _, record in near])
    columns = [[float(i == which) for i, _ in near] for which in range(len(grids))]
    design = np.array([[math.log(record.density) for _, record in near], *columns]).T
    found = np.linalg.lstsq(design, drop, rcond=None)[0]
    scatter = math.sqrt(float(((drop - design @ found) ** 2).sum()) / (len(drop) - design.shape[1]))
    return -float(found[0]), scatter


def drops(result: ac.Result) -> str:
    """The answer's drop on val and on test, in points."""
    on_test = 100 * result.certificate.drop if result.certificate else float("nan")
    return f"{100 * result.drop_val:9.2f} {on_test:9.2f}  "


if __name__ == "__main__":
    sys.exit(main())
