"""Compiles the packing kernels for GPUs that need not be here; prints what they became, as JSON.

A process of its own, because the tests' own process interprets kernels.
"""

import json
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget

from pipeline_ext.packing import kernels
from pipeline_ext.packing.tables import blocks

ARCHITECTURES = (80, 90, 100)
f64, f32, f16, bf16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
e4m3, e5m2, i64, u8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int64, torch.uint8
MIXED = [(f64, f64), (f32, e4m3), (f16, f16), (bf16, bf16), (i64, i64), (u8, u8)]

# Kernel, pairs (type of a tensor, type it travels as), room for dimensions, and the options that are on
CASES = {
    "pack f32": ("pack", [(f32, f32)], 1, ""),
    "pack bf16": ("pack", [(bf16, bf16)], 1, ""),
    "pack f32 as bf16": ("pack", [(f32, bf16)], 1, "scaled observed"),
    "pack f32 as e4m3": ("pack", [(f32, e4m3)], 1, "scaled observed"),
    "pack bf16 as e5m2": ("pack", [(bf16, e5m2)], 3, "scaled"),
    "pack u8": ("pack", [(u8, u8)], 1, ""),
    "pack mixed": ("pack", MIXED, 4, "scaled observed"),
    "unpack f32": ("unpack", [(f32, f32)], 1, ""),
    "unpack f32 from bf16": ("unpack", [(f32, bf16)], 1, "scaled accumulated"),
    "unpack bf16 from e4m3": ("unpack", [(bf16, e4m3)], 3, "scaled accumulated"),
    "unpack u8": ("unpack", [(u8, u8)], 1, ""),
    "unpack mixed": ("unpack", MIXED, 4, "scaled"),
}


class Driver:
    """Stands in for a GPU: says which one to compile for."""

    def __init__(self, architecture):
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch

    def get_current_stream(self, device):
        return 0


def compiled(name, pairs, room, options):
    scales, observed = (torch.zeros(16) if word in options else None for word in ("scaled", "observed"))
    tables = torch.zeros(16, dtype=torch.int32), torch.zeros(16, dtype=torch.int64)
    arguments = [*tables, torch.zeros(16, dtype=torch.uint8), 0.5, scales]
    chosen = {"SCALED": "scaled" in options, **kernels.constants(pairs, room, 2**20)}
    if name == "pack":
        arguments += [observed, None if observed is None else observed.int()]
    else:
        chosen["ACCUMULATE"] = "accumulated" in options
    return getattr(kernels, name).run(*arguments, **chosen, grid=(1,), warmup=True)


def resources(cubin):
    """Registers and bytes of local memory a thread uses."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {key: int(number) for key, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def main():
    found = []
    for architecture in ARCHITECTURES:
        triton.runtime.driver.set_active(Driver(architecture))
        for case, (name, pairs, room, options) in CASES.items():
            kernel = compiled(name, pairs, room, options)
            registers, local = resources(kernel.asm["cubin"])
            found.append(
                {
                    "case": case,
                    "architecture": architecture,
                    "pairs": [(tensor.itemsize, wire.itemsize) for tensor, wire in pairs],
                    "words": sum(blocks(tensor) > 1 for tensor, _ in pairs),
                    "accumulated": "accumulated" in options,
                    "ptx": kernel.asm["ptx"],
                    "registers": registers,
                    "local": local,
                }
            )
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
