"""A pipeline that finds its slots by measured memory, and a loss whose memory is known."""

import pipeline_ext as pe


def product(output, target):
    return (output * target).mean()  # keeps both; mse_loss keeps a result in memory of their size


def pipeline(model, microbatches, limit, schedule="1f1b", **options):
    """A stage for each layer; ``limit``: bytes that a rank may hold."""
    costs = pe.Costs(memory_limit=limit)
    return pe.Pipeline(
        model, len(model), microbatches, schedule, product, in_flight="auto", costs=costs, **options
    )
