"""qlibero: what does quantization cost a robot policy on LIBERO, and what does it give?"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlibero.policies.base import Chunk, Observation, Policy
    from qlibero.run.evaluate import Evaluation, compare, evaluate

__version__ = "0.1.0"
__all__ = ["Chunk", "Evaluation", "Observation", "Policy", "compare", "evaluate"]


def __getattr__(name: str) -> Any:  # torch is imported with the first use, not with the package
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room = "policies.base" if name in ("Chunk", "Observation", "Policy") else "run.evaluate"
    return getattr(import_module(f"{__name__}.{room}"), name)
