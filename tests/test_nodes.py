"""Two nodes, each a network namespace of Linux: benchmarks/nodes.py. Skipped where none can be made."""

import json
import subprocess
import sys

import helpers
import pytest

from benchmarks import nodes


@pytest.mark.skipif(bool(nodes.why_not()), reason=nodes.why_not())
@pytest.mark.parametrize("scene", ["trains", "apart"])
def test_two_nodes(tmp_path, scene):
    """They train together; without storage that both see they say so before they do."""
    words = [sys.executable, "benchmarks/nodes.py", "--only", scene, "--out", str(tmp_path / "out")]
    result = subprocess.run(words, cwd=helpers.ROOT, capture_output=True, text=True, timeout=300)
    logs = "".join(path.read_text() for path in sorted((tmp_path / "out").glob("*.log")))
    assert result.returncode == 0, result.stdout + result.stderr + logs
    found = json.loads((tmp_path / "out/nodes.json").read_text())[scene]
    if scene == "trains":
        assert found["codes"] == [0, 0] and "run 60/60" in logs
    else:
        assert found["codes"] == [1, 1] and "rank 1 does not see what rank 0 writes there" in logs
