"""Which module imports which, function-level imports and the tables of lazy names included.

python tests/import_graph.py [FOLDER]     # rooms, arrows between them and circles of this or another checkout
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path


ROOT = Path(__file__).parents[1]
# Folder of the repository -> the package it is installed as; the benchmarks are scripts of their own.
LIBRARY = {"space_peft": "space_peft", "trainers": "space_peft.trainers", "hub_cards": "space_peft.hub_cards"}
BENCHMARKS = {"benchmarks": ""}

Graph = dict[str, set[str]]


def import_graph(folders: Mapping[str, str], *, annotations: bool = True, root: Path = ROOT) -> Graph:
    """Module -> the modules in these folders that it imports anywhere.

    Args:
        folders (`dict[str, str]`): Folder below `root` -> package.
        annotations (`bool`, defaults to `True`): Whether imports under `if TYPE_CHECKING` count, which never run.
        root (`pathlib.Path`): The checkout.
    """
    files = {}
    for folder, package in folders.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = [part for part in path.relative_to(root / folder).with_suffix("").parts if part != "__init__"]
            files[".".join(filter(None, [package, *parts]))] = path
    graph = {}
    for module, path in files.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        named = [n for node in _nodes(ast.parse(path.read_text()), annotations) for n in _names(node, package)]
        # `from package import name`: the module of that name, or else the package itself.
        found = {name if name in files else name.rpartition(".")[0] for name in named}
        graph[module] = found & set(files) - {module}
    return graph


def _nodes(node: ast.AST, annotations: bool) -> Iterator[ast.AST]:
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not annotations:
        children = node.orelse
    else:
        yield node
        children = ast.iter_child_nodes(node)
    for child in children:
        yield from _nodes(child, annotations)


def _names(node: ast.AST, package: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*above, *filter(None, [node.module])])
        return [f"{base}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_EXPORTS":
        return [f"{package}.{module}.{name}" for name, module in ast.literal_eval(node.value).items()]
    return []


def circles(graph: Graph) -> list[list[str]]:
    """The groups of modules of which each imports, over others or itself, each other."""
    reached: Graph = {}
    for start in graph:
        seen, left = set(), [start]
        while left:
            new = graph.get(left.pop(), set()) - seen
            seen |= new
            left += new
        reached[start] = seen
    groups = {frozenset(other for other in reached[one] if one in reached[other]) for one in reached}
    return sorted(sorted(group) for group in groups if group)


def room_of(module: str) -> str:
    """The package of the library, or the module that stands beside them, that a module is in."""
    return (module.split(".") + [module])[1]


def rooms(graph: Graph) -> Graph:
    """Room -> the other rooms it imports from."""
    found: Graph = {room_of(module): set() for module in graph}
    for module, imported in graph.items():
        found[room_of(module)] |= {room_of(other) for other in imported} - {room_of(module)}
    return found


def _print(root: Path) -> None:
    between = rooms(import_graph(LIBRARY, root=root))
    print(f"{len(between)} rooms, {sum(map(len, between.values()))} arrows; circles: {circles(between) or 'none'}")
    for room, others in sorted(between.items()):
        print(f"  {room}: {', '.join(sorted(others)) or '-'}")
    for folders in (LIBRARY, BENCHMARKS):
        graph = import_graph(folders, annotations=False, root=root)
        print(f"{len(graph)} modules of {', '.join(folders)}; circles: {circles(graph) or 'none'}")


if __name__ == "__main__":
    _print(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
