"""Fields of the engines that generate: see schema.py."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from r1mega.config.choices import DeviceType, EngineKind, ParamDtype, Transport


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
    stop: list[str] = field(default_factory=list)
    """Strings that end a response and stay in it; the end-of-sequence token always ends one."""
    max_batch: int = 256
    """Sequences decoded at once by one engine (ours)."""
    max_in_flight: int = 512
    """Requests that one SGLang server holds at once, those that wait inside it included (ours)."""
    probe: bool = False
    """Compare the engine's log-probs of its samples with the trainer's in every round."""
    probe_tolerance: float = 1.0e-4
    """Mean difference of a log-prob that the probe lets pass (fp32 reordering; ours)."""
    probe_outliers: float = 0.002
    """Share of the tokens that may differ by more: where two experts score alike, rounding picks either (ours)."""


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
    dtype: ParamDtype | None = None
    """Type that the servers hold the weights in; null means precision.params."""
    memory_fraction: float = 0.8
    """Share of a device's memory for weights and cache (SGLang's --mem-fraction-static)."""
    max_cached_tokens: int | None = None
    """Tokens that the cache holds; null lets SGLang fill memory_fraction, on CPU 65,536 (ours)."""
    transport: Transport = Transport.disk
    """How weights reach the servers: safetensors in weights_dir (`disk`), or handles of memory on one node (`ipc`)."""
    bucket_bytes: int = 1 << 30
    """Bytes that an engine process is handed at once with `ipc` (ours)."""
    weights_dir: str | None = None
    """Where `disk` writes; a file system that all servers see, in memory where there is room. Null: RUN_DIR/engines."""
    verify_share: float = 1.0
    """Share of the servers' parameters whose checksum is compared with the trainer's after each publish."""
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
