"""The multi-token prediction reference against a second computation, transformers' draft module and finite differences.

Needs the `checkpoint` fixture of tests/conftest.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.modeling_layers import MtpModel

from parity.mtp_reference import EMBEDDING, HEAD, INDEX, MTP_SHARD, SINGLE, MtpReference, add_mtp_tensors

LAYERS = 4  # of the tiny checkpoint
PREFIX = f"model.layers.{LAYERS}."
TOKENS = [7, 258, 31, 200, 7, 99, 150, 12, 64, 5]  # 258 is the padding token
OUTER = ("enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight")
REPEATED = ("embed_tokens.weight", "shared_head.head.weight")
BLOCK = (
    "input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.q_a_proj.weight",
    "self_attn.q_a_layernorm.weight", "self_attn.q_b_proj.weight", "self_attn.kv_a_proj_with_mqa.weight",
    "self_attn.kv_a_layernorm.weight", "self_attn.kv_b_proj.weight", "self_attn.o_proj.weight", "mlp.gate.weight",
    "mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight", "mlp.shared_experts.down_proj.weight",
)  # fmt: skip
EXPERTS = tuple(f"mlp.experts.{n}.{part}_proj.weight" for n in range(8) for part in ("gate", "up", "down"))
BIAS = "mlp.gate.e_score_correction_bias"


@pytest.fixture
def with_mtp(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A directory of its own with a tiny fp32 checkpoint that has an MTP layer."""
    path = shutil.copytree(checkpoint("deepseek_v3"), tmp_path / "mtp")
    add_mtp_tensors(path, seed=3)
    return path


@pytest.fixture
def reference(with_mtp: Path) -> MtpReference:
    return MtpReference(with_mtp)


def split_in_two(path: Path) -> None:
    """Turn a single-file checkpoint into two files and an index."""
    tensors = load_file(path / SINGLE)
    (path / SINGLE).unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file_name, members in parts.items():
        save_file({name: tensors[name] for name in members}, path / file_name, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {name: file_name for file_name, members in parts.items() for name in members},
    }
    (path / INDEX).write_text(json.dumps(index))


def load_all(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
def test_the_layer_is_added_under_the_published_names(checkpoint, tmp_path: Path, dtype: str, sharded: bool) -> None:
    path = shutil.copytree(checkpoint("deepseek_v3", dtype=dtype), tmp_path / "mtp")
    if sharded:
        split_in_two(path)
    before = load_all(path)
    add_mtp_tensors(path, seed=3)
    after = load_all(path)
    added = {PREFIX + name for name in (*OUTER, *REPEATED, *BLOCK, *EXPERTS, BIAS)}
    assert set(after) - set(before) == added
    assert all(after[name].dtype == tensor.dtype for name, tensor in before.items())
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {name for name in added if after[name].dtype != getattr(torch, dtype)} <= {PREFIX + BIAS}
    assert after[PREFIX + BIAS].dtype == torch.float32
    assert after[PREFIX + "eh_proj.weight"].shape == (64, 128)
    assert torch.equal(after[PREFIX + "embed_tokens.weight"], before[EMBEDDING])
    assert torch.equal(after[PREFIX + "shared_head.head.weight"], before[HEAD])
    assert json.loads((path / "config.json").read_text())["num_nextn_predict_layers"] == 1
    if sharded:
        index = json.loads((path / INDEX).read_text())
        assert set(index["weight_map"]) == set(after)
        assert {name for name, file_name in index["weight_map"].items() if file_name == MTP_SHARD} == added
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())
    assert torch.isfinite(MtpReference(path).logprobs(TOKENS)).all()
    with pytest.raises(ValueError, match="is there already"):
        add_mtp_tensors(path, seed=3)


def test_the_layer_depends_on_the_seed_alone(checkpoint, tmp_path: Path) -> None:
    made = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        path = shutil.copytree(checkpoint("deepseek_v3"), tmp_path / name)
        add_mtp_tensors(path, seed)
        made.append(load_file(path / SINGLE)[PREFIX + "eh_proj.weight"])
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def test_every_tensor_of_the_checkpoint_has_its_place(with_mtp: Path, reference: MtpReference) -> None:
    stored = load_all(with_mtp)
    weights = reference.weights()
    elsewhere = {PREFIX + name for name in REPEATED} | {name for name in stored if name.endswith(BIAS)}
    assert set(weights) == set(reference.gradients()) == set(stored) - elsewhere
    assert all(torch.equal(weights[name], stored[name]) for name in weights)
    assert torch.equal(reference.block.mlp.gate.e_score_correction_bias, stored[PREFIX + BIAS])


@pytest.mark.parametrize("fault", ["missing", "left over", "not repeated"])
def test_a_wrong_layer_is_refused(with_mtp: Path, fault: str) -> None:
    tensors = load_file(with_mtp / SINGLE)
    if fault == "missing":
        del tensors[PREFIX + "mlp.experts.5.up_proj.weight"]
    elif fault == "left over":
        tensors[PREFIX + "mlp.experts.8.up_proj.weight"] = torch.zeros(32, 64)
    else:
        tensors[PREFIX + "embed_tokens.weight"][0, 0] += 1
    save_file(tensors, with_mtp / SINGLE, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=PREFIX):
        MtpReference(with_mtp)


def rms(vector: torch.Tensor) -> float:
    return (sum(float(x) ** 2 for x in vector) / len(vector) + 1e-6) ** 0.5


@torch.no_grad()
def spelled_out(reference: MtpReference, stored: dict[str, torch.Tensor], tokens: list[int]) -> list[float]:
    """MTP log-probs position by position, each from a fresh block run on its own prefix; the rest in fp64."""
    weight = {name: tensor.double() for name, tensor in stored.items()}
    before_norm: list[torch.Tensor] = []
    hook = reference.model.model.norm.register_forward_pre_hook(lambda _, inputs: before_norm.append(inputs[0][0]))
    reference.model(input_ids=torch.tensor([tokens]))
    hook.remove()
    projection = weight[PREFIX + "eh_proj.weight"]
    projected, logprobs = [], []
    for i in range(len(tokens) - 2):
        raw = before_norm[0][i].double()
        hidden = raw / rms(raw) * weight["model.norm.weight"]
        embedded = weight[EMBEDDING][tokens[i + 1]]
        from_embedding = projection[:, :64] @ (embedded / rms(embedded) * weight[PREFIX + "enorm.weight"])
        from_hidden = projection[:, 64:] @ (hidden / rms(hidden) * weight[PREFIX + "hnorm.weight"])
        projected.append((from_embedding + from_hidden).float())
        states = torch.stack(projected)[None]
        rope = reference.model.model.rotary_emb(states, torch.arange(i + 1)[None])
        mask = torch.zeros(1, 1, i + 1, i + 1).masked_fill(~torch.ones(i + 1, i + 1).tril().bool(), float("-inf"))
        out = reference.block(states, attention_mask=mask, position_embeddings=rope)[0, -1].double()
        logits = weight[HEAD] @ (out / rms(out) * weight[PREFIX + "shared_head.norm.weight"])
        logprobs.append(float(logits[tokens[i + 2]] - logits.logsumexp(0)))
    return logprobs


def test_logprobs_equal_a_second_computation(with_mtp: Path, reference: MtpReference) -> None:
    got = reference.logprobs(TOKENS)
    assert got.shape == (len(TOKENS) - 2,)
    want = torch.tensor(spelled_out(reference, load_all(with_mtp), TOKENS))
    torch.testing.assert_close(got.detach(), want, atol=5e-6, rtol=0)


@torch.no_grad()
def test_distribution_equals_the_draft_module_of_transformers(reference: MtpReference) -> None:
    """transformers 5 has a module for drafting at generation: it loads, masks and numbers positions on its own.

    It numbers the positions from 1, the place of the embedded token: the attention sees differences only.
    """
    main = reference.model
    main._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{LAYERS}\."]  # the class names layer 61 only
    draft = MtpModel.from_pretrained(main)
    ids = torch.tensor([TOKENS])
    hidden = main.model(input_ids=ids).last_hidden_state
    positions = torch.arange(1, len(TOKENS))[None]
    states = draft.forward_layer(0, hidden[:, :-1], positions, mtp_cache=None, input_ids=ids[:, 1:])
    want = torch.log_softmax(main.lm_head(states[0, :-1]), dim=-1)
    torch.testing.assert_close(reference.distribution(TOKENS), want, atol=5e-6, rtol=0)


@torch.no_grad()
def test_main_logprobs_are_those_of_the_main_model(checkpoint, reference: MtpReference) -> None:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(checkpoint("deepseek_v3"), dtype=torch.float32)
    want = torch.log_softmax(plain(input_ids=torch.tensor([TOKENS])).logits[0], dim=-1)
    want = torch.stack([want[i, TOKENS[i + 1]] for i in range(len(TOKENS) - 1)])
    torch.testing.assert_close(reference.main_logprobs(TOKENS), want, atol=5e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("changed", range(1, len(TOKENS)))
def test_a_position_sees_its_own_tokens_and_the_next(reference: MtpReference, changed: int) -> None:
    """Position i reads t_0 .. t_{i+1}: a change of token k leaves positions up to k - 2 alone and reaches k - 1."""
    before = reference.distribution(TOKENS)
    after = reference.distribution([301 if i == changed else token for i, token in enumerate(TOKENS)])
    moved = (after - before).abs().amax(dim=-1)
    assert (moved[: max(changed - 1, 0)] < 1e-5).all()
    assert (moved[changed - 1 : changed] > 1e-2).all()


@torch.no_grad()
def test_the_embedding_comes_first(reference: MtpReference) -> None:
    before = reference.logprobs(TOKENS)
    reference.eh_proj.copy_(reference.eh_proj.roll(64, dims=1))
    assert (reference.logprobs(TOKENS) - before).abs().max() > 0.1


def routed_experts(reference: MtpReference, tokens: list[int]) -> set[int]:
    """The MTP layer's experts that serve a position with a prediction."""
    chosen: list[torch.Tensor] = []
    hook = reference.block.mlp.gate.register_forward_hook(lambda _, __, outputs: chosen.append(outputs[2]))
    reference.logprobs(tokens)
    hook.remove()
    return set(chosen[0][: len(tokens) - 2].flatten().tolist())


def test_gradients_reach_all_that_was_used(reference: MtpReference) -> None:
    tokens = [7, 258, 31, 200]  # two predictions, few enough to leave experts idle
    used = routed_experts(reference, tokens)
    assert 0 < len(used) < 8
    reference.logprobs(tokens).sum().backward()
    gradients = reference.gradients()
    for name in (*OUTER, *BLOCK):
        assert gradients[PREFIX + name].abs().max() > 0, name
    for name in EXPERTS:
        assert (gradients[PREFIX + name].abs().max() > 0) == (int(name.split(".")[2]) in used), name
    for name in ("model.norm.weight", "model.layers.0.self_attn.o_proj.weight", "model.layers.3.mlp.gate.weight", HEAD):
        assert gradients[name].abs().max() > 0, name
    rows = gradients[EMBEDDING].abs().amax(dim=-1)
    # The last token is a target only; the padding token is like any other.
    assert set(rows.nonzero().flatten().tolist()) == set(tokens[:-1])


def test_gradients_add_up_and_the_main_loss_leaves_the_layer_alone(reference: MtpReference) -> None:
    reference.main_logprobs(TOKENS).sum().backward()
    main = {name: gradient.clone() for name, gradient in reference.gradients().items()}
    assert main[HEAD].abs().max() > 0
    assert set(main[EMBEDDING].abs().amax(dim=-1).nonzero().flatten().tolist()) == set(TOKENS[:-1])
    assert all(not gradient.any() for name, gradient in main.items() if name.startswith(PREFIX))
    reference.logprobs(TOKENS).sum().backward()
    both = {name: gradient.clone() for name, gradient in reference.gradients().items()}
    reference.zero_gradients()
    assert not any(gradient.any() for gradient in reference.gradients().values())
    reference.logprobs(TOKENS).sum().backward()
    for name, gradient in reference.gradients().items():
        torch.testing.assert_close(both[name], main[name] + gradient, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("name", [PREFIX + "eh_proj.weight", EMBEDDING])
def test_gradient_equals_a_finite_difference(reference: MtpReference, name: str) -> None:
    """The entry of the largest gradient, by central difference.

    In fp32, for transformers' norms, softmax and router cast to it. The difference of the two sums is about 1e-2 and
    carries about 1e-6 of rounding, 1e-4 of it; the curvature at this step is below 1e-5 of it.
    """
    step, coefficients = 2e-3, torch.linspace(0.5, 1.5, len(TOKENS) - 2)
    (reference.logprobs(TOKENS) * coefficients).sum().backward()
    gradient = reference.gradients()[name]
    at = divmod(int(gradient.abs().argmax()), gradient.shape[1])
    weight = reference.weights()[name]
    start = float(weight[at])
    values = []
    for value in (start + step, start - step):
        weight[at] = value
        with torch.no_grad():
            values.append(float((reference.logprobs(TOKENS).double() * coefficients).sum()))
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(gradient[at]), rel=1e-3)
