"""The default job, seed by seed: wall time, density and drops. Fails where it misses what is promised.

    python tests/benchmarks/default_job.py [SEEDS]

Promised on two CPU cores: at most 60 s of wall time, density at most 0.12, at most 1 point lost on val.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMAND = ("tune", "--scheme", "StructPrune", "--max-drop", "1%", "--json", "--quiet")
MAX_SECONDS, MAX_DENSITY, MAX_DROP_PP = 60.0, 0.12, 1.0


def main() -> int:
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    program = str(Path(sys.executable).with_name("autocompress"))
    missed = 0
    print("seed  seconds  density  val pp  test pp  upper pp  verdict")
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as out:  # a fresh one: the dense model is trained each time
            began = time.monotonic()
            done = subprocess.run(
                [program, *COMMAND, "--seed", str(seed), "--out", out], stdout=subprocess.PIPE, text=True
            )
            seconds = time.monotonic() - began
            result = json.loads(done.stdout)
        drop = result["drop_pp"]
        tested = [f"{drop[key]:7.2f}" if drop[key] is not None else "    n/a" for key in ("test", "upper")]
        held = seconds <= MAX_SECONDS and result["density"] <= MAX_DENSITY and drop["val"] <= MAX_DROP_PP
        missed += not (held and done.returncode == 0)
        print(
            f"{seed:4d}  {seconds:7.1f}  {result['density']:7.4f}  {drop['val']:6.2f}  {tested[0]}  {tested[1]}"
            f"   {result['verdict']}{'' if held else '   MISSED'}",
            flush=True,
        )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
