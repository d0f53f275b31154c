import runpy
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="fused-residual",
    version=runpy.run_path(str(HERE / "resnet/_version.py"))["__version__"],  # importing resnet would import torch
    description="A drop-in ResNet residual block that fuses BatchNorm, residual add and ReLU in Triton kernels",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    author="the fused-residual authors",
    keywords="resnet residual block batchnorm fused triton pytorch cuda kernels",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Environment :: GPU",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 15)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Software Development :: Libraries :: Python Modules",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["resnet", "resnet.*"]),
    package_data={
        "resnet": ["py.typed", "data/fashion_mnist_sample/*"],
        "resnet.kernels.tuning": ["choices/*.json"],
    },
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; sys_platform == 'linux'",  # there are no wheels for other systems
        "numpy",
        "tqdm",
    ],
    extras_require={
        "plot": ["matplotlib", "pillow"],  # and images that are read from files
        "tensorboard": ["tensorboard"],
        "test": ["pytest", "pytest-benchmark", "pytest-xdist", "hypothesis", "ruff"],
    },
)
