"""What fields that know a few values can be."""

from __future__ import annotations

from enum import StrEnum

# OmegaConf reads an enum by member name and writes it by member name, so every member is named as its value.
Loop = StrEnum("Loop", ["rl", "sft", "reject", "reward_model", "evaluate"])
# Those that ask engines for text, and those of them that train nothing.
GENERATING_LOOPS = frozenset({Loop.rl, Loop.reject, Loop.evaluate})
SAMPLING_LOOPS = frozenset({Loop.reject, Loop.evaluate})
Init = StrEnum("Init", ["load", "random"])
ParamDtype = StrEnum("ParamDtype", ["fp32", "bf16"])
EngineDtype = StrEnum("EngineDtype", ["fp32", "bf16", "fp8"])
DeviceType = StrEnum("DeviceType", ["cpu", "cuda"])
LayerSpec = StrEnum("LayerSpec", ["torch", "te"])
DataFormat = StrEnum("DataFormat", ["qa", "sft", "pairs", "labels"])
Template = StrEnum("Template", ["r1_zero", "plain", "chat"])
Packing = StrEnum("Packing", ["batch", "window"])
PastThinking = StrEnum("PastThinking", ["keep", "cut"])
EngineKind = StrEnum("EngineKind", ["embedded", "sglang"])
RatioLevel = StrEnum("RatioLevel", ["token", "sequence"])
Aggregation = StrEnum("Aggregation", ["sequence_mean", "token_mean", "sequence_sum", "constant"])
Schedule = StrEnum("Schedule", ["constant", "linear", "cosine"])
WandbMode = StrEnum("WandbMode", ["offline", "online"])
Mtp = StrEnum("Mtp", ["drop", "freeze", "train"])
Recompute = StrEnum("Recompute", ["none", "selective", "full"])
Sandbox = StrEnum("Sandbox", ["bubblewrap", "unsafe_rlimits"])
Dispatcher = StrEnum("Dispatcher", ["alltoall", "flex"])
Verify = StrEnum("Verify", ["full", "quick"])
Transport = StrEnum("Transport", ["disk", "ipc", "gloo", "nccl"])
RouterPolicy = StrEnum("RouterPolicy", ["cache_aware", "power_of_two", "round_robin", "random"])
KvCacheDtype = StrEnum("KvCacheDtype", ["auto", "bf16", "fp8_e4m3", "fp8_e5m2"])
MoeA2aBackend = StrEnum("MoeA2aBackend", ["none", "deepep"])
ResponseForm = StrEnum("ResponseForm", ["any", "think", "r1_zero"])
ResponseChoice = StrEnum("ResponseChoice", ["shortest", "first", "random"])
GraderName = StrEnum("GraderName", ["math", "choice", "drop", "code", "none", "judge", "harness"])
Scheduler = StrEnum("Scheduler", ["local", "slurm"])
PlanFormat = StrEnum("PlanFormat", ["table", "json"])
StageRun = StrEnum("StageRun", ["train", "evaluate", "tool"])
ArtifactKind = StrEnum("ArtifactKind", ["checkpoint", "prompts", "samples", "report"])
Direction = StrEnum("Direction", ["higher", "lower"])
