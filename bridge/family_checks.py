"""What the test suite holds each family to: tests/bridge takes its cases from here, `families` shows it."""

import pkgutil

from bridge.families import __path__ as own_folder
from bridge.families import families
from bridge.family import Family

# In one process: config.json both ways over every key; every tensor bit for bit, there and back.
CONVERSION = ("config", "weights")
# On two ranks: weights bit for bit, gradients and logits in float32 against transformers (vpp2: no logits)
DENSE_LAYOUTS = ("dp2", "tp2", "tp2 sequence parallel", "pp2", "pp2 vpp2")
# Megatron trains experts with tensor parallelism only where the sequence is cut as well.
EXPERT_LAYOUTS = ("dp2", "tp2 sequence parallel", "pp2", "pp2 vpp2", "ep2", "tp2 ep2")
# It has experts with biases whole only.
BIASED_EXPERT_LAYOUTS = ("dp2", "pp2", "pp2 vpp2", "ep2", "tp2 ep2")
CPU, GPU = "cpu", "gpu"


def layouts_of(family: Family) -> tuple[str, ...]:
    """Return the layouts of two ranks in which a family is tested."""
    experts = [rule.megatron_param for rule in family.weights if rule.experts]
    if any(name.endswith(".bias") for name in experts):
        return BIASED_EXPERT_LAYOUTS
    return EXPERT_LAYOUTS if experts else DENSE_LAYOUTS


def checks_of(family: Family) -> dict[str, str]:
    """Return every check of a family by name, and where it runs: CPU, or GPU if there only."""
    names = (*CONVERSION, *layouts_of(family))
    return {name: GPU if name in family.needs_gpu else CPU for name in names}


def is_ours(family: Family) -> bool:
    """Say whether a family is of this tree, whose suite tests it; others come with tests of their own."""
    return family.model_type in {module.name for module in pkgutil.iter_modules(own_folder)}


def families_with(check: str, where: str = CPU) -> list[str]:
    """List the families of which a check is run there."""
    return [name for name, family in families().items() if checks_of(family).get(check) == where]
