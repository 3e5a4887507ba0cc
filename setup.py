"""Builds the native core; all metadata is in pyproject.toml."""

import sys
from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

if not sys.platform.startswith("linux"):
    raise SystemExit(f"pipeline_ext runs on Linux only; this is {sys.platform}.")

ParallelCompile("PIPELINE_EXT_BUILD_JOBS", default=0).install()

# Loops that cast tensors: the same bits whether or not the processor multiplies and adds at once; and what an
# element does not need may be computed all the same, without which few of them vectorize.
CASTS = ["-ffp-contract=off", "-fno-trapping-math"]

setup(
    ext_modules=[
        Pybind11Extension(
            "pipeline_ext._C",
            sorted(glob("csrc/*/*.cpp")),
            depends=sorted(glob("csrc/*/*.hpp")),
            include_dirs=["csrc"],
            cxx_std=20,
            extra_compile_args=["-O3", "-Wall", "-Wextra", "-pthread", *CASTS],
            extra_link_args=["-pthread", "-ldl"],
        )
    ]
)
