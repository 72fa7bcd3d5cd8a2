"""The modules a GPTModel is built from: Transformer Engine's, or plain torch ones.

The torch spec runs on CPU and on CUDA without Transformer Engine. It also mends what goes wrong in Megatron-Core 0.16.1
when Transformer Engine is absent:

- `WrappedTorchNorm` refuses sequence parallelism: `RMSNorm` here marks its weight for the sum over tensor ranks.
- MLA's down-projections are column-parallel and gathered in the local spec; with tp > 1 the gradient of the rotary key
  then misses the other ranks' heads (about 1% off in `linear_kv_down_proj`). `DuplicatedLinear` holds the whole weight
  on every tensor rank instead, as Transformer Engine's spec does.
- With tp > 1, ep = 1 and etp = 1 expert gradients are not summed over the tensor ranks that each route a part of the
  sequence (60-86% off, and the loss looks healthy): `mark_expert_parameters` hands them to the expert data group.
- `HAVE_TE` stays true in the MLA module, and the router calls a function that was never imported.

With emulated FP8 the linear layers are those of `models.fp8_linear`, just where Transformer Engine's spec has its own
under Megatron-Core's FP8 context: attention's and MLA's projections, MLPs, experts, shared experts and the projection
before a layer two tokens ahead. Embedding, head, router, norms and core attention are not among them in either spec.
"""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from r1mega.models.attention import TorchCoreAttention
from r1mega.models.fp8_linear import Fp8ColumnParallelLinear, Fp8RowParallelLinear, fp8_linear
from r1mega.models.mtp import PackedMTPLayer
from r1mega.models.router import SequenceLayer, SequenceRouter


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm whose weight is summed over tensor ranks where the sequence is sharded over them."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_unused: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class DuplicatedLinear(torch.nn.Module):
    """A linear layer whose whole weight [out, in] stands on every tensor rank, each working on its own tokens."""

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, bias: bool, **_unused: object
    ) -> None:
        super().__init__()
        assert not bias
        self.weight = torch.nn.Parameter(
            torch.empty(output_size, input_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.nn.functional.linear(x, self.weight), None


class Fp8DuplicatedLinear(DuplicatedLinear):
    """The same in emulated FP8."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return fp8_linear(x, self.weight), None


class _Linears(NamedTuple):
    """The classes of linear layers that a model is built from."""

    column: type[torch.nn.Module]
    row: type[torch.nn.Module]
    duplicated: type[torch.nn.Module]

    @classmethod
    def of(cls, *, emulate_fp8: bool) -> _Linears:
        if emulate_fp8:
            return cls(Fp8ColumnParallelLinear, Fp8RowParallelLinear, Fp8DuplicatedLinear)
        return cls(ColumnParallelLinear, RowParallelLinear, DuplicatedLinear)

    def mlp(self) -> MLPSubmodules:
        return MLPSubmodules(linear_fc1=self.column, linear_fc2=self.row)


def decoder_spec(
    config: TransformerConfig, layer_spec: str, vp_stage: int | None = None, *, emulate_fp8: bool = False
) -> TransformerBlockSubmodules:
    """The decoder layers of this rank's pipeline stage, or of one of its chunks in an interleaved pipeline.

    `emulate_fp8`: the linear layers of the torch spec compute in emulated FP8.

    Raises:
        ValueError: `te` is asked for and Transformer Engine is not installed, or the name is unknown.
    """
    if layer_spec == "te":
        if importlib.util.find_spec("transformer_engine") is None:
            raise ValueError(
                "device.layer_spec: got te; the package transformer_engine is not installed; "
                "install the extra 'gpu' or set device.layer_spec=torch"
            )
        block = gpt_layer_specs.get_gpt_decoder_block_spec(
            config, use_transformer_engine=True, normalization="RMSNorm", vp_stage=vp_stage
        )
        for layer in block.layer_specs:
            _route_by_sequence(layer)
        return block
    if layer_spec != "torch":
        raise ValueError(f"device.layer_spec: got {layer_spec}; must be torch or te")
    linears = _Linears.of(emulate_fp8=emulate_fp8)
    _mend_absent_transformer_engine(linears)
    dense, moe = _layer(config, linears, is_moe=False), None
    pattern = [0] * config.num_layers
    if config.num_moe_experts:
        moe, pattern = _layer(config, linears, is_moe=True), config.moe_layer_freq
    layers = [moe if is_moe else dense for is_moe in pattern]
    first = get_transformer_layer_offset(config, vp_stage)
    return TransformerBlockSubmodules(
        layer_specs=layers[first : first + get_num_layers_to_build(config, vp_stage)], layer_norm=RMSNorm
    )


def mtp_spec(
    config: TransformerConfig, layer_spec: str, vp_stage: int | None = None, *, emulate_fp8: bool = False
) -> ModuleSpec:
    """The multi-token-prediction layer (V3 section 2.2), whose inner layer is one of experts."""
    if layer_spec == "te":
        decoder = gpt_layer_specs.get_gpt_decoder_layer_specs(
            config, use_transformer_engine=True, normalization="RMSNorm", qk_l2_norm=False, vp_stage=vp_stage
        )
        block = gpt_layer_specs.get_gpt_mtp_block_spec(
            config, decoder[-1], use_transformer_engine=True, vp_stage=vp_stage
        )
        for layer in block.layer_specs:
            layer.module = PackedMTPLayer
            _route_by_sequence(layer.submodules.transformer_layer)  # Megatron takes no other layer than its own
        return ModuleSpec(module=MultiTokenPredictionBlock, submodules=block)
    linears = _Linears.of(emulate_fp8=emulate_fp8)
    layer = ModuleSpec(
        module=PackedMTPLayer,
        submodules=MultiTokenPredictionLayerSubmodules(
            enorm=RMSNorm,
            hnorm=RMSNorm,
            eh_proj=linears.column,
            transformer_layer=_layer(config, linears, is_moe=True),
            layer_norm=RMSNorm,
        ),
    )
    return ModuleSpec(
        module=MultiTokenPredictionBlock, submodules=MultiTokenPredictionBlockSubmodules(layer_specs=[layer])
    )


def mark_expert_parameters(model: torch.nn.Module) -> None:
    """Hand every expert weight to the expert data-parallel group, whatever ep and etp are. Before DDP wraps the
    model."""
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.allreduce = False


def _layer(config: TransformerConfig, linears: _Linears, *, is_moe: bool) -> ModuleSpec:
    attention = _mla(linears) if config.multi_latent_attention else _grouped_query_attention(linears)
    return ModuleSpec(
        module=SequenceLayer if is_moe else TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=_experts(linears) if is_moe else ModuleSpec(module=MLP, submodules=linears.mlp()),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=_names_in_checkpoints(config, is_moe=is_moe),
        ),
    )


def _names_in_checkpoints(config: TransformerConfig, *, is_moe: bool) -> dict[str, str]:
    """What Transformer Engine's modules store these norms as, so that either spec loads what the other saved."""
    names = {} if is_moe else {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
    if config.multi_latent_attention:
        return names | {
            "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
            "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
        }
    return names | {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}


def _route_by_sequence(layer: ModuleSpec) -> None:
    """Put our router into a layer of Megatron's spec, where it has one."""
    mlp = layer.submodules.mlp
    if mlp.module is MoELayer:
        layer.module = SequenceLayer
        mlp.submodules.router = SequenceRouter


def _experts(linears: _Linears) -> ModuleSpec:
    return ModuleSpec(
        module=MoELayer,
        submodules=MoESubmodules(
            experts=ModuleSpec(module=SequentialMLP, submodules=linears.mlp()),
            router=SequenceRouter,
            shared_experts=ModuleSpec(module=SharedExpertMLP, submodules=linears.mlp()),
        ),
        metainfo={"fuse_pre_mlp_layernorm": False},
    )


def _mla(linears: _Linears) -> ModuleSpec:
    return ModuleSpec(
        module=MLASelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=linears.column,
            linear_q_down_proj=linears.duplicated,
            linear_q_up_proj=linears.column,
            linear_kv_down_proj=linears.duplicated,
            linear_kv_up_proj=linears.column,
            core_attention=TorchCoreAttention,
            linear_proj=linears.row,
            q_layernorm=RMSNorm,
            kv_layernorm=RMSNorm,
        ),
    )


def _grouped_query_attention(linears: _Linears) -> ModuleSpec:
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=linears.column,
            core_attention=TorchCoreAttention,
            linear_proj=linears.row,
            q_layernorm=IdentityOp,
            k_layernorm=IdentityOp,
        ),
    )


def _mend_absent_transformer_engine(linears: _Linears) -> None:
    # MLASelfAttention picks the arguments of a down-projection by its class; ours goes where the plain Linear goes.
    multi_latent_attention.Linear = linears.duplicated
    if importlib.util.find_spec("transformer_engine") is None:
        multi_latent_attention.HAVE_TE = False
        if not hasattr(moe_utils, "te_general_gemm"):
            moe_utils.te_general_gemm = None
