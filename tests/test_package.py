"""The package itself: light to import, complete, one direction of dependence."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from import_graph import BENCHMARKS, LIBRARY, circles, import_graph, room_of, rooms

import space_peft
from space_peft.records.versions import collect_versions


ROOT = Path(__file__).parents[1]
LAZY = sorted(
    path for folder in LIBRARY for path in (ROOT / folder).rglob("__init__.py") if "_EXPORTS" in path.read_text()
)


def test_import_is_light_and_does_not_load_torch():
    code = (
        "import sys, time; start = time.perf_counter(); import space_peft; seconds = time.perf_counter() - start; "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules; print(seconds)"
    )
    seconds = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]
    assert min(seconds) < 0.3


@pytest.mark.parametrize("name", space_peft.__all__)
def test_every_public_name_is_there(name):
    assert getattr(space_peft, name) is not None


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        space_peft.nothing  # noqa: B018


def test_version_is_that_of_the_distribution():
    # What is installed may be an older one, of which a checkout is the source; `make release-check` looks at a wheel.
    (written,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert written == space_peft.__version__ == collect_versions()["space-peft"]


def _imports(path: Path) -> set[str]:
    """Modules imported at the top of a file (function-level imports of applications are their own business)."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


# Every room of the library, the lowest first: each may import those before it, wherever in a file it does.
ROOMS = [
    "_lazy", "_version", "choices", "records", "figures", "config", "statistics", "data", "distributed", "modeling", "losses",
    "retained", "null_space", "anchors", "evaluation", "suites", "attacks", "canary", "hub_cards", "trainers",
    "arguments", "erasing", "several", "demo", "cli", "space_peft",
]  # fmt: skip


def test_rooms_depend_downwards():
    graph = import_graph(LIBRARY)
    assert {room_of(module) for module in graph} == set(ROOMS), "a new room belongs into the list, where it stands"
    upwards = [
        f"{module} imports {other}"
        for module, imported in graph.items()
        for other in sorted(imported)
        if ROOMS.index(room_of(module)) < ROOMS.index(room_of(other))
    ]
    assert not upwards


def test_contributing_shows_the_rooms_in_this_order():
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("| room |")[2].partition("\n\n")[0]
    shown = [re.findall(r"`(\w+)`", line.split("|")[1]) for line in section.splitlines() if line.startswith("| `")]
    inner = [room for room in ROOMS if not room.startswith("_") and room != "space_peft"]
    assert [room for rooms in shown for room in rooms] == inner


@pytest.mark.parametrize("folders", [LIBRARY, BENCHMARKS], ids=["library", "benchmarks"])
def test_no_imports_go_round_in_a_circle(folders):
    # A name in an annotation is no import: a part may say of what it is a part.
    assert not circles(import_graph(folders, annotations=False))


def test_circles_and_rooms_are_found_wherever_the_import_stands(tmp_path):
    for name, text in {
        "low/one.py": "def f():\n    from ..high import two\n",
        "high/__init__.py": "_EXPORTS = {'g': 'two'}\n",
        "high/two.py": "if True:\n    from ..low.one import f\n",
        "high/three.py": "if TYPE_CHECKING:\n    from .two import g\nelse:\n    from ..low import one\n",
    }.items():
        (tmp_path / "top" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "top" / name).write_text(text)
    graph = import_graph({"top": "top"}, root=tmp_path)
    assert graph == {
        "top.low.one": {"top.high.two"},
        "top.high": {"top.high.two"},
        "top.high.two": {"top.low.one"},
        "top.high.three": {"top.high.two", "top.low.one"},
    }
    assert circles(graph) == [["top.high.two", "top.low.one"]]
    assert circles(rooms(graph)) == [["high", "low"]]
    assert import_graph({"top": "top"}, annotations=False, root=tmp_path)["top.high.three"] == {"top.low.one"}


@pytest.mark.parametrize("path", LAZY, ids=lambda path: path.parent.name)
def test_a_type_checker_is_shown_every_lazy_name(path):
    tree = ast.parse(path.read_text())
    table = next(n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "_EXPORTS")
    block = next((n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"), None)
    assert block is not None, f"{path} has no `if TYPE_CHECKING` block"
    shown = {alias.name: node.module for node in block.body for alias in node.names}
    assert shown == ast.literal_eval(table)
    assert {node.level for node in block.body} == {1}
    # Without `as` a name is private to who checks the types of a package with a py.typed.
    assert all(alias.asname == alias.name for node in block.body for alias in node.names)
    # What a type checker sees of `__getattr__` is that every name is there, also a misspelt one.
    assert ["lazy_exports" in ast.unparse(node) for node in block.orelse][:1] == [True]
    assert ast.unparse(tree).count("lazy_exports(") == 1


def test_every_package_is_in_the_wheel():
    with open(ROOT / "pyproject.toml") as file:
        listed = re.search(r"^packages = \[(.*?)\]", file.read(), re.DOTALL | re.MULTILINE).group(1)
    found = {
        ".".join([package, *path.parent.relative_to(ROOT / folder).parts])
        for folder, package in LIBRARY.items()
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert set(re.findall(r'"(.*?)"', listed)) == found


def test_trainers_and_cards_do_not_depend_on_each_other():
    for path in (ROOT / "trainers").glob("*.py"):
        assert not [name for name in _imports(path) if "hub_cards" in name]
        # Inside functions one file does: a push needs a card.
        assert path.name == "publishing.py" or "hub_cards import" not in path.read_text()
    for path in (ROOT / "hub_cards").glob("*.py"):
        assert not [name for name in _imports(path) if "trainers" in name]


@pytest.mark.parametrize("folder", ["space_peft", "trainers", "hub_cards"])
def test_files_stay_readable(folder):
    long = {p.name: n for p in (ROOT / folder).rglob("*.py") if (n := len(p.read_text().splitlines())) > 460}
    assert not long


def _versions(pairs: list[tuple[str, str]]) -> dict[str, tuple[int, ...]]:
    """Versions by package, without zeros at the end: 5.6 is 5.6.0."""
    found = {}
    for name, version in pairs:
        numbers = [int(number) for number in version.split(".")]
        while numbers[-1] == 0:
            numbers.pop()
        found[name] = tuple(numbers)
    return found


def test_lower_bounds_are_the_versions_that_test_oldest_installs():
    project = (ROOT / "pyproject.toml").read_text()
    dependencies = re.search(r"^dependencies = \[(.*?)^\]", project, re.DOTALL | re.MULTILINE).group(1)
    bounds = _versions(re.findall(r'^ *"([\w-]+)>=([\d.]+)",$', dependencies, re.MULTILINE))
    assert len(bounds) == len(re.findall(r'^ *"', dependencies, re.MULTILINE)), (
        "a dependency without a plain lower bound"
    )
    bounds |= _versions(re.findall(r'"(trl)>=([\d.]+)"', project))
    oldest = _versions(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "constraints-oldest.txt").read_text(), re.MULTILINE))
    # torch's bound is of a version that could not be installed here: see the file.
    assert bounds.pop("torch") == (2, 9) and oldest.pop("torch") >= (2, 9)
    assert oldest == bounds
    # What is developed with is not older than what is allowed.
    newest = _versions(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert not [name for name in newest if name in bounds and newest[name] < bounds[name]]
