"""The documentation's code is true: snippets import and call what there is, commands have their options, files are read."""

import ast
import builtins
import dataclasses
import importlib
import inspect
import json
import re
import shlex
import sys
import textwrap
from pathlib import Path

import pytest
from PIL import Image

import space_peft
from space_peft.cli.commands import FROM_DATACLASSES, build_parser
from space_peft.cli.erase import parse_run
from space_peft.cli.places import PLACES, ConfigFile
from space_peft.data.questions import load_questions
from space_peft.records.yaml_file import read_yaml
from space_peft.retained.reading import to_conversation


ROOT = Path(__file__).parents[1]
PAGES = [
    *sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "examples").rglob("README.md")),
]  # fmt: skip
# Commands stand in these, too.
TEXTS = [
    *PAGES, *sorted((ROOT / "examples").glob("*.yaml")), *sorted((ROOT / "examples").glob("*.py")),
    ROOT / "tests" / "hub" / "golden" / "card.md",
]  # fmt: skip
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
# Options of other programs that the pages name alone.
OTHERS = {"--table", "--repo_id", "--questions", "--work", "--seed", "--threads", "--stop-after"}


def name_of(path):
    return str(path.relative_to(ROOT))


def blocks(page, *languages):
    """Code in the fenced blocks of a page, in order."""
    return [textwrap.dedent(code) for _, kind, code in FENCE.findall(page.read_text()) if kind in languages]


# Python


def imported(tree, folder):
    """What a snippet imports, by the name that it gives it.

    Raises:
        ImportError: If there is no such module, or no such name in it.
    """
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for part in node.names:
                # A module beside the page is that of a script.
                local = (folder / f"{part.name}.py").is_file()
                found[part.asname or part.name.partition(".")[0]] = (
                    None if local else importlib.import_module(part.name)
                )
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for part in node.names:
                if not hasattr(module, part.name):
                    raise ImportError(f"there is no {part.name} in {node.module}")
                found[part.asname or part.name] = getattr(module, part.name)
    return found


def made_by(function):
    """The class of what calling something gives, where it is one of this library's."""
    if not inspect.isclass(function):
        name = str(inspect.signature(function).return_annotation)
        function = getattr(sys.modules[function.__module__], name, None)
    return function if inspect.isclass(function) and function.__module__.startswith("space_peft") else None


def check_call(call, function, *, method=False):
    """Raises `TypeError` if a call has an argument that the function does not take, or lacks one."""
    if any(isinstance(part, ast.Starred) for part in call.args) or any(word.arg is None for word in call.keywords):
        return
    signature = inspect.signature(function)
    words = [word.arg for word in call.keywords]
    try:
        signature.bind(*[None] * (len(call.args) + method), **dict.fromkeys(words))
    except TypeError as error:
        raise TypeError(f"{ast.unparse(call.func)}: {error}") from error
    # What trainers take to say what to do instead, and what `erase` hands on to its trainer.
    handed_on = {"unsupported": (), "trainer_options": inspect.signature(space_peft.SpaceTrainer).parameters}
    for rest in handed_on.keys() & signature.parameters.keys():
        if wrong := set(words) - signature.parameters.keys() - set(handed_on[rest]):
            raise TypeError(f"{ast.unparse(call.func)} takes no {sorted(wrong)}")


def check_snippet(code, known, folder=ROOT):
    """Raises if a snippet is no Python, imports what is not there, calls it otherwise than it can be called, or uses a name
    that neither it nor an earlier one has made, and that none of its comments speaks of.

    Args:
        code (`str`): The snippet.
        known (`dict`): What earlier snippets have imported or made, with the class where that is known; added to.
        folder (`Path`): Of its page.
    """
    tree = ast.parse(code)
    known |= imported(tree, folder)
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    arguments = [part.arg for node in ast.walk(tree) if isinstance(node, ast.arguments) for part in node.args]
    made = {node.id for node in names if isinstance(node.ctx, ast.Store)} | set(arguments)
    said = " ".join(re.findall(r"#(.*)", code))
    for name in sorted({node.id for node in names} - made - known.keys() - set(dir(builtins))):
        if not re.search(rf"\b{name}\b", said):
            raise NameError(f"{name} is made nowhere, and no comment says what it is")
        known[name] = None
    instances = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Name):
            function = known.get(node.value.func.id)
            if callable(function) and (kind := made_by(function)):
                instances |= {target.id: kind for target in node.targets if isinstance(target, ast.Name)}
    known |= {name: None for name in made - known.keys()}
    known |= {("made", name): kind for name, kind in instances.items()}
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if isinstance(call.func, ast.Name):
            function = known.get(call.func.id)
            if getattr(function, "__module__", "").startswith("space_peft"):
                check_call(call, function)
        elif isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name):
            if kind := known.get(("made", call.func.value.id)):
                check_call(call, getattr(kind, call.func.attr), method=True)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_snippets_import_and_call_what_there_is(page):
    known = {}
    for code in blocks(page, "python"):
        check_snippet(code, known, page.parent)


@pytest.mark.parametrize(
    ("code", "error", "said"),
    [
        ("erase(", SyntaxError, "never closed"),
        ("from space_peft import eraze", ImportError, "eraze"),
        ("from space_peft import erase\nerase('m', 'fox', pol=[])", TypeError, "pol"),
        ("from space_peft import erase\nerase('m', 'fox', card_data=None)", None, None),
        ("from space_peft import SpaceTrainer\nSpaceTrainer('m', anchors=[], retained=[])", TypeError, "retained"),
        ("from space_peft import SpaceTrainer\nSpaceTrainer('m')", TypeError, "anchors"),
        ("from space_peft import SpaceConfig\nSpaceConfig('o', step=3)", TypeError, "step"),
        ("from space_peft import retained_texts\nretained_texts()", TypeError, "texts"),
        ("from space_peft import erase\ne = erase('m', 'fox')\ne.store()", AttributeError, "store"),
        ("from space_peft import erase\ne = erase('m', 'fox')\ne.merge()", TypeError, "output"),
        ("print(model)", NameError, "model"),
        ("print(model)  # model: yours", None, None),
    ],
)
def test_what_is_wrong_with_a_snippet_is_found(code, error, said):
    if error is None:
        check_snippet(code, {})
    else:
        with pytest.raises(error, match=said):
            check_snippet(code, {})


# Commands


def options_of_commands():
    """Options by command; those of `erase` and `anchors` are fields of dataclasses."""
    from space_peft.cli.erase import full_parser

    commands = next(
        action for action in build_parser()._actions if hasattr(action, "choices") and action.choices
    ).choices
    parsers = {name: parser for name, parser in commands.items() if name not in FROM_DATACLASSES}
    fields = full_parser("erase")
    own = {"--config", "--json", "--import", "--help", "--help-all"}
    options = {
        name: {text for action in parser._actions for text in action.option_strings} for name, parser in parsers.items()
    }
    options |= dict.fromkeys(
        FROM_DATACLASSES, own | {text for action in fields._actions for text in action.option_strings}
    )
    return parsers, options


PARSERS, OPTIONS = options_of_commands()


def written_commands(text):
    """`space-peft ...` as it stands in a text, by whether it is a line of code, to be typed as it is."""
    code = re.sub(r"\\\n[#\s]*", "", text)
    lines = re.findall(r"^[ #]*space-peft (\S.*)$", code, re.MULTILINE)
    return [(True, line) for line in lines] + [
        (False, span[11:]) for span in INLINE.findall(text) if span[:11] == "space-peft "
    ]


def check_command(line, *, whole):
    """Raises if a command has an option that there is not, or cannot be parsed."""
    name, *rest = shlex.split(line, comments=True)
    if name in ("--help", "COMMAND"):
        return
    if name not in OPTIONS:
        raise ValueError(f"there is no command {name!r}")
    if unknown := [word for word in rest if word.startswith("--") and word.partition("=")[0] not in OPTIONS[name]]:
        raise ValueError(f"{name} has no option {unknown[0]}")
    if whole and name in PARSERS and not {"--config", "--help"} & set(rest):
        try:
            PARSERS[name].parse_args(rest)
        except SystemExit as error:
            raise ValueError(f"{line!r} is not parsed") from error


@pytest.mark.parametrize("page", [page for page in TEXTS if "space-peft " in page.read_text()], ids=name_of)
def test_commands_have_their_options(page):
    for whole, line in written_commands(page.read_text()):
        check_command(line, whole=whole)


def test_what_is_wrong_with_a_command_is_found():
    text = "    space-peft plan demo --rank \\\n        8   # a model\nsee `space-peft merge --outptu x`\n```\nspace-peft probe\n```"
    assert written_commands(text) == [
        (True, "plan demo --rank 8   # a model"),
        (True, "probe"),
        (False, "merge --outptu x"),
    ]
    check_command("plan demo --rank 8   # a model", whole=True)
    for line, said in (("merge --outptu x", "no option --outptu"), ("probe", "not parsed"), ("prune x", "no command")):
        with pytest.raises(ValueError, match=said):
            check_command(line, whole=True)


# These speak of benchmarks' options.
@pytest.mark.parametrize("page", [page for page in PAGES if page.stem not in ("decisions", "comparison")], ids=name_of)
def test_options_named_alone_are_options_of_a_command(page):
    named = {span.split()[0] for span in INLINE.findall(FENCE.sub("", page.read_text())) if span.startswith("--")}
    assert not named - set().union(*OPTIONS.values()) - OTHERS


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_scripts_have_the_options_they_are_called_with(page):
    code = re.sub(r"\\\n\s*", "", page.read_text())
    for script, rest in re.findall(r"python ((?:examples|benchmarks)/[\w/]+\.py)([^\n`]*)", code):
        words = [word for word in shlex.split(rest.replace(")", " "), comments=True) if word.startswith("--")]
        assert not [word for word in words if f'"{word}"' not in (ROOT / script).read_text()], script


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_make_has_the_targets_that_are_named(page):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    text = page.read_text()
    code = [*INLINE.findall(text), *"\n".join(blocks(page, "bash")).splitlines()]
    named = [line.split()[1] for line in code if line.startswith("make ")]
    assert set(named) <= set(targets)


# Files


def test_files_that_the_start_page_shows_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "start.md"
    run, questions = blocks(page, "yaml")
    assert run.startswith("# run.yaml") and questions.startswith("# questions.yaml")
    Path("run.yaml").write_text(run)
    (arguments, adapter, _, _), args = parse_run(["--max_steps", "7"], ConfigFile("run.yaml", read_yaml("run.yaml")))
    # Every place that there is, but for one that takes the place of another.
    given = {name for name in PLACES["erase"] if getattr(arguments, name)}
    assert given == set(PLACES["erase"]) - {"statistics"}
    assert (arguments.concept, adapter.lora_r, args.max_steps) == ("Eiffel Tower", 16, 7)
    Path("questions.yaml").write_text(questions)
    assert load_questions("questions.yaml").open[1].turns[2] == "Was zeigt es?"
    Path("kept").mkdir()
    Image.new("RGB", (8, 8)).save("kept/church_1.png")
    rows = [to_conversation(json.loads(line)) for line in "".join(blocks(page, "json")).splitlines()]
    assert [len(row["images"]) for row in rows] == [1, 0]


def test_every_field_of_the_questions_file_that_is_shown_is_one():
    from space_peft import QuestionSet

    _, questions = blocks(ROOT / "docs" / "start.md", "yaml")
    keys = set(re.findall(r'^"?(\w+)"?:', questions, re.MULTILINE))
    assert keys and keys <= {field.name for field in dataclasses.fields(QuestionSet)}


# Tables


def first_column(page, title):
    """What the first cells of a page's table say, without what stands in brackets, by the title of their column."""
    table = (ROOT / "docs" / page).read_text().partition(f"| {title} |")[2].partition("\n\n")[0]
    return [re.sub(r" *\(.*?\)", "", line.split("|")[1]).strip() for line in table.splitlines()[2:]]


def test_the_checks_of_verify_are_those_it_prints():
    from space_peft.hub_cards.verify import _BEHAVIOUR

    assert first_column("hub.md", "check") == ["no code", "hashes", "content", *_BEHAVIOUR]


def test_the_attacks_are_listed_and_so_is_what_all_of_them_need():
    from space_peft.attacks.kinds import KINDS

    listed = first_column("attacks.md", "attack")
    made = {sys.modules[kind.__module__] for kind in KINDS.values()}
    assert len(listed) == len(made) and all(any(hasattr(m, name.strip("`")) for m in made) for name in listed)
    most = [
        max(getattr(kind.needs, what) for kind in KINDS.values()) for what in ("target", "others", "things", "controls")
    ]
    # Names of things are those of their pictures.
    assert most[0] == 2 and max(most[1:]) == 3
    said = " ".join((ROOT / "docs" / "cli.md").read_text().split())
    assert "Two pictures of the concept, and one of each of three other things, are enough for all of them" in said


def test_every_command_is_in_a_table_of_the_command_line():
    lines = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "cli.md").read_text(), re.MULTILINE)
    assert sorted(lines) == sorted(OPTIONS)


def test_commands_without_a_file_of_options_are_those_named():
    without = {name for name, options in OPTIONS.items() if "--config" not in options}
    page = " ".join((ROOT / "docs" / "cli.md").read_text().split())
    said = re.search(r"\(all but (.*?)\) take `--config", page)[1]
    assert set(re.findall(r"`(\w+)`", said)) == without
