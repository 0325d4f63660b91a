"""`logitlake.Client`: a LogitLake service from Python. The other packages are what the command lines are made of."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from logitlake_shared.client import Client

__all__ = ["Client"]


def __getattr__(name: str) -> Any:
    if name == "Client":
        from logitlake_shared.client import Client

        return Client
    raise AttributeError(f"module 'logitlake' has no attribute {name!r}")
