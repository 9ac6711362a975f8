"""The public names, and who may import whom: no folder imports one above it, and no module takes part in a cycle."""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import flowbp

ROOT = Path(flowbp.__file__).parents[1]
FLOORS = [  # from the ground up; a module imports its own floor and those below
    {"kernels"},
    {"engine", "methods"},
    {"backbones", "rewards", "shapes", "presets"},
    {"config"},
    {"runtime"},
    {"evaluation"},
    {"training", "estimate"},
    {"cli"},
]
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    name_of(path): path for package in ("flowbp", "flowbp_kernels") for path in sorted((ROOT / package).rglob("*.py"))
}


def room_of(module: str) -> str:
    package, *rest = module.split(".")
    if package == "flowbp_kernels":
        return "kernels"
    return rest[0] if rest and (ROOT / "flowbp" / rest[0]).is_dir() else "engine"


def imported_by(module: str) -> Iterator[str]:
    """The modules of both packages that `module` imports, anywhere in it, for type checkers alone too."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom):
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                yield from {whole if whole in MODULES else source} & MODULES.keys() - {module}
        elif isinstance(node, ast.Import):
            yield from {alias.name for alias in node.names} & MODULES.keys()


ENTRANCES = {"flowbp", "flowbp.__main__"}  # the public names, and the command


@pytest.mark.parametrize("module", sorted(MODULES.keys() - ENTRANCES))
def test_a_module_imports_its_own_floor_and_those_below(module):
    above = [
        other for other in imported_by(module) if other != "flowbp" and FLOOR[room_of(other)] > FLOOR[room_of(module)]
    ]
    assert not above


def test_no_module_takes_part_in_a_cycle():
    graph = {module: set(imported_by(module)) for module in MODULES.keys() - ENTRANCES}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


def test_importing_flowbp_loads_nothing_and_each_of_its_names_is_there():
    script = "import sys, flowbp; assert not {'torch', 'numpy', 'diffusers'} & sys.modules.keys(); print(dir(flowbp))"
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert ast.literal_eval(shown) == sorted(flowbp.__all__)
    for name, module in flowbp._HOME.items():
        assert getattr(flowbp, name) is getattr(importlib.import_module(module), name)
    with pytest.raises(AttributeError, match="flowbp has no 'rolout'; it has .*rollout"):
        flowbp.rolout  # noqa: B018


def test_only_the_runtime_asks_which_process_is_the_main_one():
    asking = {name for name, path in MODULES.items() if "is_main" in path.read_text()}
    assert {room_of(name) for name in asking} == {"runtime"}
