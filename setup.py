from setuptools import find_packages, setup

setup(
    name="fused-residual",
    version="0.1.0",
    description="A drop-in ResNet residual block that fuses BatchNorm, residual add and ReLU in Triton kernels",
    license="MIT",
    license_files=["LICENSE"],
    author="the fused-residual authors",
    python_requires=">=3.10",
    packages=find_packages(include=["resnet", "resnet.*"]),
    package_data={"resnet": ["**/*.gz", "**/*.npz", "**/*.txt", "**/*.md"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; sys_platform == 'linux'",  # there are no wheels for other systems
        "numpy",
        "tqdm",
    ],
    extras_require={
        "plot": ["matplotlib"],
        "test": ["pytest", "pytest-benchmark", "pytest-xdist", "hypothesis", "ruff"],
    },
)
