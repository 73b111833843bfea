"""Hugging Face checkpoints to Megatron Core and back."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bridge.auto_bridge import AutoBridge as AutoBridge

__all__ = ["AutoBridge"]


def __getattr__(name: str) -> Any:
    """Import `AutoBridge`, and with it torch, only when it is asked for."""
    if name == "AutoBridge":
        from bridge.auto_bridge import AutoBridge

        return AutoBridge
    raise AttributeError(f"module 'bridge' has no attribute {name!r}")
