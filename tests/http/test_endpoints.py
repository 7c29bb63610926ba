"""The page that compares this server with llama-server speaks of every route, parameter and option that there is."""

from pathlib import Path

import pytest
from starlette.routing import Route

from llamaherd.http.app import create_app
from llamaherd.http.cli import serve
from llamaherd.http.schema import UNSUPPORTED, ChatBody, NativeBody
from llamaherd.pool import Pool

PAGE = (Path(__file__).parents[2] / "http" / "ENDPOINTS.md").read_text()
ROUTES = [route for route in create_app(Pool()).routes if isinstance(route, Route)]
OPTIONS = [name for option in serve.params for name in (*option.opts, *option.secondary_opts)]


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)
def test_every_route_is_on_the_page_and_not_absent(route: Route) -> None:
    for method in (route.methods or set()) - {"HEAD"}:
        (row,) = [line for line in PAGE.splitlines() if f"`{method} {route.path}`" in line.split(" | ")[0]]
        assert row.split(" | ")[1] in ("same", "differs")


@pytest.mark.parametrize("name", sorted({*ChatBody.__struct_fields__, *NativeBody.__struct_fields__}))
def test_every_parameter_is_on_the_page(name: str) -> None:
    assert f"`{name}`" in PAGE.split("## Metrics")[0]


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_every_parameter_that_cannot_be_served_is_absent_there(name: str) -> None:
    (row,) = [line for line in PAGE.splitlines() if f"`{name}`" in line.split(" | ")[0]]
    assert row.split(" | ")[1] == "absent"


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_of_serve_is_on_the_page(option: str) -> None:
    present = PAGE.split("## Flags")[1].split("### Absent")[0]
    assert f"`{option}`" in present
