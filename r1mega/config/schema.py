"""Every field of a run: its type, its default (written nowhere else) and what it means.

A string under a field is its documentation; `r1mega train --help` prints it. Fields without a default (`???`) come from
the option chosen for their group in `conf/`, or from the user. "R1" marks values of DeepSeek-R1 (arXiv 2501.12948),
"V3" of DeepSeek-V3 (arXiv 2412.19437), "GRPO" of DeepSeekMath (arXiv 2402.03300); "ours" marks what nobody published.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from r1mega.config.choices import (
    Aggregation,
    DataFormat,
    DeviceType,
    Dispatcher,
    Init,
    LayerSpec,
    Loop,
    Mtp,
    ParamDtype,
    RatioLevel,
    Recompute,
    Schedule,
    Template,
    Verify,
    WandbMode,
)
from r1mega.config.schema_benchmark import BenchmarkConfig
from r1mega.config.schema_cluster import ClusterConfig
from r1mega.config.schema_curate import CurateConfig
from r1mega.config.schema_pipeline import PipelineConfig
from r1mega.config.schema_plan import PlanConfig
from r1mega.config.schema_reward import RewardConfig
from r1mega.config.schema_reward_model import RewardModelConfig
from r1mega.config.schema_rollout import RolloutConfig, SglangConfig
from r1mega.config.schema_sft import SftConfig
from r1mega.config.schema_slurm import SlurmConfig


@dataclass
class RunConfig:
    name: str = "r1mega"
    """Name shown in displays, plots and loggers; part of the default directory."""
    dir: str = MISSING
    """Directory that receives everything the run writes. It must not hold another run."""
    seed: int = 0
    """Seed of initialisation, data order and sampling."""
    timeout_minutes: float = 10.0
    """A collective that waits longer than this, or a checkpoint that takes longer to write, ends the run (ours). With
    SGLang as much as a rollout takes; servers may all be silent for 0.8 of it, as while they start."""
    resume: bool = False
    """Go on from the latest checkpoint in run.dir; from the beginning where there is none yet."""
    resume_from: str | None = None
    """The checkpoint to go on from instead, RUN_DIR/checkpoints/update-N."""
    allow_changes: bool = False
    """Resume although fields that decide what is computed differ from those the run was started with."""


@dataclass
class StageConfig:
    loop: Loop = MISSING
    """Which loop runs: `rl` (GRPO), `sft` (supervised fine-tuning), `reject` (rejection sampling), `reward_model` or
    `evaluate` (a benchmark; r1mega evaluate)."""
    name: str | None = None
    """Which stage of a recipe this is, for people; null: none of them."""


@dataclass
class ModelConfig:
    hf: str = MISSING
    """Checkpoint directory: config.json and, with init=load, safetensors files or Megatron's distributed tensors (from
    tools/convert_checkpoint.py, or a run's checkpoints/update-N)."""
    init: Init = MISSING
    """`load` reads the checkpoint's weights, `random` initialises from its config.json."""
    tokenizer: str | None = None
    """Tokenizer directory; null means model.hf."""
    card: str | None = None
    """A published model that model.hf must have the shape of, by its name in r1mega/models/cards; `r1mega plan` reads
    its config.json from there where model.hf is not given. Null: whatever model.hf is."""
    base: str | None = None
    """Name of the published checkpoint that model.hf is made from, for people and messages."""
    moe_router_bias_update_rate: float = 0.0
    """Step of the auxiliary-loss-free expert balance after each update (V3: 0.001 in pre-training; in RL ours)."""
    router_balance_coef: float = 0.0
    """Weight of the sequence-wise expert balance loss (V3: 0.0001 in pre-training; in RL ours)."""
    mtp: Mtp = Mtp.freeze
    """A checkpoint's multi-token-prediction layer: leave it out, keep it as it is, or train it. A reward model has
    none."""
    mtp_loss_coef: float = 0.1
    """Weight of its loss where it is trained (V3: 0.3, later in pre-training 0.1). In RL that layer alone learns."""


@dataclass
class ParallelConfig:
    tp: int = 1
    """Tensor parallel size. Above 1 the sequence is split between tensor parallel regions as well."""
    pp: int = 1
    """Pipeline parallel size."""
    ep: int = 1
    """Expert parallel size, cut out of tp x cp x dp."""
    etp: int = 1
    """Tensor parallel size inside one expert, cut out of tp x cp x dp."""
    dp: int = 1
    """Data parallel size. The run has tp x cp x pp x dp training processes."""
    cp: int = 1
    """Context parallel size: every sequence is cut over so many processes, in slices of equal work."""
    vpp: int = 1
    """Chunks of layers each pipeline stage holds; above 1 the pipeline is interleaved."""
    stages: list[int] | None = None
    """Decoder layers of each of the pp x vpp chunks, in order; null deals them out evenly."""
    dispatcher: Dispatcher = Dispatcher.alltoall
    """What brings tokens to their experts: `alltoall` everywhere, `flex` is DeepEP's kernels (GPU and bf16 only)."""
    overlap_grad_reduce: bool = False
    """Reduce gradients of one bucket while the backward pass works on the next."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward pass begins; needs overlap_grad_reduce."""

    def sizes(self) -> dict[str, Any]:
        """What makes the layout."""
        names = ("tp", "cp", "pp", "vpp", "ep", "etp", "dp", "stages")
        return {name: getattr(self, name) for name in names}

    @property
    def world_size(self) -> int:
        """Number of training processes."""
        return self.tp * self.cp * self.pp * self.dp


@dataclass
class PrecisionConfig:
    params: ParamDtype = MISSING
    """Type of parameters and activations. The optimizer's master weights are fp32 in either case."""
    fp8: bool = False
    """Matrix products in FP8 (E4M3, blocks of 1 x 128 activations and 128 x 128 weights), as V3 trained: te's."""
    emulate_fp8: bool = False
    """Compute fp8's products in plain torch, on any device, with layer_spec=torch: slow, for checking the recipe."""
    moments: ParamDtype = ParamDtype.fp32
    """Type of Adam's moments (V3: bf16); bf16 needs Transformer Engine's Adam."""


@dataclass
class DeviceConfig:
    type: DeviceType = MISSING
    """`cpu` (gloo) or `cuda` (NCCL)."""
    layer_spec: LayerSpec = LayerSpec.torch
    """Layers of plain torch, or Transformer Engine's (`te`, GPU only)."""
    threads: int = 1
    """CPU threads of each training process."""
    fuse_weight_gradients: bool = False
    """Add weight gradients into their fp32 sums inside apex's kernel; needs apex and a GPU."""


@dataclass
class MemoryConfig:
    offload: bool = False
    """Keep weights, gradients and optimizer state in host memory while the engine generates."""
    recompute: Recompute = Recompute.none
    """Activations computed again in the backward pass: none, those of some modules, or whole layers."""
    recompute_modules: list[str] = field(default_factory=lambda: ["core_attn"])
    """With `selective`: core_attn, mlp, moe, shared_experts; on te also mla_up_proj, layernorm, moe_act."""
    logprob_chunk_tokens: int = 1024
    """Tokens whose logits are held at once, forward and backward (ours)."""
    recompute_num_layers: int = 1
    """With `full`: layers in a group of which only the input is kept; must divide the layers of every chunk."""


@dataclass
class DataConfig:
    train: str = MISSING
    """JSONL file to train on."""
    eval: str | None = None
    """JSONL file of held-out rows, question/answer or those of a reward model; null means no evaluation."""
    format: DataFormat = MISSING
    """Rows of the training file: `qa` (question_key, answer_key), `sft` (prompt, response), `pairs` (prompt, chosen,
    rejected: a helpful reward model) or `labels` (prompt, response, label: a safety one)."""
    question_key: str = "question"
    """Key of the question in a qa row."""
    answer_key: str = "answer"
    """Key of the reference answer in a qa row; GSM8K's `#### 42` is understood."""
    template: Template = Template.r1_zero
    """How a question becomes a prompt: R1-Zero's conversation (R1 Table 1), the plain text, or the chat template."""
    max_prompt_tokens: int = 512
    """Longest prompt accepted; a longer one is refused before the run starts (ours)."""
    shuffle: bool = True
    """Give each epoch its own order; false keeps the file's."""
    general: str | None = None
    """JSONL file of general questions, which have no reference answer: mixed in from update reward.preference_from on
    and judged by reward models. A row may say its `domain` (`helpful`, `safety`); without one it is `general`."""
    general_share: float = 0.5
    """Share of general questions among those asked from then on (R1: 78K of 158K prompts; this default is ours)."""
    eval_limit: int | None = None
    """Evaluate on the first so many held-out rows only; null means all."""


@dataclass
class AlgoConfig:
    group_size: int = 16
    """Samples of one question (R1: 16)."""
    questions_per_round: int = 32
    """Questions of one rollout (R1: 512; this default is ours)."""
    updates_per_round: int = 1
    """Optimizer steps on one rollout's samples, each sample used once (R1: 16; this default is ours)."""
    updates: int = 100
    """Optimizer steps of the whole run (R1-Zero: 10,400; this default is ours)."""
    clip_low: float = 0.2
    """The ratio is clipped at 1 - clip_low (PPO's 0.2; R1's first RL stage: 10)."""
    clip_high: float = 0.2
    """The ratio is clipped at 1 + clip_high; may exceed 1 (PPO's 0.2; R1's first RL stage: 10)."""
    kl_coef: float = 0.001
    """Weight of the KL term in the loss (R1)."""
    ratio_level: RatioLevel = RatioLevel.token
    """Ratio and KL per token (GRPO), or of the whole output (R1 Eq. 1 read literally)."""
    aggregation: Aggregation = Aggregation.sequence_mean
    """Token losses: mean of each output (GRPO), mean of all tokens (DAPO), sum of each output, or over a constant."""
    advantage_std: bool = True
    """Divide a group's advantages by its standard deviation (R1 Eq. 3); false is Dr. GRPO."""
    correction_cap: float = 0.0
    """Cap of the importance weights that correct for samples of other weights or other arithmetic (truncated importance
    sampling, Yao et al. 2025; verl: 2); 0 leaves them out (ours)."""
    reference_refresh: int = 400
    """Updates after which the reference becomes the latest policy (R1: 400); 0 keeps the first one."""
    max_tokens_per_micro_batch: int = 16384
    """Tokens of one forward and backward pass, prompt and response together (ours)."""

    @property
    def samples_per_round(self) -> int:
        """Sequences generated in one round."""
        return self.questions_per_round * self.group_size


@dataclass
class OptimConfig:
    lr: float = 3.0e-6
    """Learning rate after warm-up (R1-Zero: 3e-6)."""
    min_lr: float = 0.0
    """Learning rate the schedule ends at."""
    schedule: Schedule = Schedule.constant
    """How the learning rate falls from lr to min_lr over the run (R1-Zero: not published)."""
    warmup_updates: int = 0
    """Updates over which the learning rate rises linearly from 0 (R1: not published)."""
    beta1: float = 0.9
    """Adam's first decay (V3)."""
    beta2: float = 0.95
    """Adam's second decay (V3)."""
    eps: float = 1.0e-8
    """Adam's epsilon (ours)."""
    weight_decay: float = 0.0
    """Decoupled weight decay (V3: 0.1 in pre-training; in RL ours)."""
    clip_grad: float = 1.0
    """Largest global gradient norm (V3); 0 does not clip."""


@dataclass
class EvaluateConfig:
    every: int = 0
    """Updates between evaluations; 0 evaluates before the first and after the last update only."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy (ours)."""
    top_p: float = 1.0
    """Nucleus sampling mass (R1's evaluations: temperature 0.6, top-p 0.95; this default is ours)."""
    max_tokens: int | None = None
    """Longest response in tokens; null means rollout.max_tokens."""


@dataclass
class LoggerConfig:
    console: bool = True
    """Show the live display."""
    jsonl: bool = True
    """Write metrics.jsonl."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    wandb: bool = False
    """Log to Weights & Biases."""
    wandb_project: str = "r1mega"
    """Project of the Weights & Biases run."""
    wandb_mode: WandbMode = WandbMode.offline
    """`offline` needs no account."""
    samples_per_round: int = 32
    """Samples of each round written to samples.jsonl."""
    rounds: bool = True
    """Write each round's samples and what its updates gave to rounds/, so that `r1mega replay` can redo them."""
    keep_rounds: int = 0
    """So many of the newest of these are kept; 0 keeps all."""


@dataclass
class CheckpointConfig:
    every: int = 0
    """Updates between checkpoints, in RL taken at the end of a round; 0 takes none."""
    keep_newest: int = 2
    """So many of the newest are kept."""
    keep_best: int = 0
    """So many of the best by best_metric are kept besides."""
    best_metric: str = "eval/pass_at_1"
    """Which metric's highest value is the best."""
    verify: Verify = Verify.full
    """What is checked before a checkpoint is resumed from: every byte's digest, or names and sizes."""
    asynchronous: bool = False
    """Write beside the training, in processes of its own."""


@dataclass
class ExportConfig:
    hf: bool = True
    """Write the final policy as a Hugging Face checkpoint to `hf/` in the run directory."""
    every: int = 0
    """Updates between exports; 0 exports at the end only."""


@dataclass
class Config:
    """One run: `section=option` chooses a file of `conf/`, `section.field=value` sets a field."""

    run: RunConfig = field(default_factory=RunConfig)
    stage: StageConfig = field(default_factory=StageConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    sglang: SglangConfig = field(default_factory=SglangConfig)
    algo: AlgoConfig = field(default_factory=AlgoConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    curate: CurateConfig = field(default_factory=CurateConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
