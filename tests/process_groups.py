"""Real process groups for tests: jobs under torchrun on gloo ranks, started as the product starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent


def run_ranks(ranks: int, module: str, config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run `module.main(config)` on `ranks` ranks through bridge.job and return its report, an error's too.

    Modules beside this file and in its folders are found by their dotted names. One start takes about ten
    seconds, so a job should answer several tests.
    """
    folder.mkdir(parents=True, exist_ok=True)
    job, report = folder / "job.json", folder / "report.json"
    job.write_text(json.dumps({**config, "report": str(report)}))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    finished = subprocess.run(
        [sys.executable, *launcher, "-m", "bridge.job", module, str(job)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS), "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert report.is_file(), finished.stderr[-4000:]
    return json.loads(report.read_text())
