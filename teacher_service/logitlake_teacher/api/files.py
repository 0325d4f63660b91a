"""The lake's files for those whose token covers them: `lake = "http://host:8321/v1/files"` is a lake."""

from starlette.routing import Route
from starlette.types import Scope

from logitlake_schemas import layout
from logitlake_shared.store import ObjectStore
from logitlake_shared.web.doors import Principal
from logitlake_shared.web.lake_files import LakeFiles

__all__ = ["FILES", "files_route"]

FILES = "/v1/files"


def files_route(store: ObjectStore) -> Route:
    """Of the lake in this store."""
    return Route(f"{FILES}/{{path:path}}", LakeFiles(store, _may_read), name="files")


def _may_read(scope: Scope, name: str) -> bool:
    """What belongs to a cache is for those who see it. The catalog tells of every cache; a reader does without it."""
    principal: Principal = scope["state"]["principal"]
    cache = layout.cache_of(name)
    if cache is not None:
        return principal.sees(cache)
    return principal.sees_all or not name.startswith(layout.catalog_prefix())
