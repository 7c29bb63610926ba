"""``GET /openapi.json``: the API in the words of OpenAPI 3.1, made from the routes and the types of bodies."""

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import version
from types import MappingProxyType
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from llamaherd.http import contract
from llamaherd.http.front import Front, json_response
from llamaherd.http.operations import OPERATIONS, Operation

__all__ = ["describe", "openapi"]

_REFERENCE: Final = "#/components/schemas/{name}"
_PARAMETER: Final = re.compile(r"{(\w+)(?::(\w+))?}")
_EVENTS: Final = "text/event-stream"
#: OpenAPI 3.1 describes a stream by one of its events.
_EVENT: Final = {
    "type": "object",
    "properties": {"id": {"type": "string"}, "event": {"type": "string"}, "data": {"type": "string"}},
}
#: Types of parameters in a path, by Starlette's names for them.
_PATH_TYPES: Final[Mapping[str, str]] = MappingProxyType({"int": "integer", "float": "number"})
_QUERIES: Final[Mapping[str, dict[str, Any]]] = MappingProxyType(
    {
        "model": {"description": "The model's name or an alias.", "schema": {"type": "string"}},
        "autoload": {
            "description": "Whether the request may load its model.",
            "schema": {"type": "string", "enum": ["true", "false"]},
        },
        "action": {
            "description": "What to do with what the slot holds.",
            "schema": {"type": "string", "enum": ["save", "restore", "erase"]},
        },
        "fail_on_no_slot": {"description": "Answer 503 if all are busy.", "schema": {"type": "string", "enum": ["1"]}},
        "follow": {"description": "Stream the lines that follow too.", "schema": {"type": "string", "enum": ["1"]}},
        "reload": {"description": "Look for models again.", "schema": {"type": "string", "enum": ["1"]}},
    }
)


async def openapi(front: Front, request: Request) -> Response:
    """Describe this API."""
    state = request.app.state
    if not hasattr(state, "openapi"):
        state.openapi = describe([route for route in request.app.routes if isinstance(route, Route)])
    return json_response(state.openapi)


def describe(routes: Iterable[Route]) -> dict[str, Any]:
    """Return the document of some routes."""
    operations = list(_operations(routes))
    types = {kind for _, _, _, operation in operations for kind in (operation.body, operation.answer) if kind}
    ordered = [contract.ErrorBody, *sorted(types, key=repr)]
    schemas, components = msgspec.json.schema_components(ordered, ref_template=_REFERENCE)
    schema_of = dict(zip(ordered, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for path, method, handler, operation in operations:
        paths.setdefault(_PARAMETER.sub(r"{\1}", path), {})[method.lower()] = {
            "operationId": _operation_id(path, method),
            "summary": _first_line(handler),
            "parameters": [*_path_parameters(path), *_query_parameters(operation)],
            **_request_json(operation, method, schema_of),
            "responses": _responses_json(operation, schema_of),
        }
    return {
        "openapi": "3.1.0",
        "info": {"title": "llamaherd", "version": version("llamaherd"), "license": {"name": "MIT"}},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{"key": []}, {}],
    }


def _operations(routes: Iterable[Route]) -> Iterator[tuple[str, str, Callable[..., Any], Operation]]:
    for route in routes:
        handler = route.endpoint
        handler = handler.func if isinstance(handler, functools.partial) else handler
        for method in sorted((route.methods or set()) - {"HEAD"}):
            yield route.path, method, handler, OPERATIONS.get(handler.__name__, Operation())


def _operation_id(path: str, method: str) -> str:
    return "_".join([method.lower(), *re.findall(r"\w+", path)])


def _first_line(handler: Callable[..., Any]) -> str:
    return (handler.__doc__ or "").partition("\n")[0]


def _path_parameters(path: str) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "path", "required": True, "schema": {"type": _PATH_TYPES.get(kind, "string")}}
        for name, kind in _PARAMETER.findall(path)
    ]


def _query_parameters(operation: Operation) -> list[dict[str, Any]]:
    return [{"name": name, "in": "query", **_QUERIES[name]} for name in operation.query]


def _request_json(operation: Operation, method: str, schema_of: Mapping[Any, Any]) -> dict[str, Any]:
    if method in ("GET", "DELETE"):
        return {}
    content: dict[str, Any] = {"schema": schema_of[operation.body] if operation.body else {}}
    if operation.example is not None:
        content["example"] = operation.example
    return {"requestBody": {"required": True, "content": {operation.takes: content}}}


def _responses_json(operation: Operation, schema_of: Mapping[Any, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if operation.media_type == "application/json":
        content["application/json"] = {"schema": schema_of[operation.answer] if operation.answer else {}}
    elif operation.media_type != _EVENTS:
        content[operation.media_type] = {"schema": {"type": "string"}}
    if operation.stream or operation.media_type == _EVENTS:
        content[_EVENTS] = {"schema": _EVENT}
    error = {"description": "An error.", "content": {"application/json": {"schema": schema_of[contract.ErrorBody]}}}
    return {"200": {"description": "The answer.", "content": content}, "default": error}
