"""torchtitan as a client: its own Llama of debug size, cut, wrapped and scheduled by its own code, over gloo.

Only its import of torch.distributed.pipelining is redirected, where that is asked for.
"""

import functools
import importlib
import logging
import sys
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

TORCH, OURS = "torch.distributed.pipelining", "pipeline_ext.pipelining"
SCHEDULES = ("1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble")
WRAPS = ("plain", "fsdp", "full checkpointing", "selective checkpointing")
MICROBATCHES = 4


def use(package: str) -> None:
    """Lets torchtitan find ``package`` where it imports torch's. Call it before torchtitan is imported."""
    importlib.import_module(package)
    for name in [name for name in sys.modules if name.startswith(TORCH)]:
        sys.modules[name] = sys.modules[name.replace(TORCH, package, 1)]
    logging.disable(logging.INFO)


class Client(NamedTuple):
    """What torchtitan's trainer holds in one process."""

    schedule: Any
    parts: list[nn.Module]
    has_first: bool
    has_last: bool

    def step(self, tokens: Tensor, labels: Tensor) -> list[Tensor]:
        """A training step as in torchtitan's trainer. In the last process it returns each microbatch's loss."""
        losses: list[Tensor] = []
        self.schedule.step(
            *([tokens] if self.has_first else []),
            target=labels if self.has_last else None,
            losses=losses if self.has_last else None,
            loss_kwargs={"global_valid_tokens": torch.tensor(float(labels.numel()))},
            return_outputs=False,
        )
        return losses

    def gradients(self) -> dict[str, Tensor]:
        """By the parameters' names in the unsplit model."""
        found = {}
        for part in self.parts:
            for name, parameter in part.named_parameters():
                grad = parameter.grad
                assert grad is not None, name
                name = name.replace("_checkpoint_wrapped_module.", "")
                found[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        return found


def batch(length: int, replica: int = 0) -> tuple[Tensor, Tensor]:
    """Token numbers and labels, of two rows for each microbatch."""
    generator = torch.Generator().manual_seed(replica)
    return torch.randint(0, 2048, (2, 2 * MICROBATCHES, length), generator=generator).unbind()


@functools.cache
def model_of_debug_size() -> tuple[Any, nn.Module]:
    """torchtitan's configuration of a Llama, and the Llama, which torchtitan copies for each stage."""
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.llama3 import llama3_configs

    config = llama3_configs["debugmodel"](attn_backend="flex")
    for layer in config.layers:  # flex attention would be compiled
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    torch.manual_seed(1)
    model = config.build()
    model.init_states()
    return config, model


def make(schedule: str, wrap: str, chunked_loss: bool = False) -> Client:
    """All processes call it together: pairs of them hold the stages, as many pairs replicate them by FSDP."""
    from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
    from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
    from torchtitan.distributed import ParallelDims, parallel_dims
    from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
    from torchtitan.distributed.pipeline_parallel import pipeline_llm
    from torchtitan.models.llama3 import parallelize_llama

    parallel_dims.device_type = "cpu"  # where it finds no GPU it takes "cuda"
    parallelism = ParallelismConfig(
        pipeline_parallel_degree=2,
        pipeline_parallel_schedule=schedule,
        pipeline_parallel_microbatch_size=2,
        spmd_backend="partial_dtensor",
    )
    dims = ParallelDims.from_config(parallelism, dist.get_world_size())
    dims.build_mesh()
    checkpointing = {"full checkpointing": FullAC.Config(), "selective checkpointing": SelectiveAC.Config()}
    config, model = model_of_debug_size()

    def parallelize(part: nn.Module, **options: Any) -> nn.Module:
        if wrap == "fsdp":
            part = parallelize_llama(part, **options)
            for module in part.modules():
                if isinstance(module, FSDPModule):  # gloo cannot multiply while it sums
                    module.set_force_sum_reduction_for_comms(True)
            return part
        if options["ac_config"] is not None:
            options["ac_config"].build().apply(part)
        return part

    loss = (ChunkedLossWrapper if chunked_loss else CrossEntropyLoss).Config().build()
    client = Client(
        *pipeline_llm(
            model,
            parallel_dims=dims,
            training=TrainingConfig(
                local_batch_size=2 * MICROBATCHES,
                mixed_precision_param="float32",
                mixed_precision_reduce="float32",
            ),
            parallelism=parallelism,
            compile_config=CompileConfig(),
            ac_config=checkpointing.get(wrap),
            dump_folder="",
            device=torch.device("cpu"),
            model_config=config,
            parallelize_fn=parallelize,
            loss_fn=loss,
        )
    )
    if chunked_loss and client.has_last:
        last = client.parts[-1]
        loss.set_lm_head(last.lm_head)
        last._skip_lm_head = True
    return client
