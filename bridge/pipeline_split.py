"""Which layers each pipeline stage gets: equal parts, or the uneven ones that a provider asks for."""

import itertools
import re

from bridge.errors import ConfigError
from bridge.provider import GPTModelProvider

UNEVEN = ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
COUNTED = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")


def check_pipeline_split(provider: GPTModelProvider) -> None:
    """Refuse a split that Megatron Core cannot make, by ConfigError."""
    pipeline, virtual = (
        provider.pipeline_model_parallel_size,
        provider.virtual_pipeline_model_parallel_size or 1,
    )
    if provider.virtual_pipeline_model_parallel_size and pipeline == 1:
        raise ConfigError("model.virtual_pipeline_model_parallel_size needs pipeline_model_parallel_size > 1")
    if provider.pipeline_model_parallel_layout is not None:
        check_layout(provider, provider.pipeline_model_parallel_layout, pipeline * virtual)
    elif any(getattr(provider, name) is not None for name in UNEVEN):
        check_uneven(provider, pipeline, virtual)
    else:
        counted = provider.num_layers + sum(getattr(provider, name) for name in COUNTED)
        if counted % (pipeline * virtual):
            raise ConfigError(
                f"model.num_layers {provider.num_layers} is not divisible by the {pipeline * virtual}"
                f" pipeline stages (pipeline {pipeline} x virtual {virtual}): change one of them, or say how"
                f" many layers the outer stages get with model.{UNEVEN[0]} and model.{UNEVEN[1]}"
            )


def check_uneven(provider: GPTModelProvider, pipeline: int, virtual: int) -> None:
    """Check that the stages between the named outer ones can be equal."""
    given = [count for name in UNEVEN if (count := getattr(provider, name)) is not None]
    if any(getattr(provider, name) for name in COUNTED):
        raise ConfigError(f"model.{UNEVEN[0]} and model.{UNEVEN[1]} leave no use for model.{COUNTED[0]}")
    if pipeline == 1 or min(given) < 1 or any(count % virtual for count in given):
        raise ConfigError(
            f"model.{UNEVEN[0]} and model.{UNEVEN[1]} are {given}: they need more than one pipeline stage, at"
            f" least one layer and a multiple of virtual_pipeline_model_parallel_size {virtual}"
        )
    stages, layers = pipeline - len(given), provider.num_layers - sum(given)
    if layers < 0 or (layers if stages == 0 else layers % (stages * virtual)):
        raise ConfigError(
            f"{layers} of model.num_layers {provider.num_layers} remain for the {stages} pipeline stages"
            f" without a number of their own, which is no multiple of {max(1, stages) * virtual}"
        )


def check_layout(provider: GPTModelProvider, layout: str, stages: int) -> None:
    """Check what is where in a layout such as "Et*3|(tt|)*2,tmL"."""
    spelt = expand(layout)
    if set(spelt) - set("EtmL|,"):
        raise ConfigError(
            f"model.pipeline_model_parallel_layout {layout!r} holds something else than E (embedding), t"
            " (layer), m (multi-token prediction), L (loss), | between stages, (...)*n for repetition"
        )
    found = (spelt.count("t"), spelt.count("|") + 1)
    if found != (provider.num_layers, stages):
        raise ConfigError(
            f"model.pipeline_model_parallel_layout {layout!r} has {found[0]} layers in {found[1]} stages, but"
            f" the model {provider.num_layers} in {stages} (pipeline x virtual)"
        )
    predicting = "m" * (provider.mtp_num_layers or 0)
    if not re.fullmatch(rf"E[t|]*{predicting}L", spelt):
        # Measured (Megatron Core 0.16.1): prediction layers in a stage without the loss give wrong gradients.
        raise ConfigError(
            f"model.pipeline_model_parallel_layout {layout!r}: an embedding (E) comes first; the last stage"
            f" ends with the model's {len(predicting)} layers of multi-token prediction (m) and the loss (L)"
        )


def expand(layout: str) -> str:
    """Spell out the repetitions, as PipelineParallelLayerLayout.parse_str_to_list does."""
    spelt = re.sub(r"\(([^()]+)\)\*(\d+)", lambda found: found[1] * int(found[2]), layout.replace(",", ""))
    return re.sub(r"(.)\*(\d+)", lambda found: found[1] * int(found[2]), spelt)


def layers_of_stage(provider: GPTModelProvider, stage: int) -> list[int]:
    """Return the layers of one pipeline stage, of all its chunks if the pipeline is interleaved."""
    counts = layers_per_chunk(provider)
    firsts = list(itertools.accumulate(counts, initial=0))
    chunks = range(stage, len(counts), provider.pipeline_model_parallel_size)
    return [layer for chunk in chunks for layer in range(firsts[chunk], firsts[chunk + 1])]


def layers_per_chunk(provider: GPTModelProvider) -> list[int]:
    """Count the layers of every chunk in the order that a token passes them: chunk by chunk over all stages.

    The provider's split must have been checked.
    """
    pipeline = provider.pipeline_model_parallel_size
    virtual = provider.virtual_pipeline_model_parallel_size or 1
    if provider.pipeline_model_parallel_layout is not None:
        return [part.count("t") for part in expand(provider.pipeline_model_parallel_layout).split("|")]
    first, last = (getattr(provider, name) for name in UNEVEN)
    if first is not None or last is not None:
        between = pipeline - (first is not None) - (last is not None)
        rest = (provider.num_layers - (first or 0) - (last or 0)) // max(1, between)
        stages = [first or rest, *[rest] * (pipeline - 2), last or rest]
        return [layers // virtual for layers in stages] * virtual
    embedding, loss = (int(getattr(provider, name)) for name in COUNTED)
    counts = [(provider.num_layers + embedding + loss) // (pipeline * virtual)] * (pipeline * virtual)
    counts[0] -= embedding
    counts[-1] -= loss
    return counts
