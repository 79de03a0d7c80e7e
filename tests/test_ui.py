import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

from autocompress.experiments.replay import replay
from autocompress.experiments.ui import serve_ui
from autocompress.report import write_report
from autocompress.tracking import Tracker

SERVE = """
import sys
from pathlib import Path
from autocompress.experiments.ui import serve_ui
assert "torch" not in sys.modules
sys.exit(serve_ui(Path(sys.argv[1]), say=lambda line: print(line, flush=True)))
"""


def ask(url, body=None, host=None):
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, body and json.dumps(body).encode(), {"Content-Type": "application/json"})
    if host:
        request.add_header("Host", host)
    with direct.open(request, timeout=10) as answer:
        return answer.read()


def processes_of(session):
    """The ids of what still runs in a session (Linux)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def test_the_ui_shows_the_runs_and_ends_without_a_trace(tmp_path):
    out, home = tmp_path / "runs", tmp_path / "home"
    home.mkdir()
    tracker = Tracker(out, "digits")
    tracker.start("study", {"scheme": "Prune"})
    tracker.failed(0, "no reason")
    tracker.finish(artifacts=[Path(__file__)])
    before = set(out.iterdir())
    script = tmp_path / "serve.py"
    script.write_text(SERVE)

    ui = subprocess.Popen(
        [sys.executable, script, out],
        cwd=home,
        env=os.environ | {"HOME": str(home)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert "starting MLflow" in ui.stdout.readline()
        url, page = ui.stdout.readline().split()[-1].split("/#/")
        assert ask(f"{url}/health") == b"OK"
        experiments = json.loads(ask(f"{url}/api/2.0/mlflow/experiments/search?max_results=10"))["experiments"]
        (digits,) = [e["experiment_id"] for e in experiments if e["name"] == "digits"]
        assert page.startswith(f"experiments/{digits}/runs?")
        found = json.loads(ask(f"{url}/api/2.0/mlflow/runs/search", {"experiment_ids": [digits]}))["runs"]
        assert {run["info"]["run_name"] for run in found} == {"study", "trial 000 · failed"}
        listed = json.loads(ask(f"{url}/api/2.0/mlflow/artifacts/list?run_id={tracker.run_id}"))
        assert [file["path"] for file in listed["files"]] == [Path(__file__).name]
        with pytest.raises(urllib.error.HTTPError, match="403"):  # a page elsewhere whose name leads here
            ask(f"{url}/api/2.0/mlflow/experiments/search?max_results=10", host="rebound.example")
        with socket.socket() as elsewhere, pytest.raises(ConnectionRefusedError):
            elsewhere.connect(("127.0.0.2", int(url.rpartition(":")[2])))  # it listens on one address, not on all
        children = Path(f"/proc/{ui.pid}/task/{ui.pid}/children").read_text().split()
        assert children
    finally:
        ui.send_signal(signal.SIGINT)
        code = ui.wait(timeout=20)
        ui.stdout.close()
    assert code == 0
    assert [processes_of(int(child)) for child in children] == [[]]
    assert set(out.iterdir()) == before
    assert list(home.iterdir()) == []


def test_without_studies_it_says_so_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"no mlflow\.db in .*run a study with --out '.*/my runs' first"):
        serve_ui(tmp_path / "my runs")


def test_a_damaged_database_is_refused_at_once(tmp_path):
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 1000)
    start = time.perf_counter()
    with pytest.raises(ValueError, match="cannot be opened: file is not a database"):
        serve_ui(tmp_path)
    assert time.perf_counter() - start < 5


def test_a_taken_port_is_refused(tmp_path):
    tracker = Tracker(tmp_path, "digits")
    tracker.start("study", {})
    tracker.finish()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            serve_ui(tmp_path, port=port)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to open the UI with")
def test_a_browser_finds_the_trials_and_compares_them(recorded, tmp_path):
    out, trials = tmp_path / "runs", recorded.three_trials()
    study = recorded.write_study(out, trials=trials, result=recorded.found(trials))
    write_report(study)
    replay(study)
    command, env = [sys.executable, "-c", SERVE, out], os.environ | {"HOME": str(tmp_path)}
    ui = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    try:
        ui.stdout.readline()
        address = ui.stdout.readline().split()[-1]
        url, page = address.split("/#/")
        experiment = page.split("/")[1]
        found = json.loads(ask(f"{url}/api/2.0/mlflow/runs/search", {"experiment_ids": [experiment]}))["runs"]
        ids = {run["info"]["run_name"]: run["info"]["run_id"] for run in found}
        of_trials = [ids[name] for name in ids if name.startswith("trial")]
        chosen = urllib.parse.quote(json.dumps(of_trials))
        listed = text_of(address, tmp_path)
        compared = text_of(f"{url}/#/compare-runs?runs={chosen}&experiments=%5B%22{experiment}%22%5D", tmp_path)
        logged = text_of(f"{url}/#/experiments/{experiment}/runs/{ids['demo']}/artifacts/report.html", tmp_path)
    finally:
        ui.send_signal(signal.SIGINT)
        ui.wait(timeout=20)
        ui.stdout.close()
    assert "demo" in listed and "drop_pp" in listed and "density" in listed
    assert "Comparing 3 Runs" in compared and "trial 002 · 0.04" in compared
    assert "Parallel Coordinates Plot" in compared and "Scatter Plot" in compared and "density_asked" in compared
    for name in ("report.html", "report.md", "result.json", "figures"):
        assert name in logged


def text_of(url: str, home: Path) -> str:
    """What a page holds after its scripts have run."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={home / 'chromium'}"]
    command += ["--window-size=1600,1200", "--virtual-time-budget=60000", "--dump-dom", url]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
