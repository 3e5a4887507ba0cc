"""Presets of ``pipeline-ext train``: defaults that fit a machine. A given option overrides its preset.

The comments estimate a preset's GPU memory from its shapes, with P float32 parameters under autocast. Weights,
gradients and AdamW's two moments take 16 bytes per parameter. For the backward of each microbatch in flight a
block keeps about 40 bytes x width per token (inputs of the layer norms 2 x 4, of the matrix products
2 + 2 + 2 + 8, of attention 6 + 2, of GELU 8, and some), and its weights cast to bfloat16, 2 bytes per
parameter. With two stages on one GPU, half of the blocks each, 1F1B with overlap has five halves of the model
in flight.
"""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {},
    # P = 85 M: state 1.4 GB; 30 times 0.14 GB for a block and microbatch: 4.2 GB. Together 6 GB.
    "gpu-small": {
        "width": 768,
        "layers": 12,
        "heads": 12,
        "context": 512,
        "batch": 64,
        "steps": 1000,
        "learning_rate": 6e-4,
        "autocast": "bfloat16",
        "checkpoint_every": 500,
    },
    # P = 0.47 G: state 7.6 GB; 60 times 0.25 GB for a block and microbatch: 15 GB. Together 23 GB.
    "gpu-medium": {
        "width": 1280,
        "layers": 24,
        "heads": 20,
        "context": 1024,
        "batch": 32,
        "steps": 600,
        "learning_rate": 4e-4,
        "autocast": "bfloat16",
        "checkpoint_every": 0,
    },
    # P = 2.5 G: state 40 GB; 80 times 0.75 GB for a block and microbatch: 60 GB. Together 100 GB of an H200's
    # 149 GB; the rest is for the allocator's fragmentation. A checkpoint has 30 GB.
    "h200": {
        "width": 2560,
        "layers": 32,
        "heads": 20,
        "context": 2048,
        "batch": 24,
        "steps": 200,
        "learning_rate": 2e-4,
        "autocast": "bfloat16",
        "checkpoint_every": 0,
    },
}
