"""The typed configuration of a run: every key a user can set, with its type and unit.

Plain dataclasses without behaviour. Hydra composes YAML files of ``conf/`` into
``Config`` (see ``composition.py``); ``validate.py`` refuses impossible combinations.
Model keys carry the names of Hugging Face's DeepSeek-V3 configuration, so that
``conf/model/k2.yaml`` can be held against the released ``config.json`` line by line.
No torch import here: a wrong key must be reported in well under two seconds.
"""

from dataclasses import dataclass, field

from omegaconf import MISSING

from kimi_pretrain.config.launcher import LauncherConfig


@dataclass
class RopeScalingConfig:
    """YaRN (arXiv 2309.00071) as DeepSeek-V3 reads it; absent means plain RoPE."""

    type: str = "yarn"
    factor: float = MISSING
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0


@dataclass
class ModelConfig:
    """One model of the DeepSeek-V3/Kimi-K2 family. Widths are in elements."""

    name: str = MISSING
    # The dial of the small presets (number of attention heads); see config/family.py.
    dial: int | None = None
    vocab_size: int = MISSING
    hidden_size: int = MISSING
    num_hidden_layers: int = MISSING
    # attention (MLA)
    num_attention_heads: int = MISSING
    q_lora_rank: int | None = None  # None: q_proj instead of q_a_proj, q_b_proj
    kv_lora_rank: int = MISSING
    qk_nope_head_dim: int = MISSING
    qk_rope_head_dim: int = MISSING
    v_head_dim: int = MISSING
    max_position_embeddings: int = MISSING
    rope_theta: float = 50000.0
    rope_scaling: RopeScalingConfig | None = None
    # dense and expert MLPs
    intermediate_size: int = MISSING  # SwiGLU width of the first dense layers
    first_k_dense_replace: int = 1
    moe_intermediate_size: int = MISSING  # SwiGLU width of one expert
    n_routed_experts: int = MISSING
    n_shared_experts: int = 1
    num_experts_per_tok: int = MISSING
    # router
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.827
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    aux_loss_alpha: float = 0.001  # sequence-wise auxiliary loss; 0 switches it off
    # the rest
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    num_nextn_predict_layers: int = 0
    bos_token_id: int | None = None
    eos_token_id: int | None = None


@dataclass
class OptimizerConfig:
    """MuonClip (arXiv 2507.20534, Algorithm 1) and AdamW for the non-matrix parameters."""

    name: str = "muonclip"
    lr: float = 2e-4  # peak; the schedule's stages are fractions of it
    weight_decay: float = 0.1
    momentum: float = 0.95
    nesterov: bool = True
    ns_coefficients: str = "keller5"  # a table of optim/orthogonalize.py
    update_rms: float = 0.2  # Muon's update is scaled by this x sqrt(max(rows, cols))
    adam_betas: tuple[float, float] = (0.9, 0.95)
    adam_eps: float = 1e-8
    qk_clip_threshold: float | None = 100.0  # tau; null switches QK-Clip off
    grad_clip: float | None = 1.0  # global norm; null switches clipping off
    router_bias_rate: float = 0.001  # u of the aux-loss-free balancing; 0 freezes the bias


@dataclass
class StageConfig:
    """One stage of the learning-rate schedule, counted in tokens or in steps (exactly one)."""

    name: str = MISSING
    shape: str = MISSING  # linear | constant | cosine
    tokens: int | None = None
    steps: int | None = None
    to: float = 1.0  # learning rate at the stage's end, as a fraction of optimizer.lr


@dataclass
class ScheduleConfig:
    """How long a run is, how large a step is, and what happens every so many steps."""

    global_batch_size: int = MISSING  # sequences a step
    # sequences a microbatch; null: a replica's whole share, in a pipeline one sequence
    micro_batch_size: int | None = None
    max_steps: int | None = None  # stops here even if stages go on; null: the stages' end
    stages: list[StageConfig] = field(default_factory=list)
    eval_interval: int = 50  # steps; 0 never
    eval_sequences: int = 64  # held-out windows read at each evaluation
    checkpoint_interval: int = 100  # steps; 0 only at the end
    keep_checkpoints: int = 2
    sample_tokens: int = 120  # length of the sample generated at the end; 0 none
    bigram_baseline: bool = False  # at the end, hold the loss against a bigram of the same tokens


@dataclass
class TokenizerConfig:
    """Which tokenizer turns text into ids; `path` for the kinds that read a file."""

    kind: str = MISSING  # bytes | bpe | tiktoken
    path: str | None = None
    vocab_size: int | None = None  # of a BPE trained here


@dataclass
class DomainConfig:
    """One domain of prepared tokens: `<path>.bin/.idx` for training and for held-out loss."""

    train: str = MISSING
    heldout: str | None = None


@dataclass
class MixtureStageConfig:
    """Domain weights for a number of tokens; the last stage may leave `tokens` open."""

    weights: dict[str, float] = field(default_factory=dict)
    tokens: int | None = None


@dataclass
class DataConfig:
    """Where tokens come from and in which order they are read (design 4.8)."""

    name: str = MISSING
    root: str = MISSING  # prepared corpora live below; relative domain paths start here
    recipe: str | None = None  # a corpus this package can build offline; null: files only
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    domains: dict[str, DomainConfig] = field(default_factory=dict)
    mixture: list[MixtureStageConfig] = field(default_factory=list)
    sequence_length: int = MISSING  # tokens a window; a sample holds one more for the labels
    document_mask: bool = True  # attention stays inside a document


@dataclass
class ParallelConfig:
    """Ranks a dimension. `dp` counts replicas of the dense parameters (edp x ep)."""

    pp: int = 1
    vpp: int = 1
    ep: int = 1
    dp: int = 1
    schedule: str = "none"  # none | gpipe | 1f1b | interleaved_1f1b | k2 | zb_h1 | dualpipe_v
    schedule_file: str | None = None  # rows of text instead, one a pipeline rank (docs/pipeline.md)
    # weight gradients that a rank puts off at once, at most; null: as many as the schedule does
    weight_grads_held: int | None = None
    layer_split: str = "even"  # even | balanced: over pp x vpp stages, by count or by cost
    # ZeRO-1 (design 4.5): flat shards of dense matrices, or whole matrices on their owner
    dense_sharding: str = "auto"  # auto | flat | aligned; auto: aligned where padding <= 1.1
    bucket_elements: int = 40_000_000  # parameters are reduced in buckets of about this many
    # where an expert's output gets its router weight: at the token, or before the down-projection
    router_weights: str = "after_combine"  # after_combine | before_down
    dispatcher: str = "all_to_all"  # all_to_all | deepep: who brings tokens to other ranks' experts
    timeout_seconds: float = 600.0  # the longest a rank waits for another


@dataclass
class ActivationConfig:
    """What a layer keeps for backward (config/activation.py: the tags and their policies)."""

    policy: str = "none"  # none | k2 | custom
    # of custom: tag -> keep | recompute | fp8 | offload | fp8+offload; tags left out are kept
    tags: dict[str, str] = field(default_factory=dict)
    # what is computed again is, before the gradient is there: sooner, and in memory for longer
    ahead: bool = False
    host_bytes: int | None = None  # for what leaves the device, a rank; null: what the plan says


@dataclass
class EfficiencyConfig:
    """Assumed shares of a peak that a step reaches; docs/plan.md says what rests on them."""

    matmul: float = 0.72  # of peak_flops: dense projections, the head, Newton-Schulz
    grouped_matmul: float = 0.62  # of peak_flops: routed experts, about a thousand rows each
    attention: float = 0.50  # of peak_flops: scores and values of causal attention
    memory: float = 0.80  # of memory_bandwidth: norms, SwiGLU, rotations, permutations
    nvlink: float = 0.80  # of nvlink_bandwidth
    rdma: float = 0.85  # of nic_bandwidth
    host: float = 0.80  # of host_bandwidth


@dataclass
class ClusterConfig:
    """Facts about the machine; a bandwidth is bytes a second in one direction.

    `peak_flops` null means: a run measures a matmul at start. `plan` needs all of them.
    """

    name: str = MISSING
    peak_flops: float | None = None  # dense bf16 FLOP/s of a GPU
    source: str = ""
    memory_bytes: float | None = None  # of a GPU
    memory_bandwidth: float | None = None  # of a GPU's memory
    gpus_per_node: int = 8
    nvlink_bandwidth: float | None = None  # of a GPU to the others of its node
    nics_per_node: int = 8
    nic_bandwidth: float | None = None  # of one NIC
    host_memory_bytes: float | None = None  # of a node
    host_bandwidth: float | None = None  # of a GPU to its host's memory
    reserved_bytes: float = 3.0e9  # CUDA context, NCCL's buffers, workspaces of libraries
    fragmentation: float = 0.05  # of what is allocated anew every step
    efficiency: EfficiencyConfig = field(default_factory=EfficiencyConfig)
    device: str = "gpu"  # gpu | cpu: what a rank computes on
    environment: dict[str, str] = field(default_factory=dict)  # of every rank on its nodes


@dataclass
class LoggingConfig:
    """Where metrics go. metrics.jsonl is always written."""

    sinks: list[str] = field(default_factory=list)  # wandb | tensorboard | prometheus, beside jsonl
    console: str = "auto"  # auto | live | plain | off
    console_interval: int = 10  # steps between plain lines
    layer_interval: int = 10  # steps between rows of layers.jsonl (per-layer arrays)
    rank_interval: int = 10  # steps between rows of ranks.jsonl (every rank's times compared)
    trace_step: int | None = None  # the step of which RUN/trace says who did what when
    report: bool = True  # write report/ at the end of the run
    prometheus_file: str | None = None  # where that sink writes; null: RUN/metrics.prom
    wandb_project: str = "kimi_pretrain"
    wandb_mode: str = "offline"  # offline | online


@dataclass
class Config:
    """One run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    activation: ActivationConfig = field(default_factory=ActivationConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    precision: str = "auto"  # auto | bf16 | fp32 | fp64
    kernels: str = "auto"  # auto | reference | native: who runs an op (docs/kernels.md)
    seed: int = 0
    run_dir: str = MISSING
    resume: bool = True  # go on from run_dir's latest checkpoint if there is one
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    experiment: str | None = None  # the preset this came from, set by conf/experiment
