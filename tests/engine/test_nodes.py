"""A real server over two nodes, started as on other machines."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from r1mega.launch.ports import free_port
from r1mega.models import hf_fields
from r1mega.types import Request, SamplingParams
from r1mega.weights.engine_layout import EngineLayout

sys.path.insert(0, str(Path(__file__).parent))
from fleets import Servers, disk_publisher, exporting, servers

pytestmark = [pytest.mark.extended, pytest.mark.timeout(600)]  # two starts of three processes each, twice


def processes(fleet: Servers) -> list[psutil.Process]:
    """Of the server: the first of each node, then what these have started. They are in no group of the launcher's."""
    meeting = f"127.0.0.1:{fleet.config.sglang.first_port + 1}"
    roots = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "sglang.launch_server" in words and meeting in words and "-I" not in words:
            roots.append(process)
    assert len(roots) == 2
    return roots + [child for root in roots for child in root.children(recursive=True)]


def node_rank(process: psutil.Process) -> str:
    words = process.cmdline()
    return words[words.index("--node-rank") + 1]


def test_a_server_over_two_nodes_loses_one(checkpoint, sglang_python, tmp_path, alone, record_property) -> None:
    """Its processes are started by what stands for ssh, in sessions of their own. Both ranks hold what is published."""
    source = checkpoint("qwen2")
    options = {
        "rollout__engines": 1, "sglang__tp": 2, "sglang__nodes_per_engine": 2, "sglang__first_port": free_port(),
        "sglang__hosts": ["127.0.0.1", "127.0.0.1"], "sglang__remote": "setsid --wait env R1MEGA_HOST={host}",
        "sglang__weights_dir": str(tmp_path / "shared"),
    }  # fmt: skip
    with servers(source, tmp_path / "run", sglang_python, **options) as fleet:
        client, (engine,) = fleet.client(), fleet.engines
        fields = hf_fields.read(source)
        began = time.monotonic()
        client.wait_until_ready()
        record_property("ready after s", time.monotonic() - began)
        disk_publisher(fleet, client, fields, EngineLayout(tp=2), alone).publish(exporting(source), 1)
        asked = [Request(i, (256, *range(i, i + 8)), 4) for i in range(20)]
        assert len(client.generate(asked, SamplingParams(max_tokens=8))) == 80
        before = processes(fleet)
        (second,) = [process for process in before[:2] if node_rank(process) == "1"]
        began = time.monotonic()
        os.kill(second.pid, signal.SIGKILL)
        while (engine.starts == 1 or not engine.answered) and time.monotonic() < began + 200 and fleet.fault is None:
            time.sleep(0.1)
        assert fleet.fault is None and engine.starts == 2, fleet.fault
        record_property("started again after s", time.monotonic() - began)
        # Asked before the trainer could have given it anything.
        assert httpx.get(f"{engine.url}/model_info").json()["weight_version"] == "1"
        assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in before)
        found = client.generate(asked, SamplingParams(max_tokens=8))
        assert [(c.key, c.index, c.weight_version) for c in found] == [(i, j, 1) for i in range(20) for j in range(4)]
        after = processes(fleet)
    deadline = time.monotonic() + 20
    while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in after):
        assert time.monotonic() < deadline, "processes of the server live on"
        time.sleep(0.1)
