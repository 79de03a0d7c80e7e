"""What SECURITY.md promises of the code: nothing that a file or an option says is executed."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [
    file for home in ("autocompress", "schemes", "objectives") for file in sorted((ROOT / home).rglob("*.py"))
]
# Calls between processes of a study or of a test.
OF_OUR_OWN = {"parcel.py", "parity.py", "testing.py", "second_process.py"}


def dangers(source: str) -> Iterator[str]:
    """The calls that could run what they are given."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if called in ("eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "joblib.load"):
            yield called
        if called.rpartition(".")[0] in ("pickle", "cloudpickle", "dill") and "load" in called:
            yield called
        if called == "torch.load" and given.get("weights_only") != "True":
            yield "torch.load without weights_only"
        if called in ("np.load", "numpy.load") and given.get("allow_pickle") != "False":
            yield "np.load with pickle"
        if given.get("shell") == "True":
            yield f"{called} in a shell"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_nothing_is_executed(file: Path) -> None:
    if file.name not in OF_OUR_OWN:
        assert list(dangers(file.read_text(encoding="utf-8"))) == []


def test_what_would_execute_is_found() -> None:
    source = "eval(x)\npickle.loads(b)\ntorch.load(f)\nnp.load(f)\nrun(c, shell=True)\n"
    assert list(dangers("torch.load(f, weights_only=True)")) == []
    assert len(list(dangers(source))) == 5


def test_mlflow_is_imported_late_and_sends_nothing_home() -> None:
    code = (
        "import sys\n"
        "import autocompress.tracking\n"
        "from autocompress.experiments.mlflow_store import quiet_mlflow\n"
        "assert 'mlflow' not in sys.modules\n"
        "with quiet_mlflow():\n"
        "    from mlflow.telemetry.utils import is_telemetry_disabled\n"
        "    assert is_telemetry_disabled()\n"
    )
    hidden = ("CI", "MLFLOW_DISABLE_TELEMETRY")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=300)
