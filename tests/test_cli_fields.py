"""The options of `erase`: every field of the library has one, and help and what is missing wait for no import."""

import inspect
import json
import subprocess
import sys
from dataclasses import fields

import pytest

from space_peft import AdapterArguments, SpaceConfig, SpaceLoraConfig, get_space_config, select_anchors
from space_peft.arguments import CardArguments, SelectionArguments, get_selection
from space_peft.cli import main
from space_peft.cli.erase import full_parser, parse_run
from space_peft.cli.erase_options import OWN, TrainerRows, light_parser
from space_peft.cli.places import ConfigFile
from space_peft.config import _OWN_FIELDS, ALLOWED_OPTIONS
from space_peft.modeling.loading import load_model
from space_peft.records.card_data import ErasureCardData


NEEDED = {"model": "m", "concept": "fox", "pool": "p", "retain": "r"}


def options(parser):
    return {
        action.dest: action
        for action in parser._actions
        if action.option_strings and not action.option_strings[0].startswith("--no_")
    }


# Every field


# Of what an adapter may be told, what no option is for.
NOT_THE_USERS = {
    "peft_type": "says that it is a LoRA",
    "peft_version": "PEFT writes it",
    "auto_mapping": "PEFT writes it",
    "base_model_name_or_path": "is the model's",
    "revision": "is the model's: `model_init_kwargs`",
    "inference_mode": "it is trained",
    "task_type": "brings modules that train without the constraint",
    "fan_in_fan_out": "PEFT sets it by the kind of layer",
    "runtime_config": "PEFT's own, not saved",
}


def test_every_setting_of_the_adapter_that_is_allowed_has_an_option():
    named = {option.name for option in fields(SpaceLoraConfig)}
    own = [option.name for option in fields(AdapterArguments)]
    taken = {name if name in named else name.removeprefix("lora_") for name in own} - {"init_weights"}
    assert taken | {"init_lora_weights"} == {*_OWN_FIELDS, *ALLOWED_OPTIONS} - NOT_THE_USERS.keys()
    assert get_space_config(AdapterArguments()) == SpaceLoraConfig(r=8, lora_alpha=16)


def test_every_setting_of_the_selection_has_an_option():
    known = inspect.signature(select_anchors).parameters
    # Objects of Python's; the others are told elsewhere, or by the command itself.
    left_out = {"model", "processor", "encoder", "faiss_index", "concept", "pool", "k", "aliases", "progress"}
    own = {option.name.removeprefix("select_"): option.default for option in fields(SelectionArguments)}
    assert own == {name: known[name].default for name in known if name not in left_out}


def test_everything_that_an_author_knows_for_the_card_has_an_option():
    names = [option.name for option in fields(ErasureCardData)]
    # What stands after it is filled in while training.
    authors = {*names[: names.index("method")], "base_model"}
    assert {option.name for option in fields(CardArguments)} == authors
    assert ErasureCardData(**vars(CardArguments())) == ErasureCardData()


def test_what_is_told_arrives(monkeypatch):
    given = [
        "--lora_rank_pattern", '{"q_proj": 16}', "--lora_alpha_pattern", '{"q_proj": 8.5}', "--lora-exclude-modules", "k_proj",
        "v_proj", "--lora_layers_to_transform", "0", "1", "--lora_layers_pattern", "layers", "--lora_use_rslora",
        "--lora_init_weights", "gaussian", "--lora_statistics", "pooled", "--tokens_per_row", "all", "--max_rank", "7",
        "--lora_target_modules", "q_proj", "--select_diversity", "0.5", "--select_cache_dir", "none",
        "--no_select_exclude_by_caption", "--authors", "A", "B", "--license", "mit", "--output_dir", "out",
    ]  # fmt: skip
    (job, adapter, selection, card), args = parse_run(given, ConfigFile("run.yaml", NEEDED))
    config = get_space_config(adapter)
    assert (job.pool, args.output_dir, card.authors, card.license) == ("p", "out", ["A", "B"], "mit")
    assert get_selection(selection) == {"diversity": 0.5, "cache_dir": False, "exclude_by_caption": False}
    assert (config.rank_pattern, config.alpha_pattern) == ({"q_proj": 16}, {"q_proj": 8.5})
    assert (config.exclude_modules, config.target_modules) == ({"k_proj", "v_proj"}, {"q_proj"})
    assert (config.layers_to_transform, config.layers_pattern) == ([0, 1], ["layers"])
    assert (config.use_rslora, config.init_lora_weights, config.statistics) == (True, "gaussian", "pooled")
    assert (config.tokens_per_row, config.max_rank, config.lora_alpha) == (None, 7, 16)


def test_a_file_says_it_as_yaml_does():
    values = {
        **NEEDED,
        "lora_rank_pattern": {"q_proj": 4},
        "lora_init_weights": False,
        "save_strategy": False,
        "tags": "a",
    }
    run, args = parse_run([], ConfigFile("run.yaml", {**values, "tokens_per_row": 9, "aliases": None, "fresh": "yes"}))
    config = get_space_config(run.adapter)
    assert (config.rank_pattern, config.init_lora_weights, config.tokens_per_row) == ({"q_proj": 4}, False, 9)
    # A bare no is false to YAML.
    assert (args.save_strategy, run.card.tags, run.job.aliases, run.job.fresh) == ("no", ["a"], [], True)
    assert args.output_dir == "space-output"


def test_a_script_of_ones_own_parses_them_as_trl_does(tmp_path, capsys):
    parser = pytest.importorskip("trl").TrlParser((SpaceConfig, AdapterArguments))
    path = tmp_path / "run.yaml"
    path.write_text(
        f"output_dir: {tmp_path}\nuse_cpu: true\nlora_r: 3\nlora_rank_pattern: {{q_proj: 5}}\nconstraint: hard\n"
    )
    args, adapter = parser.parse_args_and_config(["--config", str(path), "--lora_r", "6"])
    config = get_space_config(adapter)
    assert (config.r, config.rank_pattern, config.constraint, args.use_cpu) == (6, {"q_proj": 5}, "hard", True)
    with pytest.raises(SystemExit):
        parser.parse_args_and_config(["--output_dir", str(tmp_path), "--constraint", "sotf"])
    assert "'soft', 'hard', 'none'" in capsys.readouterr().err.replace("soft, hard, none", "'soft', 'hard', 'none'")


@pytest.mark.parametrize("pattern", ["q_proj", '{"q_proj": "many"}', "[1]"])
def test_a_pattern_that_is_none_is_refused(pattern):
    with pytest.raises(ValueError, match="`lora_rank_pattern` is .*(not JSON|expected numbers by layer)"):
        get_space_config(AdapterArguments(lora_rank_pattern=pattern))


def test_the_command_hands_everything_on(monkeypatch, demo_images, tmp_path):
    import space_peft.cli.erase as command

    demo_images.select(range(2)).select_columns(["image"]).save_to_disk(tmp_path / "pool")
    rows = [{"prompt": "What?", "completion": "That."}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    given = {}

    def stop(model, concept, **options):
        given.update(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "load_model", lambda *a, **k: None)
    monkeypatch.setattr(command, "erase", stop)
    told = [
        "--model",
        "demo",
        "--concept",
        "fox",
        "--pool",
        str(tmp_path / "pool"),
        "--retain",
        str(tmp_path / "rows.json"),
    ]
    with pytest.raises(KeyboardInterrupt):
        command.run_erase([*told, "--reason", "asked for", "--select_threshold", "0.2"])
    assert given["selection"] == {"threshold": 0.2} and given["card_data"].reason == "asked for"


# The light parser and the one that parses


@pytest.mark.parametrize("command", ["erase", "anchors"])
def test_the_light_parser_is_that_of_all_options(command):
    light, full = options(light_parser(command)), options(full_parser(command))
    rows = {part.name: part for part in fields(TrainerRows)}
    config = SpaceConfig("space-output")
    for name, action in light.items():
        other = full[name]
        assert action.option_strings == other.option_strings or name in rows
        assert (action.help, action.nargs) == (other.help, other.nargs), name
        assert list(action.choices or []) == list(other.choices or []), name
        # None stands for the trainer's own default.
        assert action.default == (getattr(config, name) if name in rows else other.default), name
    assert full.keys() > light.keys() and {part.name for kind in OWN for part in fields(kind)} < light.keys()


def test_help_says_what_is_needed_and_what_it_is_without(capsys):
    with pytest.raises(SystemExit):
        main(["erase", "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.endswith("(required)")] == ["--model", "--concept", "--pool"]
    text = "\n".join(lines)
    for said in ("How many anchors (default: 32)", "--save_steps X", "(default: 0.004)", "--fresh  "):
        assert said in text
    assert "[TEXT]" not in text
    with pytest.raises(SystemExit):
        main(["erase", "--help-all"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--gradient_accumulation_steps N" in text and "(default: 1)" in text and "[TEXT]" not in text
    assert "--select_caption_column NAME" in text and "(default: true; --no_select_exclude_by_caption)" in text


def test_help_and_what_is_missing_wait_for_no_import(tmp_path):
    (tmp_path / "run.yaml").write_text("model: m\nconcept: fox\nconstraint: sotf\n")
    code = (
        "import sys; from space_peft.cli import main\n"
        "for argv in (['erase'], ['anchors', '--model', 'm'], ['erase', '--config', 'run.yaml'],\n"
        "             ['erase', '--dtype', 'float8x'], ['erase', '--help'], ['anchors', '--help']):\n"
        "    try:\n        print(main(argv), file=sys.stderr)\n"
        "    except SystemExit as end:\n        print(end.code, file=sys.stderr)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if not line.startswith("usage")]
    assert said[0].startswith("space-peft erase: missing: --model, --concept, --pool, --retain or --statistics (or in")
    assert said[2].startswith("space-peft anchors: missing: --concept, --pool (or in")
    assert said[4] == "space-peft erase: run.yaml sets 'constraint' to 'sotf'; expected one of 'soft', 'hard', 'none'."
    assert "invalid choice: 'float8x'" in said[6] and said[1:8:2] == ["2"] * 4 and said[8:] == ["0", "0"]


def test_a_null_in_the_file_is_nothing_given(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("model: m\nconcept: null\npool: p\nretain: r\n")
    assert main(["erase", "--config", str(tmp_path / "run.yaml")]) == 2
    assert "missing: --concept (or in" in capsys.readouterr().err


# What is no option, or no value of one


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["erase", *(f"--{key}=." for key in NEEDED), "--lerning_rate", "1"], "--lerning_rate is not an option; did you mean --learning_"),
        # A flag that is cut short is none either.
        (["erase", *(f"--{key}=." for key in NEEDED), "--max_step", "1"], "--max_step is not an option; did you mean --max_steps"),
        (["plan", "demo", "--ran", "3"], "--ran is not an option; did you mean --rank"),
        (["plan", "demo", "--rnak", "3"], "--rnak is not an option; did you mean --rank"),
        (["merge", ".", "out", "more"], "'more' belongs to no option; see space-peft merge --help"),
    ],
)  # fmt: skip
def test_the_nearest_option_is_named(argv, said, capsys):
    assert main(argv) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("command", ["stats", "verify", "audit", "evaluate", "attack", "plan", "erase", "anchors"])
def test_a_precision_that_is_none_is_refused_everywhere(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--dtype", "float8x"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "float8x" in error and "bfloat16" in error


@pytest.mark.parametrize("dtype", ["float8x", "torch.float16", "int8", "load"])
def test_from_python_a_precision_that_is_none_is_refused_as_well(dtype):
    with pytest.raises(ValueError, match=f"`dtype` is {dtype!r}; expected one of 'auto', 'float32'"):
        load_model("demo", dtype=dtype)


@pytest.mark.parametrize(("device", "said"), [("tpu9", "the device is 'tpu9'"), ("cuda", "no GPU here")])
def test_a_device_that_is_not_here_is_refused(device, said, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=said):
        load_model("demo", device)
