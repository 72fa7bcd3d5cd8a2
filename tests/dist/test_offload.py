"""Weights, gradients and optimizer state leave the device and come back as they were."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_offloading_frees_memory_and_changes_no_bit(checkpoint, world, dtype):
    source = checkpoint("deepseek_v3", dtype=dtype)
    moved = torch.load(world("offload", source, "tp=2,ep=2", "--dtype", dtype))
    stayed = torch.load(world("offload", source, "tp=2,ep=2", "--dtype", dtype, "--stay"))
    # Weights, fp32 gradients, two moments; with bf16 weights also fp32 master weights, which fp32 ones are themselves.
    per_parameter = 16 if dtype == "float32" else 2 + 16
    assert moved["freed"][0] == moved["freed"][1] >= per_parameter * moved["numel"]
    assert moved["freed"][0] < 1.2 * per_parameter * moved["numel"], "buffers are padded a little"
    assert all(torch.equal(moved["weights"][name], tensor) for name, tensor in stayed["weights"].items())
