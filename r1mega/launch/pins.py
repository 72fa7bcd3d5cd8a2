"""The versions that this program is made for. Those of setup.cfg and slurm/Dockerfile are the same; a test says so.

Where PINNED names none, setup.cfg's bounds do.
"""

from __future__ import annotations

from r1mega.rollout.server import ROUTER_VERSION, SGLANG_VERSION

PINNED = {
    "torch": "2.13.0",
    "megatron-core": "0.16.1",
    "transformers": "5.23.0",
    "transformer-engine": "2.11.0",  # megatron-core 0.16.1 wants 2.9 to below 2.12
    "sglang": SGLANG_VERSION,
    "sglang-router": ROUTER_VERSION,
}
# Of https://github.com/NVIDIA/apex. The package named apex on PyPI is another project.
APEX_COMMIT = "6424da3b4faa6c8f062da4a48c424fff3f02d42d"
APEX_INSTALL = (
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation --no-deps "
    f"git+https://github.com/NVIDIA/apex@{APEX_COMMIT}   # never `pip install apex`: that is another project"
)
