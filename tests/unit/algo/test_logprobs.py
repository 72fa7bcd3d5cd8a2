"""Also a program: `python test_logprobs.py RANK SIZE FOLDER` is one rank of the tests over several processes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from r1mega.algo.logprobs import (
    head_logprobs,
    logprobs_and_entropy,
    vocab_parallel_entropy,
    vocab_parallel_logprobs,
)

NUM_TOKENS, PADDED_VOCAB, VOCAB = 37, 24, 19  # cut in two, the second rank has 7 real columns
DTYPES = {torch.float64: 1e-12, torch.float32: 2e-6}


def case(dtype=torch.float32, vocab=PADDED_VOCAB, real=VOCAB, num_tokens=NUM_TOKENS):
    generator = torch.Generator().manual_seed(11)
    logits = 4 * torch.randn(num_tokens, vocab, dtype=torch.double, generator=generator)
    target = torch.randint(real, (num_tokens,), generator=generator)
    incoming = torch.randn(num_tokens, dtype=torch.double, generator=generator)
    return logits.to(dtype), target, incoming.to(dtype)


def independent(logits, target, incoming, *, real=None, temperature=1.0):
    """Log-probs, entropy and gradient in fp64 by torch's own log_softmax and autograd."""
    leaf = logits.double().requires_grad_()
    table = torch.log_softmax(leaf[:, :real] / temperature, -1)
    logprobs = table[torch.arange(len(target)), target]
    logprobs.backward(incoming.double())
    return logprobs.detach(), -(table.exp() * table).sum(-1).detach(), leaf.grad


def test_hand_worked():
    # logits log 1, log 2, log 5: probabilities 1/8, 2/8, 5/8
    logits = torch.tensor([[1.0, 2.0, 5.0]], dtype=torch.double).log().requires_grad_()
    logprobs, entropy = logprobs_and_entropy(logits, torch.tensor([1]))
    assert logprobs.item() == pytest.approx(math.log(2 / 8))
    assert entropy.item() == pytest.approx(-sum(p * math.log(p) for p in (1 / 8, 2 / 8, 5 / 8)))
    logprobs.backward(torch.tensor([2.0], dtype=torch.double))
    assert logits.grad[0].tolist() == pytest.approx([-2 / 8, 2 * 6 / 8, -2 * 5 / 8])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("real", [None, VOCAB])
@pytest.mark.parametrize("chunk_tokens", [1, 8, 37, 1000])
def test_equals_torch_whatever_the_chunks(dtype, temperature, real, chunk_tokens):
    logits, target, incoming = case(dtype)
    expected, expected_entropy, expected_gradient = independent(
        logits, target, incoming, real=real, temperature=temperature
    )
    leaf = logits.requires_grad_()
    options = {"temperature": temperature, "chunk_tokens": chunk_tokens, "vocab_size": real}
    logprobs, entropy = logprobs_and_entropy(leaf, target, **options)
    logprobs.backward(incoming)
    tolerance = {"rtol": DTYPES[dtype], "atol": DTYPES[dtype]}
    assert logprobs.dtype == dtype and not entropy.requires_grad
    assert torch.allclose(logprobs.double(), expected, **tolerance)
    assert torch.allclose(entropy.double(), expected_entropy, **tolerance)
    assert torch.allclose(leaf.grad.double(), expected_gradient, **tolerance)
    assert torch.equal(vocab_parallel_entropy(leaf, **options), entropy)
    assert torch.equal(vocab_parallel_logprobs(leaf, target, **options), logprobs)
    if real is not None:
        assert not leaf.grad[:, real:].any()
        padded = independent(logits.detach(), target, incoming, temperature=temperature)
        assert not torch.allclose(logprobs.double(), padded[0], rtol=1e-3)


def test_bf16_logits_are_computed_in_fp32_and_get_bf16_gradients():
    logits, target, incoming = case(torch.bfloat16)
    expected, _, expected_gradient = independent(logits, target, incoming)
    leaf = logits.requires_grad_()
    logprobs = vocab_parallel_logprobs(leaf, target, chunk_tokens=8)
    assert logprobs.dtype == torch.float32
    assert torch.allclose(logprobs.double(), expected, rtol=2e-6, atol=2e-6)
    logprobs.backward(incoming.float())
    assert leaf.grad.dtype == torch.bfloat16
    assert torch.allclose(leaf.grad.double(), expected_gradient, rtol=2**-8, atol=1e-6)  # one bf16 rounding
    # negative control: a softmax in bf16 is not that close
    assert not torch.allclose(
        torch.log_softmax(logits, -1).gather(1, target[:, None])[:, 0].double(), expected, rtol=1e-4
    )


def test_large_logits_neither_overflow_nor_vanish():
    logits = torch.tensor([[1000.0, 999.0, -1000.0], [-3e4, -3e4, -3e4]], requires_grad=True)
    logprobs, entropy = logprobs_and_entropy(logits, torch.tensor([1, 2]))
    assert logprobs.tolist() == pytest.approx([-1 - math.log1p(math.exp(-1)), -math.log(3)], rel=1e-4)
    assert entropy.isfinite().all()
    logprobs.sum().backward()
    assert logits.grad.isfinite().all()


def test_views_that_are_not_contiguous():
    """The output of a model that puts the sequence first is a transposed view."""
    logits, target, incoming = case(num_tokens=36)
    sequence_first = logits.view(4, 9, PADDED_VOCAB).transpose(0, 1).contiguous().requires_grad_()
    flat = sequence_first.transpose(0, 1).reshape(36, PADDED_VOCAB)
    vocab_parallel_logprobs(flat, target).backward(incoming)
    transposed = logits.t().contiguous().t().requires_grad_()
    assert not transposed.is_contiguous()
    vocab_parallel_logprobs(transposed, target, chunk_tokens=5).backward(incoming)
    expected = independent(logits, target, incoming)[2].float()
    assert torch.allclose(transposed.grad, expected, rtol=2e-6, atol=2e-6)
    assert torch.allclose(sequence_first.grad.transpose(0, 1).reshape(36, -1), expected, rtol=2e-6, atol=2e-6)


def test_a_target_outside_the_vocabulary_has_probability_zero():
    logits = torch.zeros(3, 4)
    logprobs = vocab_parallel_logprobs(logits, torch.tensor([-1, 3, 0]), vocab_size=3)
    assert logprobs.tolist() == [-math.inf, -math.inf, pytest.approx(-math.log(3))]


def test_no_tokens():
    logits = torch.zeros(0, 4, requires_grad=True)
    logprobs, entropy = logprobs_and_entropy(logits, torch.zeros(0, dtype=torch.long))
    assert logprobs.shape == entropy.shape == (0,)
    logprobs.sum().backward()
    assert logits.grad.shape == (0, 4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_no_temporary_of_the_size_of_the_logits(temperature):
    """Peak CPU memory of both passes, from the profiler's allocations: the gradient, and a few chunks."""
    num_tokens, vocab, chunk = 2048, 512, 64
    logits = torch.randn(num_tokens, vocab, requires_grad=True)
    target = torch.randint(vocab, (num_tokens,))
    matrix, chunk_bytes, vectors = 4 * num_tokens * vocab, 4 * chunk * vocab, 20 * 8 * num_tokens

    def peak_bytes(function):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            function()
        held = highest = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                highest = max(highest, held)
        return highest

    def forward(chunk_tokens):
        with torch.no_grad():
            logprobs_and_entropy(logits, target, temperature=temperature, chunk_tokens=chunk_tokens)

    def both():
        logprobs = vocab_parallel_logprobs(logits, target, temperature=temperature, chunk_tokens=chunk)
        torch.autograd.grad(logprobs.sum(), logits)

    def both_by_torch():
        table = torch.log_softmax(logits / temperature, -1)
        torch.autograd.grad(table.gather(1, target[:, None]).sum(), logits)

    assert peak_bytes(lambda: forward(chunk)) <= 3 * chunk_bytes + vectors < matrix / 2
    assert matrix <= peak_bytes(both) <= matrix + 2 * chunk_bytes + vectors
    # negative controls: all tokens as one chunk, and torch's own functions
    assert peak_bytes(lambda: forward(num_tokens)) >= 2 * matrix
    assert peak_bytes(both_by_torch) >= 2 * matrix


def test_keeps_the_logits_the_targets_and_two_numbers_a_token_for_backward():
    logits, target, _ = case()
    logits.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        vocab_parallel_logprobs(logits, target)
    assert sorted(tensor.numel() for tensor in kept) == [NUM_TOKENS] * 3 + [logits.numel()]
    assert any(tensor.data_ptr() == logits.data_ptr() for tensor in kept)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature: got 0.0; must be > 0"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"chunk_tokens": 0}, "chunk_tokens: got 0"),
        ({"vocab_size": 5}, "vocab_size: got 5; must be from 1 to 4"),
        ({"vocab_size": 0}, "vocab_size: got 0"),
    ],
)
def test_refuses_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        vocab_parallel_logprobs(torch.zeros(1, 4), torch.zeros(1, dtype=torch.long), **options)


@pytest.mark.parametrize("chunk_tokens", [1, 5, 37, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_from_hidden_states_equals_torch_whatever_the_chunks(chunk_tokens, temperature):
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(NUM_TOKENS, 6, generator=generator, dtype=torch.double)
    weight = torch.randn(PADDED_VOCAB, 6, generator=generator, dtype=torch.double)
    _, target, incoming = case(torch.double)
    leaves = [value.clone().requires_grad_() for value in (hidden, weight)]
    table = torch.log_softmax((leaves[0] @ leaves[1].T)[:, :VOCAB] / temperature, -1)
    table[torch.arange(NUM_TOKENS), target].backward(incoming)
    mine = [value.clone().requires_grad_() for value in (hidden, weight)]
    options = {"temperature": temperature, "chunk_tokens": chunk_tokens, "vocab_size": VOCAB}
    logprobs, entropy = head_logprobs(*mine, target, **options)
    logprobs.backward(incoming)
    assert torch.allclose(logprobs, table[torch.arange(NUM_TOKENS), target], atol=1e-12)
    assert torch.allclose(entropy, -(table.exp() * table).sum(-1), atol=1e-12)
    for leaf, expected in zip(mine, leaves, strict=True):
        assert torch.allclose(leaf.grad, expected.grad, atol=1e-12)
    # negative control: the gradient of the padding columns is zero, that of the others is not
    assert not mine[1].grad[VOCAB:].any() and mine[1].grad[:VOCAB].any()


def test_no_tokens_of_hidden_states():
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.ones(8, 4, requires_grad=True)
    logprobs, entropy = head_logprobs(hidden, weight, torch.zeros(0, dtype=torch.long))
    assert logprobs.shape == entropy.shape == (0,)
    logprobs.sum().backward()
    assert not weight.grad.any()


MEASURE = """
import re, sys, torch
from r1mega.algo.logprobs import head_logprobs
tokens, vocab, width, chunk = 8192, 129280, 16, int(sys.argv[1])
torch.set_num_threads(2)
hidden = torch.randn(tokens, width, dtype=torch.bfloat16, requires_grad=True)
weight = torch.randn(vocab, width, dtype=torch.bfloat16, requires_grad=True)
target = torch.randint(vocab, (tokens,))
def peak():  # KiB; getrusage would count the process this one was forked from
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
def run(count, chunk):
    head_logprobs(hidden[:count], weight, target[:count], chunk_tokens=chunk)[0].sum().backward()
run(64, 32)
def grown(since):  # in bf16 logits of one chunk
    return (peak() - since) * 1024 / (chunk * vocab * 2)
before = peak()
# A processor without bf16 products has the library hold the product in fp32 as well: that is not ours to save.
hidden.detach()[:chunk] @ weight.detach().T
library = max(0.0, grown(before) - 1)
run(tokens, chunk)
print(grown(before) - library)
"""


@pytest.mark.timeout(250)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_the_memory_of_a_real_vocabulary():
    """8,192 tokens of DeepSeek's vocabulary: the process grows by less than twice the bf16 logits of one chunk.

    The whole logits would be eight such chunks in bf16, sixteen in fp32. That the measure sees what is held shows
    in its lower bound.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, "1024"], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) < 1.9


@pytest.mark.timeout(120)
def test_cut_over_processes_equals_one_process(tmp_path):
    """Also where the vocabulary ends within the second rank's columns, and before them."""
    size = 2
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(size), str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        errors = [rank.communicate(timeout=100)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * size, "\n".join(errors)

    logits, target, incoming = case()
    columns = PADDED_VOCAB // size
    for real, temperature in ((None, 1.0), (VOCAB, 0.7), (columns, 1.0)):
        expected = independent(logits, target % (real or PADDED_VOCAB), incoming, real=real, temperature=temperature)
        shards = [torch.load(tmp_path / f"{rank}-{real}-{temperature}.pt") for rank in range(size)]
        for shard in shards:
            for got, wanted in zip(shard[:2], expected[:2], strict=True):
                assert torch.allclose(got.double(), wanted, rtol=2e-6, atol=2e-6)
            assert torch.equal(shard[0], shards[0][0])
        gradient = torch.cat([shard[2] for shard in shards], 1).double()
        assert torch.allclose(gradient, expected[2], rtol=2e-6, atol=2e-6)
        # negative control: a shard alone is not the whole
        alone = vocab_parallel_logprobs(logits[:, :columns], target.clamp(max=columns - 1))
        assert real == columns or not torch.allclose(alone.double(), expected[0], rtol=1e-2)


def worker(rank, size, folder):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    logits, target, incoming = case()
    columns = PADDED_VOCAB // size
    for real, temperature in ((None, 1.0), (VOCAB, 0.7), (columns, 1.0)):
        leaf = logits[:, rank * columns : (rank + 1) * columns].clone().requires_grad_()
        logprobs, entropy = logprobs_and_entropy(
            leaf,
            target % (real or PADDED_VOCAB),
            group=dist.group.WORLD,
            temperature=temperature,
            chunk_tokens=8,
            vocab_size=real,
        )
        logprobs.backward(incoming)
        torch.save((logprobs.detach(), entropy, leaf.grad), Path(folder) / f"{rank}-{real}-{temperature}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    worker(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
