"""The arguments that plain Megatron-LM saves in `common.pt`: what they say about the model.

They are a pickled `argparse.Namespace` with values of many classes. Nothing of those is imported: each class
and function is replaced by a stand-in that does nothing.
"""

import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bridge.contained_path import contained_file
from bridge.errors import CheckpointError, ConfigError
from bridge.families import family_named
from bridge.provider import GPTModelProvider
from bridge.torch_dist.metadata import SHARED_OBJECT
from bridge.torch_dist.restricted_pickle import Globals, inert, read_pickle
from bridge.vocab_padding import DEFAULT_MULTIPLE, USUAL_SIZES, VocabPadding

Arguments = dict[str, Any]
MAX_PICKLE_SIZE = 64 << 20  # arguments are some 50 KB


class _StandIns(dict[tuple[str, str], Any]):
    """Something inert for every name that a pickle refers to."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: tuple[str, str]) -> Any:
        return dict if name == ("collections", "OrderedDict") else inert(".".join(name))


def read_arguments(folder: Path) -> Arguments | None:
    """Return the arguments that a checkpoint holds by name; None if it holds none."""
    file = contained_file(folder, SHARED_OBJECT, folder)
    try:
        with zipfile.ZipFile(file) as archive:
            (entry,) = (info for info in archive.infolist() if info.filename.endswith("/data.pkl"))
            if entry.file_size > MAX_PICKLE_SIZE:
                raise CheckpointError(
                    f"{file} holds {entry.file_size} bytes of pickled values, too many to read"
                )
            data = archive.read(entry)
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    stand_ins: Globals = _StandIns()
    state = read_pickle(data, stand_ins, str(file))
    arguments = state.get("args") if isinstance(state, dict) else None
    return dict(vars(arguments)) if hasattr(arguments, "__dict__") else None


def _query_groups(arguments: Arguments) -> Any:
    grouped = arguments.get("group_query_attention", True)
    return (arguments.get("num_query_groups") if grouped else None) or arguments.get("num_attention_heads")


def _dtype(arguments: Arguments) -> str:
    return "bfloat16" if arguments.get("bf16") else "float16" if arguments.get("fp16") else "float32"


def _activation(arguments: Arguments) -> str | None:
    if "swiglu" not in arguments:
        return None
    if arguments["swiglu"]:
        return "silu"
    if arguments.get("quick_geglu"):
        return "quick_gelu"
    return "squared_relu" if arguments.get("squared_relu") else "gelu"


def _gated(arguments: Arguments) -> bool | None:
    return arguments["swiglu"] or bool(arguments.get("quick_geglu")) if "swiglu" in arguments else None


# How an argument's name or meaning differs from the provider's field (megatron/training/arguments.py).
OTHER_NAMES: dict[str, Callable[[Arguments], Any]] = {
    "num_query_groups": _query_groups,
    "layernorm_epsilon": lambda a: a.get("norm_epsilon"),
    "gated_linear_unit": _gated,
    "activation_func": _activation,
    "layernorm_zero_centered_gamma": lambda a: a.get("apply_layernorm_1p"),
    "share_embeddings_and_output_weights": lambda a: not a.get("untie_embeddings_and_output_weights", False),
    "num_moe_experts": lambda a: a.get("num_experts"),
}
SAME_NAMES = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "kv_channels",
    "normalization",
    "add_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "position_embedding_type",
    "rotary_base",
    "rotary_percent",
    "rotary_interleaved",
    "softmax_type",
    "multi_latent_attention",
)
# Null is a value of these.
OPTIONAL_NAMES = ("window_size", "softmax_scale", "mtp_num_layers")
OPTIONAL_EXPERT_NAMES = (
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_topk_scaling_factor",
)
EXPERT_NAMES = (
    "moe_ffn_hidden_size",
    "moe_router_topk",
    "moe_shared_expert_intermediate_size",
    "moe_router_score_function",
    "moe_router_pre_softmax",
    "moe_router_enable_expert_bias",
)
# What changes a model in a way that neither our families nor our modules have, and what leaves it as it is.
UNUSED: dict[str, tuple[Any, ...]] = {
    "rotary_seq_len_interpolation_factor": (None, 1),
    "no_rope_freq": (None,),
    "qk_l2_norm": (False,),
    "attention_output_gate": (False,),
    "openai_gelu": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "hybrid_override_pattern": (None,),
    "heterogeneous_layers_config_path": (None,),
    "experimental_attention_variant": (None,),
    "mrope_section": (None,),
}
LATENT_NAMES = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")


def _fields(arguments: Arguments) -> Iterator[tuple[str, Any]]:
    """Yield the provider's fields that the arguments set."""
    names = [*SAME_NAMES]
    names += EXPERT_NAMES if arguments.get("num_experts") else ()
    names += LATENT_NAMES if arguments.get("multi_latent_attention") else ()
    for name in names:
        if arguments.get(name) is not None:
            yield name, arguments[name]
    for name in (*OPTIONAL_NAMES, *(OPTIONAL_EXPERT_NAMES if arguments.get("num_experts") else ())):
        if name in arguments:
            value = arguments[name]
            yield name, tuple(value) if isinstance(value, list) else value
    for name, read in OTHER_NAMES.items():
        value = read(arguments)
        if value is not None or name == "num_moe_experts":
            yield name, value


class Contradiction(NamedTuple):
    """A setting under Megatron's name: what a config says of it, and what the model was trained with."""

    name: str
    described: Any
    trained: Any


def contradictions(provider: GPTModelProvider, arguments: Arguments) -> list[Contradiction]:
    """List everything in which a model's description contradicts a checkpoint's arguments."""
    found = [Contradiction(name, getattr(provider, name), value) for name, value in _fields(arguments)]
    rope = provider.rope_parameters
    # Other kinds of scaling have no argument of their own.
    if arguments.get("use_rope_scaling") is not None and rope.get("rope_type") in ("default", "llama3"):
        scaling = _rope_scaling(arguments)
        found += [Contradiction(f"rope_parameters.{n}", rope.get(n), value) for n, value in scaling.items()]
    found += [
        Contradiction(name, unused[0], arguments[name])
        for name, unused in UNUSED.items()
        if arguments.get(name) and arguments[name] not in unused
    ]
    if arguments.get("num_experts") and "moe_layer_freq" in arguments:
        trained = _expert_layers(arguments["moe_layer_freq"], provider.num_layers)
        found.append(Contradiction("moe_layers", provider.moe_layers, trained))
    different = [each for each in found if each.described != each.trained]
    padded = arguments.get("padded_vocab_size")
    if padded and not padding_of(arguments).explains(padded, provider.vocab_size):
        different.append(Contradiction("vocab_size", provider.vocab_size, padded))
    return different


def _expert_layers(frequency: Any, num_layers: int) -> list[bool]:
    if isinstance(frequency, int):
        return [layer % frequency == 0 for layer in range(num_layers)]
    return [bool(each) for each in frequency]


def padding_of(arguments: Arguments) -> VocabPadding:
    """Return what the arguments say of the rows behind the vocabulary."""
    return VocabPadding(
        divisible_by=arguments.get("make_vocab_size_divisible_by") or DEFAULT_MULTIPLE,
        tensor_sizes=(*USUAL_SIZES, arguments.get("tensor_model_parallel_size") or 1),
        num_tokens=arguments.get("vocab_size"),
        total=arguments.get("padded_vocab_size"),
    )


def check_arguments(provider: GPTModelProvider, arguments: Arguments, config: Path | str) -> None:
    """Raise a ConfigError that names everything in which a config contradicts a checkpoint's arguments."""
    if found := contradictions(provider, arguments):
        lines = [f"{each.name} is {each.described!r}, trained was {each.trained!r}" for each in found]
        if found[-1].name == "vocab_size":
            lines[-1] += " with its padding"
        raise ConfigError(
            f"{config} is not of the model that the checkpoint's arguments describe: {'; '.join(lines)}"
        )


def _rope_scaling(arguments: Arguments) -> dict[str, Any]:
    if not arguments.get("use_rope_scaling"):
        return {"rope_type": "default"}
    # Megatron Core's other numbers are fixed: models/common/embeddings/rotary_pos_embedding.py
    fixed = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {"rope_type": "llama3", "factor": float(arguments.get("rope_scaling_factor") or 8.0), **fixed}


def provider_from_arguments(arguments: Arguments, family: str) -> GPTModelProvider:
    """Describe the model of a Llama-like family from the arguments of its training alone.

    What the family's Hugging Face config has no words for is a ConfigError.
    """
    theta = float(arguments.get("rotary_base") or 10000.0)
    vocab_size = arguments.get("vocab_size") or arguments.get("padded_vocab_size")
    provider = GPTModelProvider(
        **{name: value for name, value in _fields(arguments) if value is not None},
        vocab_size=int(vocab_size or 0),
        max_position_embeddings=int(arguments.get("max_position_embeddings") or 0),
        rope_parameters={**_rope_scaling(arguments), "rope_theta": theta},
        params_dtype=_dtype(arguments),
        hf_model_type=family,
    ).finalize()
    named = family_named(family)
    check_arguments(named.provider(named.hf_config(provider)), arguments, f"a config of {family}")
    return provider
