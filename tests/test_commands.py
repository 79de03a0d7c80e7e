"""The small commands, called in this process on studies that were made up."""

import json
import os
import re
import subprocess
import sys

import pytest
from click.testing import CliRunner

from autocompress.cli import cli


def call(*argv: object):
    """What a command printed, and how it ended; an error of ours is a ValueError here, as `main` gets it."""
    return CliRunner().invoke(cli, [str(word) for word in argv])


@pytest.fixture
def home(recorded, tmp_path):
    trials = recorded.three_trials()
    recorded.write_study(tmp_path, "digits-a", trials=trials, result=recorded.found(trials))
    recorded.write_study(tmp_path, "killed")
    return tmp_path


def test_show_prints_the_result_again(home):
    for run in ("digits-a", "dig"):
        done = call("show", run, "--out", home)
        assert done.exit_code == 0, done.output
        assert "Met on validation, not certifiable." in done.output
        assert re.search(r"parameters +10,000 +400 +25\.00x", done.output)
    assert json.loads(call("show", "dig", "--out", home, "--json").output)["answer"] == 2


def test_what_the_encoding_of_stdout_lacks_is_replaced(home):
    home.rename(out := home.parent / "Präparate")
    command = [sys.executable, "-m", "autocompress", "show", "digits-a", "--out", str(out)]
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Pr?parate/digits-a" in done.stdout


def test_show_of_a_study_without_a_result_says_what_to_do(home, monkeypatch):
    monkeypatch.chdir(home.parent)
    home.rename(spaced := home.parent / "my studies")
    done = call("show", "killed", "--out", spaced)
    assert done.exit_code == 2
    again = "autocompress tune --resume killed --out 'my studies' goes on with it"
    assert f"has no result; {again}" in " ".join(done.output.split())


def test_a_study_that_is_not_there_is_named_with_those_that_are(home, tmp_path):
    for command in ("show", "report", "replay"):
        done = call(command, "nope", "--out", home)
        assert done.exit_code == 2
        assert "there is no study 'nope'" in done.output and "digits-a, killed" in " ".join(done.output.split())
    done = call("list", "--out", tmp_path / "none")
    assert done.exit_code == 2 and "there are no studies in" in done.output


def test_list_shows_every_study_even_a_broken_one(home):
    (home / "digits-a" / "result.json").write_text("{")
    (home / "not-a-study").mkdir()
    done = call("list", "--out", home)
    assert done.exit_code == 0, done.output
    names = [line.split()[0] for line in done.stdout.splitlines()[1:]]
    assert sorted(names) == ["digits-a", "killed"]
    assert "note: " in done.stderr and "result.json is damaged" in done.stderr


def test_report_writes_the_files_it_names(home):
    done = call("report", "digits-a", "--out", home)
    assert done.exit_code == 0, done.output
    assert [line.rpartition("/")[2] for line in done.output.split()] == ["report.html", "report.md", "figures"]
    assert (home / "digits-a" / "report.html").is_file()
    assert {path.name for path in home.iterdir()} - {"cache"} == {"digits-a", "killed"}  # fonts are in the cache


def test_a_study_is_replayed_where_it_was_to_be_logged(recorded, tmp_path):
    trials = recorded.three_trials()
    settings = recorded.asked() | {"tracking_uri": "http://127.0.0.1:9"}
    recorded.write_study(tmp_path, "far", settings=settings, trials=trials, result=recorded.found(trials))
    done = call("replay", tmp_path / "far")  # by its path: it is not in the default folder
    assert str(done.exception) == "MLflow: http://127.0.0.1:9 does not answer"


def test_doctor_names_versions_devices_and_what_is_missing(home):
    import torch

    done = call("doctor", "--out", home)
    assert done.exit_code == 0, done.output
    assert re.search(rf"^  torch +{re.escape(torch.__version__.partition('+')[0])}", done.output, re.MULTILINE)
    assert re.search(r"^  processor +.* cores", done.output, re.MULTILINE)
    assert re.search(rf"^  out +{re.escape(str(home))} can be written", done.output, re.MULTILINE)
    assert all(line[19] == " " != line[20] for line in done.output.splitlines()), "columns that run together"
    if not torch.cuda.is_available():
        assert re.search(r"^- CUDA +", done.output, re.MULTILINE)
        assert re.search(r"^- NVML +.*no GPU memory, utilization, power or energy is measured", done.output, re.M)


def test_doctor_says_what_has_to_be_mended(tmp_path):
    (tmp_path / "file").touch()
    done = call("doctor", "--out", tmp_path / "file" / "runs")
    assert done.exit_code == 1
    assert re.search(r"^! out +cannot write to", done.output, re.MULTILINE)


def test_an_extra_that_is_not_installed_is_a_note_with_the_remedy(monkeypatch):
    from autocompress.terminal import doctor

    class Installed:
        requires = ('torch>=2; extra == "x"', 'nothing-like-it>=1; extra == "fast"', "neither-this")

    monkeypatch.setattr(doctor, "distribution", lambda name: Installed)
    assert list(doctor._requirements()) == [
        ("extra fast", "nothing-like-it not installed; pip install 'autocompress[fast]'", "note"),
        ("dependencies", "neither-this not installed; pip install neither-this", "problem"),
    ]


LOADED = """
import sys
from click.testing import CliRunner
from autocompress.cli import cli
assert CliRunner().invoke(cli, sys.argv[1:]).exit_code == 0
print(sorted({"torch", "mlflow", "optuna", "matplotlib"} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    ("command", "loaded"), [("list", "[]"), ("show digits-a", "[]"), ("report digits-a", "['matplotlib']")]
)
def test_looking_at_studies_loads_no_torch(home, command, loaded):
    argv = [sys.executable, "-c", LOADED, *command.split(), "--out", str(home)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == loaded


def test_where_there_is_no_room_for_a_cache_the_report_is_drawn_without_advice(home):
    (home / "cache").touch()  # like a folder that cannot be written, which the superuser's can
    command = [sys.executable, "-m", "autocompress", "report", "digits-a", "--out", str(home)]
    env = {name: value for name, value in os.environ.items() if name != "MPLCONFIGDIR"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert (home / "digits-a" / "figures").is_dir()


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), (["show", "nothing"], 2)])
def test_the_process_ends_with_its_status_and_all_that_was_said(arguments, status, tmp_path):
    program = "import atexit; from autocompress.__main__ import run; atexit.register(print, 'at exit'); run()"
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == status
    assert done.stdout.splitlines()[-1] == "at exit"
    assert done.stderr.startswith("Error: ") == (status == 2)
