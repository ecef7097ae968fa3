"""The status page's script, run by Node on what the controller really serves (a browser is not needed to draw SVG)."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from rl_autoscale.serving.decision_log import finite
from rl_autoscale.serving.status_server import describe

pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")


def draw(records, repository: Path, tmp_path: Path):
    data = tmp_path / "status.json"
    data.write_text(json.dumps({"interval_s": 10.0, "steps": [finite(describe(record)) for record in records]}))
    page = repository / "rl_autoscale" / "serving" / "status_page.html"
    script = Path(__file__).parent / "status_page.js"
    done = subprocess.run(["node", script, page, data], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_charts_show_load_replicas_and_what_shadow_would_do(stage, repository, tmp_path):
    show = stage(target=7, mode="shadow")
    show.steps(8)
    seen = draw(show.records, repository, tmp_path)
    assert "would ask for" in seen["replicas-legend"]["text"]
    assert seen["mode"]["text"] == "shadow (asked for)"
    assert len(re.findall("<path", seen["replicas"]["svg"])) == 2
    for chart in ("load", "replicas", "queue", "attainment"):
        assert "NaN" not in seen[chart]["svg"]
        assert "undefined" not in seen[chart]["svg"]
    assert "gpu 4 0 0 4 7 7 1 1" in seen["now"]["text"]


def test_an_outage_is_a_gap_in_the_line_and_told_in_words(stage, repository, tmp_path):
    show = stage()
    show.steps(6)
    show.world.fault = "down"
    show.steps(6)
    show.world.fault = None
    show.steps(4)
    seen = draw(show.records, repository, tmp_path)
    (path,) = re.findall(r'<path d="([^"]*)"', seen["load"]["svg"])
    assert path.count("M") == 2
    outage = draw(show.records[:12], repository, tmp_path)
    assert "blind" in outage["why"]["text"]
    assert "connection refused" in outage["problems"]["text"]
    assert outage["breaker"]["text"].startswith("breaker open")
