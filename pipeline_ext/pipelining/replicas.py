"""Stages under data parallelism: nothing is reduced before a step's last backward.

DDP and FSDP2 start reducing from hooks of a backward. A stage runs one for each microbatch, so these are kept
from it, and afterwards called once.
"""

import contextlib

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining.stage import _PipelineStageBase
from torch.nn.parallel import DistributedDataParallel


def accumulating(module: nn.Module) -> contextlib.AbstractContextManager:
    """In it a backward only adds to ``.grad``."""
    if isinstance(module, DistributedDataParallel):
        return module.no_sync()
    if isinstance(module, FSDPModule):
        module.set_is_last_backward(False)
        module.set_reshard_after_backward(False)
        module.set_requires_gradient_sync(False)
    return contextlib.nullcontext()


def reduce_ddp(module: nn.Module) -> None:
    """Has DDP average the gradients now, with its own buckets and hooks."""
    if not isinstance(module, DistributedDataParallel):
        return
    parameters = [p for p in module.parameters() if p.requires_grad]
    if module.find_unused_parameters:
        parameters = [p for p in parameters if p.grad is not None]
    module.reducer.prepare_for_backward(parameters)
    # A backward that adds nothing: the reducer waits for one to come by each parameter.
    torch.autograd.backward(parameters, [p.new_zeros(()).expand_as(p) for p in parameters])


def reduce_fsdp(stage: _PipelineStageBase) -> None:
    """Has FSDP reduce the gradients, and gather no longer."""
    _PipelineStageBase.perform_reduce_grad(stage, 1)


def unshard(stage: _PipelineStageBase) -> list:
    """Begins to gather the parameters; returns what to wait for."""
    modules = stage.submod.modules() if isinstance(stage.submod, FSDPModule) else ()
    return [m.unshard(async_op=True) for m in modules if isinstance(m, FSDPModule)]


def reshard(stage: _PipelineStageBase) -> None:
    """Lets go of the gathered parameters."""
    if isinstance(stage.submod, FSDPModule):
        for module in stage.submod.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
