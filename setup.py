import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(
    r'__version__ = "(.+)"', (ROOT / "keras_bilinear/version.py").read_text()
).group(1)

LITERT = ["ai-edge-litert>=2.0"]
DEMO = [
    *LITERT,
    "importlib_resources",  # tensorflow-datasets needs it and does not declare it
    "matplotlib>=3.8",
    "scikit-learn>=1.4",
    "tensorflow-datasets>=4.9",
]
DOCS = [
    "mkdocs>=1.6,<2",
    "mkdocs-material>=9.5,<10",
    "mkdocstrings>=1,<2",
    "mkdocstrings-python>=2,<3",
]
NOTEBOOKS = ["ipykernel>=6.29", "jupytext>=1.16", "nbclient>=0.10"]

setup(
    name="keras-bilinear",
    version=VERSION,
    description="Keras layers that store bilinear projections instead of full ones",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["keras_bilinear", "keras_bilinear.*"]),
    package_data={"keras_bilinear": ["py.typed"]},
    python_requires=">=3.11",
    install_requires=[
        "absl-py>=2.0",
        "h5py>=3.8",
        "keras>=3.13",
        "numpy>=1.26",
        "rich>=13",
        "scipy>=1.11",
        "tensorflow>=2.20",
    ],
    extras_require={
        "demo": DEMO,
        "docs": DOCS,
        "jax": ["jax>=0.5"],
        "litert": LITERT,
        "test": [
            *DEMO,
            *NOTEBOOKS,
            "hypothesis>=6.100",
            "onnxruntime>=1.20",
            "pytest>=8",
            "ruff>=0.9",
            "tensorboard>=2.19",
            "tf2onnx>=1.16",
        ],
        "torch": ["torch>=2.6"],
        "tutorials": DEMO,
    },
    entry_points={"console_scripts": ["keras-bilinear = keras_bilinear.cli.main:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
