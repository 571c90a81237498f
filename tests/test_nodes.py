"""Two nodes, each a network namespace of Linux: benchmarks/nodes.py. Skipped where none can be made."""

import json
import subprocess
import sys

import helpers
import pytest

from benchmarks import nodes


@pytest.mark.skipif(bool(nodes.why_not()), reason=nodes.why_not())
def test_two_nodes(tmp_path):
    """They train together; without storage that both see they say so before they do. Both scenes at once: one waits
    most of the time."""
    jobs = {}
    for scene in ("trains", "apart"):
        words = [sys.executable, "benchmarks/nodes.py", "--only", scene, "--out", str(tmp_path / scene)]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        jobs[scene] = subprocess.Popen(words, cwd=helpers.ROOT, **pipes)
    found = {}
    logs = {}
    for scene, job in jobs.items():
        output, _ = job.communicate(timeout=300)
        logs[scene] = "".join(path.read_text() for path in sorted((tmp_path / scene).glob("*.log")))
        assert job.returncode == 0, output + logs[scene]
        found[scene] = json.loads((tmp_path / scene / "nodes.json").read_text())[scene]
    assert found["trains"]["codes"] == [0, 0] and "run 60/60" in logs["trains"]
    assert found["apart"]["codes"] == [1, 1]
    assert "rank 1 does not see what rank 0 writes there" in logs["apart"]
    assert not list(tmp_path.glob("apart/apart-*/run/checkpoints"))
