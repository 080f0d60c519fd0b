"""The names a configuration can choose from, for checking without importing what they mean.

The room that owns a name maps it to a class or a table; ``tests/config/test_names.py`` holds
both lists against each other.
"""

OPTIMIZERS = ("muonclip", "adamw")
NEWTON_SCHULZ_TABLES = ("keller5", "you5", "polar_express", "cans", "deepseek_v4")
STAGE_SHAPES = ("linear", "constant", "cosine")
PRECISIONS = ("auto", "bf16", "fp32", "fp64")
KERNELS = ("auto", "reference", "native")
TOKENIZERS = ("bytes", "bpe", "tiktoken")
SINKS = ("jsonl", "wandb", "tensorboard", "prometheus")
CONSOLES = ("auto", "live", "plain", "off")
WANDB_MODES = ("offline", "online")
LAUNCHERS = ("local", "slurm", "hostfile")
CONTAINER_RUNTIMES = ("pyxis", "apptainer")
SCHEDULES = ("none", "gpipe", "1f1b", "interleaved_1f1b", "k2", "zb_h1", "dualpipe_v")
LAYER_SPLITS = ("even", "balanced")
DENSE_SHARDINGS = ("auto", "flat", "aligned")
DISPATCHERS = ("all_to_all", "deepep")
ROUTER_WEIGHTS = ("after_combine", "before_down")

# recipe -> the domains it builds
RECIPES: dict[str, tuple[str, ...]] = {
    "default": ("code", "math", "prose"),
    "stdlib_tiny": ("code",),
}
BYTES_VOCABULARY = 257  # 256 byte values and the end of a document
