"""Fields of the engines that generate: see schema.py."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from r1mega.config.choices import (
    DeviceType,
    EngineDtype,
    EngineKind,
    KvCacheDtype,
    MoeA2aBackend,
    RouterPolicy,
    Transport,
)


@dataclass
class RolloutConfig:
    engine: EngineKind = MISSING
    """What generates: `embedded` (transformers, inside training processes) or `sglang` (servers of their own)."""
    engines: int = 1
    """Number of engines: training processes that host one (embedded), or servers (sglang)."""
    temperature: float = 1.0
    """Sampling temperature (R1)."""
    top_p: float = 1.0
    """Nucleus sampling mass (ours)."""
    max_tokens: int = 1024
    """Longest response in tokens (R1-Zero: 32,768, from update 8,200 on 65,536; this default is ours)."""
    max_tokens_from: list[list[int]] = field(default_factory=list)
    """Later values of max_tokens as [update, tokens], each from that update on, e.g. [[8200,65536]]. A round takes the
    value of its first update."""
    stop: list[str] = field(default_factory=list)
    """Strings that end a response and stay in it; the end-of-sequence token always ends one."""
    max_batch: int = 256
    """Sequences decoded at once by one engine (ours)."""
    max_in_flight: int = 512
    """Requests that one SGLang server holds at once, those that wait inside it included (ours)."""
    router_replay: bool = False
    """Have the trainer send each token to the experts that the engine sent it to, not to those of its own top-k
    ("Rollout Routing Replay", arXiv 2510.11370); MoE models with sglang only."""
    over_sampling: float = 1.0
    """Times algo.questions_per_round that are asked in a round; when a round's groups are complete, the first ones in
    time, the rest is stopped (sglang only; ours)."""
    carry_partial: bool = False
    """Continue in the next round what was stopped, under the new weights, instead of giving it up; groups may then be
    one round older than max_staleness (sglang only)."""
    max_staleness: int = 0
    """Rounds that the weights of a group's oldest token may be behind; older groups are given up and asked again.
    0: rollout and training take turns. 1 and more: the next rollouts run beside the training (sglang only; ours)."""
    probe: bool = False
    """Compare the engine's log-probs of its samples with the trainer's in every round."""
    probe_tolerance: float = 1.0e-4
    """Mean difference of a log-prob that the probe lets pass (fp32 reordering; ours)."""
    probe_outliers: float = 0.002
    """Share of the tokens that may differ by more: where two experts score alike, rounding picks either (ours)."""
    probe_sequences: int = 4
    """Training questions, answers included, whose log-probs trainer and engines compare after a publish (ours)."""


@dataclass
class SglangConfig:
    python: str = ".venv-sglang/bin/python"
    """Python of the environment that SGLang is installed in, which need not be the trainer's."""
    tp: int = 1
    """Tensor parallel size of one server, in processes."""
    ep: int = 1
    """Expert parallel size, within tp."""
    attn_dp: int = 1
    """Data parallel attention (SGLang's --dp-size with --enable-dp-attention), within tp."""
    nodes_per_engine: int = 1
    """Machines that the processes of one server are spread over, tp / nodes_per_engine on each."""
    hosts: list[str] = field(default_factory=list)
    """Machine of each process of servers, in order: nodes_per_engine for the first server, then for the next. One that
    is named again takes the next GPUs there. Empty: all servers are on the machine of the launcher."""
    remote: str | None = None
    """How a command is started on one of hosts: what goes before it, such as `srun --overlap --nodes=1 --ntasks=1
    --nodelist={host}` or `ssh {host}`. It has to pass standard input on, whose end is what ends servers there."""
    first_port: int = 30000
    """First port on hosts: ten are for the first server process there, the next ten for the next (ours). On this
    machine free ports are taken instead."""
    first_gpu: int = 0
    """GPU of each machine that the processes of its first server start at; the next server takes the next ones."""
    router: bool = False
    """Ask for sequences through sglang-router instead of sending each to the server that holds the fewest. The own way
    knows which server failed, and sends on every field of a request; the router knows which prompts servers hold."""
    router_policy: RouterPolicy = RouterPolicy.cache_aware
    """How the router chooses: by the prompts that servers hold (its default), the emptier of two, in turn, by lot."""
    dtype: EngineDtype | None = None
    """Type that the servers hold the weights in; null means precision.params. `fp8`: blocks of 128 x 128 in E4M3 with
    their scales, as DeepSeek released them, which the trainer makes anew at each publish (CUDA only)."""
    memory_fraction: float = 0.8
    """Share of a device's memory for weights and cache (SGLang's --mem-fraction-static)."""
    max_cached_tokens: int | None = None
    """Tokens that the cache holds; null lets SGLang fill memory_fraction, on CPU 65,536 (ours)."""
    transport: Transport = Transport.disk
    """How weights reach the servers: safetensors in weights_dir (`disk`), handles of memory on one node (`ipc`), or
    broadcasts to engines anywhere else (`gloo` on CPU, `nccl` on GPUs that are not the trainer's)."""
    bucket_bytes: int = 1 << 30
    """Bytes that an engine process is given at once with `ipc`, `gloo` and `nccl`; with the last two a sender takes up
    to four times as much memory. What `disk` gathers at once follows from it (ours)."""
    weights_dir: str | None = None
    """Where `disk` and recovery copies are written, by all training processes at once; a file system that all of them
    and all servers see, in memory where there is room. Null: RUN_DIR/engines."""
    recovery_copy: bool = False
    """Also write each published version to weights_dir, from which a restarted server loads at once. It is copied to
    host memory and written beside the rollout. For transports other than `disk`, which writes each version anyway."""
    verify_share: float = 1.0
    """Share of the servers' parameters whose checksum is compared with the trainer's after each publish."""
    release: bool = False
    """Give the servers' weights and cache back while the trainer computes; on CPU the same steps free nothing."""
    deterministic: bool = False
    """Kernels whose results do not depend on the batch (SGLang's --enable-deterministic-inference); needs a GPU."""
    kv_cache_dtype: KvCacheDtype = KvCacheDtype.auto
    """Type of the cache (SGLang's --kv-cache-dtype); auto is that of the weights, another one needs a GPU."""
    moe_a2a_backend: MoeA2aBackend = MoeA2aBackend.none
    """How tokens reach their experts' ranks (SGLang's --moe-a2a-backend); deepep needs GPUs and ep = tp."""
    redundant_experts: int = 0
    """Copies of experts beside the model's own (SGLang's --ep-num-redundant-experts), which is not checksummed."""
    speculative_steps: int = 0
    """Tokens that the multi-token-prediction layer drafts ahead (SGLang's NEXTN); needs a GPU (0: no drafts)."""
    startup_seconds: float = 1800.0
    """Time a server may take until it first answers (ours); the trainer waits for 0.8 of run.timeout_minutes."""
    hang_seconds: float = 600.0
    """A server that has not answered for so long, loading weights included, is killed and started again (ours)."""
    restarts: int = 3
    """Restarts of one server before the run ends (ours)."""
    extra_args: list[str] = field(default_factory=list)
    """Further arguments of sglang.launch_server, as on its command line."""

    def cached_tokens(self, device: DeviceType) -> int | None:
        """Tokens of the cache; on CPU never left to SGLang, which takes a share of all memory once for each server."""
        return self.max_cached_tokens or (65_536 if device is DeviceType.cpu else None)
