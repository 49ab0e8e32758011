"""The package itself: light to import, complete, one direction of dependence."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import space_peft


ROOT = Path(__file__).parents[1]


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
    import importlib.metadata

    assert importlib.metadata.version("space-peft") == space_peft.__version__


def _imports(path: Path) -> set[str]:
    """Modules imported at the top of a file (function-level imports of applications are their own business)."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "space_peft").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_depend_downwards(path):
    above = [name for name in _imports(path) if "trainers" in name or "hub_cards" in name]
    assert not above, f"{path.name} imports {above} from a room above it"


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
