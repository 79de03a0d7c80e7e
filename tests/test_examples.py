"""The examples run as they stand, from another folder, and write nothing outside it."""

import os
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
PRINTS = {
    "own_model.py": ("my-digits-StructPrune", "compressed: ", "Linear(in_features="),
    "custom_objective.py": ("s to the first answer",),
}


def test_every_example_is_run_here() -> None:
    assert {file.name for file in EXAMPLES.glob("*.py")} == set(PRINTS)


@pytest.mark.parametrize("name", [pytest.param("own_model.py", marks=pytest.mark.slow), "custom_objective.py"])
def test_example(name: str, warm: Any, tmp_path: Path) -> None:
    done = warm.run([str(EXAMPLES / name)], tmp_path, {**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.status == 0, done.stderr
    for text in PRINTS[name]:
        assert text in done.stdout
    assert [file.name for file in tmp_path.iterdir()] == ["autocompress-runs"]
