"""Runs the LoRA tests of the installed PEFT with `SpaceLoraConfig` in place of `LoraConfig`: `make test-peers`.

The tests come from PEFT's source distribution of the installed version, downloaded once into `outputs/peers`, which git
ignores; nothing of it is committed. The Hub is not used: `models.py` builds tiny models under the ids the tests name.
What failed is run again with the stock class, to tell what fails without us, too.

    python tests/peers/run.py                        # everything, about seven minutes on one core
    python tests/peers/run.py -k merge               # further arguments go to pytest
    python tests/peers/run.py tests/test_mixed.py    # files as they are named in PEFT

Exit status 0: nothing failed but what fails with the stock class as well, and (in a whole run) every entry of the lists
in `refusals.py` was met.
"""

from __future__ import annotations

import collections
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path


HERE = Path(__file__).resolve().parent
CACHE = HERE.parent.parent / "outputs" / "peers"
# What PEFT's tests import and we do not. Without what they depend on in turn: that is installed.
NEEDS = ("diffusers==0.42.1", "importlib_metadata==10.2.0", "parameterized==0.9.0", "scipy==1.17.1", "zipp==4.1.2")
# PEFT makes warnings of transformers errors, to notice them early; a later transformers has more of them. Its own
# `addopts` measure coverage. Native tracebacks: others parse a file of 8000 lines for every refusal.
PYTEST = ("-o", "addopts=", "-o", "filterwarnings=default", "-p", "plugin", "-p", "no:cacheprovider", "--tb=native",
          "--timeout=300", "-q")  # fmt: skip
# Of the whole run: fewer mean that the selection went wrong.
LEAST_PASSED = 1500


def fetch() -> Path:
    """The unpacked source distribution of the installed PEFT."""
    version = importlib.metadata.version("peft")
    folder, archive = CACHE / f"peft-{version}", CACHE / f"peft-{version}.tar.gz"
    if not archive.exists():
        _pip("download", "--no-deps", "--no-binary=:all:", "--no-build-isolation", "--dest", CACHE, f"peft=={version}")
    if not (folder / "tests").is_dir():
        with tarfile.open(archive) as content:
            content.extractall(CACHE, filter="data")
    # Not part of the distribution; the tests import each other relatively.
    (folder / "tests" / "__init__.py").touch()
    import peft

    installed, sources = Path(peft.__file__).parent, folder / "src" / "peft"
    names = [path.relative_to(sources) for path in sources.rglob("*.py")]
    other = [str(name) for name in names if not _same(sources / name, installed / name)]
    if other or not names:
        sys.exit(f"{archive} is not what is installed as PEFT {version}: {other[:5] or 'no sources'} differ.")
    return folder


def _same(one: Path, other: Path) -> bool:
    return other.is_file() and one.read_bytes() == other.read_bytes()


def _pip(*arguments) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)]
    subprocess.run(command, check=True)


def needs() -> Path:
    """A folder with the packages that only PEFT's tests need."""
    folder = CACHE / f"needs-{_digest(repr(NEEDS))}-{sys.version_info.major}.{sys.version_info.minor}"
    if not folder.is_dir():
        part = folder.with_suffix(".part")
        _pip("install", "--no-deps", "--upgrade", "--target", part, *NEEDS)
        part.rename(folder)
    return folder


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def run(folder: Path, home: Path, arguments: list[str], stock: bool = False) -> dict[str, dict]:
    """Runs pytest in PEFT's folder; returns what became of every test."""
    report = CACHE / ("stock.json" if stock else "report.json")
    report.unlink(missing_ok=True)
    paths = [HERE, folder, needs(), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PEERS_REPORT": str(report),
        "PEERS_STOCK": str(int(stock)),
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
    }
    subprocess.run([sys.executable, "-m", "pytest", *PYTEST, *arguments], cwd=folder, env=environment)
    content = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {"exit": "none", "results": {}}
    if content["exit"] not in (0, 1):
        sys.exit(f"pytest did not run to its end (exit status {content['exit']}): see above.")
    return content["results"]


def main() -> int:
    arguments = sys.argv[1:]
    CACHE.mkdir(parents=True, exist_ok=True)
    folder = fetch()
    home = CACHE / f"models-{_digest((HERE / 'models.py').read_text(encoding='utf-8'))}"
    import models
    from refusals import EXCLUDED, not_met

    models.build(home)
    files = sorted(
        f"tests/{path.name}"
        for path in folder.glob("tests/test_*.py")
        if path.name not in EXCLUDED and re.search(r"\bLoraConfig\b", path.read_text(encoding="utf-8"))
    )
    whole = not arguments
    if not any(argument.startswith("tests/") for argument in arguments):
        arguments = [*files, *arguments]
    results = run(folder, home, arguments)

    outcomes = collections.defaultdict(dict)
    for test, result in results.items():
        outcomes[result["outcome"]][test] = result["detail"]
    failed, with_stock = outcomes["failed"], {}
    if failed:
        listing = CACHE / "failed.txt"
        listing.write_text("\n".join(failed), encoding="utf-8")
        again = run(folder, home, [f"@{listing}"], stock=True)
        with_stock = {test: failed.pop(test) for test in list(failed) if again[test]["outcome"] == "failed"}
    failed = {**failed, **outcomes["unlisted"]}

    ours = sum(result["ours"] and result["outcome"] == "passed" for result in results.values())
    seconds = sum(result["seconds"] for result in results.values())
    print(f"\nPEFT {folder.name.removeprefix('peft-')}'s tests with SpaceLoraConfig: {len(results)} in {seconds:.0f} s")
    print(f"passed   {len(outcomes['passed']):5}  of which {ours} made a SpaceLoraConfig")
    for title, tests in (
        ("refused", outcomes["refused"]),
        ("differs", outcomes["differs"]),
        ("skipped", outcomes["skipped"]),
    ):
        print(f"{title}  {len(tests):5}")
        for detail, count in collections.Counter(tests.values()).most_common():
            print(f"         {count:5}  {detail}")
    print("files not run")
    for name, reason in EXCLUDED.items():
        print(f"                {name}: {reason}")
    for title, tests in (("fails with stock, too", with_stock), ("FAILED", failed)):
        print(f"{title}  {len(tests)}")
        for test, detail in tests.items():
            print(f"    {test}\n        {detail.strip().splitlines()[-1] if detail.strip() else ''}")
    rotten = not_met(results.values()) if whole else []
    if rotten:
        print(
            "LISTED in refusals.py, but no test was refused, skipped or different for it: remove it there, or find out why"
        )
        for detail in rotten:
            print(f"    {detail}")
    if whole and ours < LEAST_PASSED:
        print(f"Only {ours} tests passed with a SpaceLoraConfig; expected at least {LEAST_PASSED}: was it replaced?")
        return 1
    return 1 if failed or rotten else 0


if __name__ == "__main__":
    sys.exit(main())
