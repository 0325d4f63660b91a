"""Which key somebody may have meant who wrote one that there is not: for configuration files and for HTTP bodies.

pydantic says where the unknown key stands (`stages.1.rat`), as a path through the document in which it also names the
alternatives that it took. This walks the same path through the models, to those whose field the key would be: into
sections, through lists and tables, to the alternative that `type` chose (all of them, where nothing did), and by the
names that a document uses, aliases included.
"""

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AliasChoices, AliasPath, BaseModel
from pydantic.fields import FieldInfo

__all__ = ["did_you_mean"]


def did_you_mean(root: Any, location: Sequence[int | str]) -> str | None:
    """A question that names the known key which is most like the unknown one at the end of `location`, if one is.

    `root` is what the document was read as: a model, or a type that holds models.
    """
    *path, written = location
    places = list(_alternatives(root))
    for step in path:
        places = list(_below(places, step))
    known = {_plain(key): key for place in places if _is_model(place) for key in _keys(place)}
    found = get_close_matches(_plain(str(written)), known, n=1)
    return f"did you mean `{known[found[0]]}`?" if found else None


def _plain(key: str) -> str:
    """Signs and capitals do not count: some write `batch-size` or `batchSize` for `batch_size`."""
    return key.lower().replace("_", "").replace("-", "")


def _below(places: Sequence[Any], step: int | str) -> Iterator[Any]:
    """What stands at `step` of the places where the path has come to."""
    chosen = [place for place in places if len(places) > 1 and _is_alternative(place, step)]
    if chosen:
        yield from chosen
        return
    went = False
    for place in places:
        for annotation in _inside(place, step):
            went = True
            yield from _alternatives(annotation)
    if not went:  # a label of pydantic's own, such as the name of a validator: it leads nowhere
        yield from places


def _inside(place: Any, step: int | str) -> Iterator[Any]:
    arguments = get_args(place)
    if _is_model(place):
        for name, field in place.model_fields.items():
            if step in list(_names(name, field, place)):
                yield field.annotation
    elif get_origin(place) is tuple and isinstance(step, int) and Ellipsis not in arguments:
        yield from arguments[step : step + 1]
    elif isinstance(get_origin(place), type) and arguments:
        # Of a table the values, of a list what is in it.
        yield arguments[1 if issubclass(get_origin(place), Mapping) and len(arguments) > 1 else 0]


def _alternatives(annotation: Any) -> Iterator[Any]:
    """The types that a type stands for: `A | None` is A, what is annotated is itself."""
    if get_origin(annotation) is Annotated:
        yield from _alternatives(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for one in get_args(annotation):
            yield from _alternatives(one)
    elif annotation is not NoneType:
        yield annotation


def _is_alternative(place: Any, step: int | str) -> bool:
    """Whether pydantic names the model by this word: by what its `type` says, or by its own name."""
    if not _is_model(place):
        return False
    literals = [field.annotation for field in place.model_fields.values() if get_origin(field.annotation) is Literal]
    return step == place.__name__ or any(step in get_args(literal) for literal in literals)


def _keys(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield from _names(name, field, model)


def _names(name: str, field: FieldInfo, model: type[BaseModel]) -> Iterator[str]:
    """How a document may call a field."""
    alias = field.validation_alias or field.alias
    choices = alias.choices if isinstance(alias, AliasChoices) else [] if alias is None else [alias]
    for choice in choices:
        first = choice.path[0] if isinstance(choice, AliasPath) else choice
        if isinstance(first, str):
            yield first
    if not choices or model.model_config.get("populate_by_name") or model.model_config.get("validate_by_name"):
        yield name


def _is_model(place: Any) -> bool:
    return isinstance(place, type) and not get_args(place) and issubclass(place, BaseModel)
