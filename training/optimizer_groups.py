"""Groups of the optimizer's parameters in a loaded state, between layouts with and without spread experts.

Megatron Core has one optimizer, or a chain of one for the dense parameters and one for the experts where
`expert_model_parallel_size` is more than 1 (megatron/core/optimizer/__init__.py). The tensors have the same
names in both; the number of steps belongs to groups, which are told apart by `is_expert_parallel` too.
Everything else in a group is a setting, such as its highest learning rate, and comes from the config.
"""

from typing import Any

from megatron.core.optimizer.optimizer import MegatronOptimizer, param_group_identifier_keys

EXPERTS = "is_expert_parallel"
STEP = "step"
TENSORS = "param_state"


def fit_groups(state: dict[Any, Any], optimizer: MegatronOptimizer) -> dict[Any, Any]:
    """Return a loaded optimizer state with the groups of each optimizer that there is now."""
    current = optimizer.state_dict()
    saved = parts_of(state)
    if not isinstance(current, list):
        return fit_one(state, saved, current)
    return {number: fit_one(state[number], saved, each) for number, each in enumerate(current)}


def parts_of(state: dict[Any, Any]) -> list[dict[str, Any]]:
    """Return the state of each optimizer that was saved: those that have groups."""
    return [part for part in (state, *numbered(state)) if "optimizer" in part]


def numbered(state: dict[Any, Any]) -> list[dict[str, Any]]:
    return [state[key] for key in sorted(key for key in state if isinstance(key, int))]


def fit_one(part: dict[Any, Any], saved: list[dict[str, Any]], current: dict[str, Any]) -> dict[str, Any]:
    groups = [group for each in saved for group in each["optimizer"]["param_groups"]]
    wanted = current["optimizer"]["param_groups"]
    settings = {key: value for key, value in saved[0].items() if not isinstance(key, int)}
    return {
        **settings,
        "optimizer": {**saved[0]["optimizer"], "param_groups": [find(group, groups) for group in wanted]},
        **({TENSORS: part[TENSORS]} if TENSORS in part else {}),
    }


def find(wanted: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a group with the steps of the saved one of its kind: of experts or not too if there are both."""
    same = [group for group in groups if kind(group) == kind(wanted)]
    exact = [group for group in same if group[EXPERTS] == wanted[EXPERTS]]
    saved = (exact or same)[0]
    return {**wanted, **({STEP: saved[STEP]} if STEP in saved else {})}


def kind(group: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(group[key] for key in param_group_identifier_keys if key != EXPERTS)
