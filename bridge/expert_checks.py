"""What cannot be in a mixture of experts and in its parallel layout, by ConfigError."""

from bridge.errors import ConfigError
from bridge.provider import GPTModelProvider


def check_experts(provider: GPTModelProvider) -> None:
    """Refuse experts that Megatron Core cannot build, or would train wrongly without an error."""
    if provider.num_moe_experts is None:
        for name in ("expert_model_parallel_size", "expert_tensor_parallel_size"):
            if (getattr(provider, name) or 1) > 1:
                raise ConfigError(
                    f"model.{name} is {getattr(provider, name)} in a model without experts: choose 1"
                )
        return
    check_routing(provider)
    check_expert_parallel_sizes(provider)


def check_routing(provider: GPTModelProvider) -> None:
    frequency = provider.moe_layer_freq
    if isinstance(frequency, list) and (len(frequency) != provider.num_layers or set(frequency) - {0, 1}):
        raise ConfigError(
            f"model.moe_layer_freq is {frequency}: give a 0 or a 1 for each of {provider.num_layers} layers"
        )
    if not 1 <= provider.moe_router_topk <= (provider.num_moe_experts or 0):
        raise ConfigError(
            f"model.moe_router_topk is {provider.moe_router_topk}: choose 1 to {provider.num_moe_experts},"
            " the number of experts"
        )
    softmax = provider.moe_router_score_function == "softmax"
    if provider.moe_router_topk == 1 and softmax and not provider.moe_router_pre_softmax:
        raise ConfigError(
            "model.moe_router_topk 1 gives the one expert a weight of 1, and the router no gradient:"
            " set model.moe_router_pre_softmax"
        )


def check_expert_parallel_sizes(provider: GPTModelProvider) -> None:
    experts, tensor = provider.expert_model_parallel_size, provider.expert_tensor_size
    if (provider.num_moe_experts or 0) % experts:
        raise ConfigError(
            f"model.num_moe_experts {provider.num_moe_experts} is not divisible by"
            f" expert_model_parallel_size {experts}: choose a divisor of {provider.num_moe_experts}"
        )
    # Megatron then sums the gradients of experts over fewer ranks than hold them.
    if experts == 1 and tensor != provider.tensor_model_parallel_size:
        raise ConfigError(
            f"model.expert_tensor_parallel_size {tensor} with expert_model_parallel_size 1 trains wrongly:"
            f" choose {provider.tensor_model_parallel_size}, the tensor_model_parallel_size, or more ranks"
            " for experts"
        )
    if provider.add_bias_linear and tensor != 1:
        raise ConfigError(
            f"model.expert_tensor_parallel_size is {tensor}: Megatron has experts with biases whole only,"
            " so choose 1 and expert_model_parallel_size > 1"
        )
    for name, value, divisor in (
        ("moe_ffn_hidden_size", provider.moe_ffn_hidden_size or provider.ffn_hidden_size, tensor),
        (
            "moe_shared_expert_intermediate_size",
            provider.moe_shared_expert_intermediate_size or 0,
            provider.tensor_model_parallel_size,
        ),
    ):
        if value % divisor:
            raise ConfigError(
                f"model.{name} {value} is not divisible by the tensor parallel size {divisor} of its layers"
            )
