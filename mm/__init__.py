"""The whole: `from mm import MultimodalLlama`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mm.model import MultimodalLlama

__all__ = ["MultimodalLlama"]


def __getattr__(name: str) -> Any:
    """Imports the model when it is asked for, so that the command line starts without waiting for torch."""
    if name != "MultimodalLlama":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mm.model import MultimodalLlama

    return MultimodalLlama
