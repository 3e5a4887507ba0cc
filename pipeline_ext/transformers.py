"""Trains models of Hugging Face's transformers with its Trainer, as a pipeline. Needs the extra `hf`."""

try:
    from .hf.trainer import PipelineTrainer
except ModuleNotFoundError as error:
    if error.name not in ("transformers", "accelerate"):
        raise
    raise ModuleNotFoundError(
        f"pipeline_ext.transformers needs {error.name}: pip install 'pipeline_ext[hf]'", name=error.name
    ) from error

__all__ = ["PipelineTrainer"]
