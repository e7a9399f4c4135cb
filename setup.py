"""Packaging of the distribution `srft`: the kernels alone by default, everything else as an extra."""

from pathlib import Path

from setuptools import find_packages, setup

readme = Path(__file__).parent / "README.md"

setup(
    name="srft",
    version="0.1.0",
    description="Single-stage supervised and reinforcement tuning of language models, and loss kernels.",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    author="The SRFT contributors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["srft_kernels", "srft_kernels.*", "srft", "srft.*"]),
    package_data={
        "srft_kernels": ["py.typed"],
        "srft": ["py.typed", "experiments/*.toml", "experiments/suites/*.toml"],
    },
    # A CUDA build of torch pins its own triton exactly, so triton gets a lower bound only: the one that
    # torch 2.11 carries. CPU builds of torch bring none.
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; sys_platform == 'linux' and platform_machine in 'x86_64 aarch64'",
    ],
    extras_require={
        "train": [
            "transformers>=5.16,<6",
            "datasets>=4.7",
            "safetensors>=0.6",
            "numpy",
            "pydantic>=2.12,<3",
            "rich>=14",
            "matplotlib>=3.10",
            "math-verify>=0.9,<0.10",
        ],
        # flash-attn comes as source, which nvcc builds in tens of minutes without build isolation; 3 is on no index
        "flash": ["flash-attn>=2.8.3"],
        "flash4": ["flash-attn-4>=4.0.0b36"],
        "vllm": ["vllm>=0.32,<0.34"],
        "lora": ["peft>=0.19"],
        "tensorboard": ["tensorboard>=2.19"],
        "wandb": ["wandb>=0.19"],
        "gym": ["reasoning-gym>=0.1.25"],
        "dev": [
            "hypothesis",
            "import-linter>=2.17",
            "mypy",
            "psutil",
            "pytest>=9",
            "pytest-benchmark",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "tiktoken",
        ],
    },
)
