"""The probe of a publish: rounding and near-ties of experts pass, other weights and engines that fail do not."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from r1mega.weights.probe import LIMITS, PublishProbe, reading
from r1mega.weights.proof import PublishError, publish_twice

LENGTHS = (30, 50, 20)


def logprobs(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [-10 * torch.rand(length, generator=generator) for length in LENGTHS]


def engine(noise: float, seed: int = 1) -> list[list[float]]:
    """The trainer's log-probs, each `noise` off to either side."""
    generator = torch.Generator().manual_seed(seed)
    signs = [torch.randint(0, 2, (length,), generator=generator) * 2 - 1 for length in LENGTHS]
    return [(one.double() + noise * sign).tolist() for one, sign in zip(logprobs(), signs, strict=True)]


@pytest.mark.parametrize("arithmetic", list(LIMITS))
def test_what_is_off_by_rounding_passes_and_by_more_does_not(arithmetic: str) -> None:
    limit = LIMITS[arithmetic]
    good = reading(logprobs(), engine(0.9 * limit), arithmetic)
    assert good.fault is None and good.mean == pytest.approx(0.9 * limit)
    bad = reading(logprobs(), engine(1.1 * limit), arithmetic)
    assert bad.fault is not None and f"at most {limit:g} may ({arithmetic})" in bad.fault


def test_a_tenth_of_the_tokens_may_take_another_expert() -> None:
    found = engine(1e-6)
    for token in range(10):
        found[1][token * 4] += 2.0
    tied = reading(logprobs(), found, "fp32")
    assert tied.fault is None and tied.max == pytest.approx(2.0, rel=1e-4)
    found[2][0] += 2.0
    found[2][1] += 2.0
    assert reading(logprobs(), found, "fp32").fault is not None


def test_the_worst_token_is_named_with_both_numbers() -> None:
    trainer, found = logprobs(), engine(0.01)
    found[1][6] = -25.0
    fault = reading(trainer, found, "fp32").fault
    assert fault is not None
    assert fault.endswith(f"worst in sequence 1 at token 7: trainer {float(trainer[1][6]):.6g}, engine -25")


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_one_number_that_is_none_is_too_many(value: float) -> None:
    found = engine(0.0)
    found[2][3] = value
    assert reading(logprobs(), found, "bf16").fault is not None


def test_an_engine_that_leaves_tokens_out() -> None:
    found = engine(0.0)
    del found[0][-1]
    assert reading(logprobs(), found, "bf16").fault == (
        "gave [29, 50, 20] log-probs of the probe's sequences, not [30, 50, 20]"
    )


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("recovers", [True, False])
def test_every_engine_is_probed_and_a_fault_is_published_again(alone, recovers: bool, capsys) -> None:
    answers = iter([(engine(0.0), engine(1.0)), (engine(0.0), engine(0.0 if recovers else 1.0))])
    sequences = [tuple(range(length + 1)) for length in LENGTHS]

    def ask(asked):
        assert asked == sequences
        return dict(zip(("engine 0 (http://0)", "engine 1 (http://1)"), next(answers), strict=True))

    probe = PublishProbe(sequences, ask, "fp32", alone)
    published = []

    def once() -> list[str]:
        published.append(7)
        return probe.faults(logprobs())

    if recovers:
        publish_twice(once, 7, speaks=True)
        assert probe.metrics["sync/probe_gap_max"] < 1e-5
    else:
        with pytest.raises(PublishError, match="weights 7 did not arrive, published twice:\nengine 1 .http://1.: its"):
            publish_twice(once, 7, speaks=True)
        assert probe.metrics["sync/probe_gap_max"] == pytest.approx(1.0, rel=1e-4)
    assert published == [7, 7]
    told = capsys.readouterr().err
    assert "engine 1 (http://1): its log-probs" in told and "engine 0" not in told
