"""The rooms and who may enter them: the import rules, read from the source and tried in fresh interpreters."""

import ast
import importlib
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("pool", "transport", "http")

#: What the pool and its workers may import of the transport.
PUBLIC_TRANSPORT = {
    "llamaherd.transport",
    "llamaherd.transport.channel",
    "llamaherd.transport.errors",
    "llamaherd.transport.deltas",
    "llamaherd.transport.messages",
}
#: What each room may import of the others.
PUBLIC: dict[str, set[str]] = {
    "llamaherd.http": {"llamaherd.pool"},
    "llamaherd.pool": PUBLIC_TRANSPORT,
    # What the machine offers, and what parameters may be, is asked on both sides of the process boundary.
    "llamaherd.pool.child": PUBLIC_TRANSPORT
    | {
        "llamaherd.pool.addresses",
        "llamaherd.pool.docker_layout",
        "llamaherd.pool.gbnf",
        "llamaherd.pool.json_schema",
        "llamaherd.pool.machine",
        "llamaherd.pool.quants",
        "llamaherd.pool.sampling",
    },
    "llamaherd.transport": set(),
}
#: The modules that touch llama-cpp-python: its main library, and that for images and sounds.
BINDINGS = {"llamaherd.pool.child.llama_library", "llamaherd.pool.child.mtmd"}
#: What each room may import besides the standard library and llamaherd.
THIRD_PARTY = {
    "llamaherd.http": {
        "click",
        "httptools",
        "httpx2",
        "msgspec",
        "prometheus_client",
        "rich",
        "starlette",
        "uvicorn",
        "uvloop",
    },
    # The lock keeps a deletion from a download; the latter two are for SyncPool, and only if they are there.
    "llamaherd.pool": {"filelock", "msgspec", "rich", "uvloop"},
    # The hub's client is for a worker in download mode, and nobody else.
    "llamaherd.pool.child": {"filelock", "httpx2", "huggingface_hub"}
    | {"jinja2", "llama_cpp", "llguidance", "msgspec", "numpy"},
    "llamaherd.transport": {"msgspec", "zmq"},
}


class Import(NamedTuple):
    """One imported name: ``from source import name``, or ``import source`` with an empty name."""

    source: str
    name: str


class Module(NamedTuple):
    """A library module as its source says."""

    name: str
    path: Path
    tree: ast.Module

    @property
    def room(self) -> str:
        return room_of(self.name)

    @property
    def imports(self) -> Iterator[Import]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (Import(alias.name, "") for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0 and node.module is not None, f"{self.path} imports relatively"
                for alias in node.names:
                    submodule = f"{node.module}.{alias.name}"
                    yield Import(submodule, "") if submodule in NAMES else Import(node.module, alias.name)

    @property
    def exports(self) -> list[str] | None:
        for node in self.tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
                assert isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.List)
                return [str(ast.literal_eval(name)) for name in node.value.elts]
        return None

    @property
    def definitions(self) -> set[str]:
        found: set[str] = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.ImportFrom):
                found.update(alias.asname or alias.name for alias in node.names)
        return found


def room_of(name: str) -> str:
    """Return the room of a module: its first two names, three within ``pool.child``."""
    parts = name.split(".")
    return ".".join(parts[: 3 if parts[2:3] == ["child"] else 2])


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("llamaherd", *(parts[:-1] if parts[-1] == "__init__" else parts)))


PATHS = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
NAMES = {module_name(path) for path in PATHS}
MODULES = {name: Module(name, path, ast.parse(path.read_bytes())) for path in PATHS for name in [module_name(path)]}

every_module = pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)


def run_python(program: str, *flags: str) -> str:
    """Run a program in a fresh interpreter at the repository's root and return what it printed."""
    command = [sys.executable, *flags, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --- read from the source ---


def test_all_rooms_are_looked_at() -> None:
    assert {module.room for module in MODULES.values()} == set(THIRD_PARTY)


@every_module
def test_imports_within_llamaherd_keep_to_the_rooms(module: Module) -> None:
    elsewhere = {
        imported.source
        for imported in module.imports
        if imported.source.split(".")[0] == "llamaherd" and room_of(imported.source) != module.room
    }

    assert elsewhere <= PUBLIC[module.room]


@every_module
def test_names_are_imported_only_from_modules_that_export_them(module: Module) -> None:
    private = [
        f"{imported.source}.{imported.name}"
        for imported in module.imports
        if imported.name and imported.source in MODULES
        if imported.name not in (MODULES[imported.source].exports or [])
    ]

    assert private == []


@every_module
def test_other_packages_are_imported_only_where_they_belong(module: Module) -> None:
    packages = {imported.source.split(".")[0] for imported in module.imports}

    assert packages - sys.stdlib_module_names - {"llamaherd"} <= THIRD_PARTY[module.room]


@every_module
def test_only_the_bindings_name_llama_cpp(module: Module) -> None:
    imported = {name.source for name in module.imports if name.source.split(".")[0] == "llama_cpp"}
    spelled = {
        node.value
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.split(".")[0] == "llama_cpp"
    }

    assert module.name in BINDINGS or not imported | spelled


@every_module
def test_every_module_says_what_it_exports(module: Module) -> None:
    if module.name.endswith(".__main__"):
        return  # nobody imports it
    exports = module.exports

    assert exports is not None, "there is no __all__"
    assert len(exports) == len(set(exports))
    assert [name for name in exports if name.startswith("_")] == []
    assert set(exports) <= module.definitions


def test_every_lazy_name_of_the_pool_is_there() -> None:
    pool = importlib.import_module("llamaherd.pool")

    assert all(getattr(pool, name) is not None for name in pool.__all__)
    assert dir(pool) == sorted(pool.__all__)


def test_the_pools_lazy_names_are_what_the_type_checkers_see() -> None:
    module = MODULES["llamaherd.pool"]
    checked = {imported.name for imported in module.imports if imported.source.startswith("llamaherd.")}

    assert checked == set(module.exports or [])


def test_no_file_makes_a_package_of_what_must_not_be_one() -> None:
    unwanted = [ROOT / "__init__.py", ROOT / "http" / "__init__.py", *(ROOT / "tests").rglob("__init__.py")]

    assert [path for path in unwanted if path.exists() and "typing" not in path.parts] == []


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_is_typed_and_linked_for_the_type_checkers(room: str) -> None:
    assert (ROOT / room / "py.typed").exists()
    assert (ROOT / "tests" / "typing" / "llamaherd" / room).resolve() == ROOT / room


# --- tried in fresh interpreters ---


@pytest.mark.parametrize("flags", [(), ("-P",)])
def test_http_is_the_standard_librarys_from_the_root(flags: tuple[str, ...]) -> None:
    where = run_python("import http.client; print(http.client.__file__)", *flags)

    assert Path(where).is_relative_to(sysconfig.get_path("stdlib"))


def test_a_worker_that_starts_imports_nothing_heavy() -> None:
    heavy = ["asyncio", "jinja2", "llama_cpp", "llguidance", "numpy", "uvloop", "zmq"]
    program = f"""
import sys
import llamaherd.pool, llamaherd.pool.child.__main__
print([name for name in {heavy} if name in sys.modules])
"""
    assert run_python(program, "-P") == "[]"


@pytest.mark.parametrize(
    ("module", "later"),
    [
        # llama.cpp begins to read a model when this is imported; the rest comes on another thread.
        (
            "llama_engine",
            ["asyncio", "dataclasses", "inspect", "jinja2", "llama_cpp.llama", "llguidance", "numpy"]
            + ["socket", "typing_extensions", "zmq"],
        ),
        # Then it makes the context.
        ("resources", ["asyncio", "jinja2", "llama_cpp.llama", "llguidance", "llamaherd.pool.child.chat", "zmq"]),
        # What few requests need comes with the first of them.
        ("loaded", ["llama_cpp.llama", "llama_cpp.mtmd_cpp", "llguidance", "llamaherd.pool.child.projector", "zmq"]),
    ],
)
def test_a_load_waits_for_no_import_that_can_come_later(module: str, later: list[str]) -> None:
    program = f"""
import sys
import llamaherd.pool.child.__main__, llamaherd.pool.child.{module}
print([name for name in {later} if name in sys.modules])
"""
    assert run_python(program, "-P") == "[]"


def test_a_worker_never_holds_the_managers_modules() -> None:
    program = """
import sys
import llamaherd.pool.child.__main__, llamaherd.pool.child.loaded, llamaherd.pool.child.fake_engine
print(sorted(name for name in sys.modules if name.startswith("llamaherd.pool.") and ".child" not in name))
"""
    shared = ("gbnf", "json_schema", "machine", "sampling")
    assert run_python(program, "-P") == repr([f"llamaherd.pool.{name}" for name in shared])


def test_the_pools_own_process_runs_where_llama_cpp_is_not_installed() -> None:
    program = """
import sys
sys.modules["llama_cpp"] = None
import asyncio
import llamaherd.http.cli, llamaherd.http.oneshot, llamaherd.http.server
from llamaherd.pool import ModelSpec, Pool

async def main():
    async with Pool([ModelSpec(name="m", engine="fake")]) as pool:
        print(pool.status("m").state)

asyncio.run(main())
"""
    assert run_python(program, "-P") == "unloaded"
