"""Every experiment on every cluster that ships: it fits, or pairs.yaml says which fields speak against it.

`make snapshots` writes pairs.yaml anew; its difference is part of the review of any change to conf/.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hydra import compose
from omegaconf import OmegaConf

from r1mega.config import io
from r1mega.config.registry import conf_dir, options
from r1mega.config.schema_cluster import ClusterConfig
from r1mega.launch import preflight

PAIRS = Path(__file__).parent / "pairs.yaml"
HEADER = """\
# Which clusters each experiment fits as it ships, and for the others the fields that the checks name. Another layout
# (parallel=, parallel.dp=) makes most experiments fit most clusters. cluster=local is a machine of unknown size, which
# fits all. Whether memory suffices is for `r1mega plan` to say. Written by `make snapshots`.
"""


def cluster_of(name: str) -> ClusterConfig:
    """What an option file of the group gives; read without Hydra, which takes half a second for each."""
    given = OmegaConf.load(conf_dir() / "cluster" / f"{name}.yaml")
    given = given.get("cluster", given)  # of a file that speaks of other sections too
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ClusterConfig), given))


def test_every_experiment_on_every_cluster(experiment) -> None:
    clusters = {name: cluster_of(name) for name in options()["cluster"]}
    found: dict[str, dict[str, list[str]]] = {}
    for name in options()["experiment"]:
        config, pairs = experiment(name), found.setdefault(name, {"fits": []})
        for cluster, sizes in clusters.items():
            faults = preflight.find(replace(config, cluster=sizes), here=False)
            places = sorted({str(fault).partition(":")[0] for fault in faults})
            pairs.setdefault(" ".join(places) or "fits", []).append(cluster)
    text = HEADER + yaml.safe_dump(found, sort_keys=False, width=1000, default_flow_style=None)
    if os.environ.get("R1MEGA_WRITE_SNAPSHOTS"):
        PAIRS.write_text(text)
    assert text == PAIRS.read_text(), "pairs.yaml differs: run `make snapshots` and review the difference"
    assert [name for name, pairs in found.items() if not pairs["fits"]] == []


@pytest.mark.parametrize(("name", "cluster"), [("r1_zero", "h100_256x8"), ("toy", "h100_1x8")])
def test_a_pair_is_what_the_command_line_composes(hydra_conf, experiment, name: str, cluster: str) -> None:
    whole = io.typed(compose("config", [f"experiment={name}", f"cluster={cluster}", "run.dir=runs/snapshot"]))
    assert whole == replace(experiment(name), cluster=cluster_of(cluster))
