"""The paths in a configuration: made absolute for a process with another working directory, kept within bounds."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from logitlake_shared.errors import ConfigError

__all__ = ["absolute", "check_roots", "expanded", "is_below"]

Configured = TypeVar("Configured")

# Of these names a string is a folder where it is not an address.
_PLACES = ("uri", "lake", "image_root")


def absolute(value: Configured, name: str = "") -> Configured:
    """The configuration with absolute paths."""
    made: Any = value
    if isinstance(value, BaseModel):
        fields = {field: absolute(getattr(value, field), field) for field in type(value).model_fields}
        made = value.model_copy(update=fields)
    elif isinstance(value, tuple):
        made = tuple(absolute(one) for one in value)
    elif _is_path(value, name):
        path = expanded(str(value)).absolute()
        made = path if isinstance(value, Path) else str(path)
    result: Configured = made
    return result


def expanded(path: Path | str) -> Path:
    """The path with `~` or `~user` as the folder that it is. Raises `ConfigError` where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"'{path}': {error}") from None


def is_below(address: str, allowed: Iterable[str]) -> bool:
    """Whether an address is one of these, or below one."""
    return any(f"{address}/".startswith(f"{one.rstrip('/')}/") for one in allowed)


def check_roots(config: BaseModel, roots: Sequence[Path], key: str = "") -> None:
    """Raises `ConfigError` for a path of a configuration that is below none of the `roots`, whatever links lead to it.

    `key` is what the configuration is a section of.
    """
    resolved = [expanded(root).resolve() for root in roots]
    for where, path in _paths(config, key):
        if not any(path.resolve().is_relative_to(root) for root in resolved):
            raise ConfigError(
                f"`{where}`: '{path}' is not below a folder that jobs may use (jobs.data_roots); ask the operator"
            )


def _paths(value: Any, key: str) -> Iterator[tuple[str, Path]]:
    if isinstance(value, BaseModel):
        for field in type(value).model_fields:
            yield from _paths(getattr(value, field), f"{key}.{field}".lstrip("."))
    elif isinstance(value, tuple):
        for place, one in enumerate(value):
            yield from _paths(one, f"{key}.{place}")
    elif _is_path(value, key.rpartition(".")[2]):
        yield key, expanded(value)


def _is_path(value: Any, name: str) -> bool:
    return isinstance(value, Path) or (name in _PLACES and isinstance(value, str) and "://" not in value)
