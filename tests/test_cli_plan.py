"""`space-peft plan`: a model's config is enough."""

import json
import re
import textwrap
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_llama, tiny_llava
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2_5_VLConfig

from space_peft.cli import main
from space_peft.cli.commands import build_parser
from space_peft.cli.plan import run_plan


@pytest.fixture(scope="module")
def seven_billion(tmp_path_factory):
    """A folder with nothing but the config.json of a model of the size of Qwen2.5-VL-7B."""
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
            "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
        },
        vision_config={
            "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
            "patch_size": 14, "spatial_merge_size": 2,
        },
        dtype="bfloat16",
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("seven_billion")
    config.save_pretrained(folder)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    return folder


def test_seven_billion_parameters_are_planned_from_a_config_alone(seven_billion, tmp_path, capsys):
    path = tmp_path / "plan.json"
    assert main(["plan", str(seven_billion), "--json", str(path)]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert len(lines) < 40 and max(map(len, lines)) <= 110, "it fits a screen"
    plan = json.loads(path.read_text())
    assert plan["model"] == "Qwen2_5_VLForConditionalGeneration" and plan["dtype"] == "bfloat16"
    assert plan["modules"] == {"language": 7 * 28}
    # By hand: r (d + m) of q, k, v, o, gate, up, down.
    shapes = [(3584, 3584), (3584, 512), (3584, 512), (3584, 3584), (3584, 18944), (3584, 18944), (18944, 3584)]
    assert plan["parameters"] == 28 * 8 * sum(d + m for d, m in shapes)
    assert 8.2e9 < sum(plan["bytes"]["weights"].values()) / 2 < 8.4e9
    # Four inputs a layer, two kinds of tokens, float32.
    assert plan["bytes"]["sums"] == 28 * 2 * 4 * (3 * 3584**2 + 18944**2)
    down = next(row for row in plan["layers"] if row["name"].endswith("down_proj"))
    assert (down["count"], down["kept"], down["left"]) == (28, 1024, 18944 - 1024)
    assert plan["refused"] == [] and plan["seconds"] is None
    assert "85.1 GiB" not in out and "second moments" in out
    page = (Path(__file__).parents[1] / "docs" / "plan.md").read_text()
    (shown,) = re.findall(r"^The first prints:\n\n((?:    .*\n|\n)+)", page, re.MULTILINE)
    assert textwrap.dedent(shown).strip() in out, "docs/plan.md shows what it prints"


def test_target_modules_and_settings_count(seven_billion, tmp_path, capsys):
    def planned(*more):
        path = tmp_path / "plan.json"
        assert main(["plan", str(seven_billion), "--json", str(path), *more]) == 0
        return json.loads(path.read_text())

    one = planned("--target-modules", "q_proj", "v_proj", "--rank", "4", "--max-rank", "7", "--dtype", "float32")
    assert one["modules"] == {"language": 56} and one["dtype"] == "float32"
    assert {row["kept"] for row in one["layers"]} == {7} and one["unique_inputs"] == 28
    assert planned("--target-modules", "self_attn.o_proj")["modules"] == {"language": 28}
    pattern = planned("--target-modules", r".*visual.*mlp\.(0|2)", "--constraint", "hard")
    assert pattern["modules"] == {"projector": 2}
    assert pattern["bytes"]["sums"] == 2 * 8 * 5120**2  # float64, pictures only
    capsys.readouterr()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--device", "cpu", "--dtype", "float16"], "Use --dtype float32"),
        (["--device", "cpu", "--dtype", "float32", "--batch-size", "100000"], "are needed, and this machine's cpu has"),
        (["--target-modules", "no_such_layer"], "no_such_layer"),
        (["--target-modules", "embed_tokens"], "only linear layers"),
        (["--target", "vision", "--image-tokens", "0"], "would see no retained data"),
    ],
)
def test_what_would_be_refused_is_said_and_exits_with_1(seven_billion, tmp_path, options, said, capsys):
    path = tmp_path / "plan.json"
    assert main(["plan", str(seven_billion), "--json", str(path), *options]) == 1
    out = capsys.readouterr().out
    assert "would be refused: " in out and said in out and len(out) < 6000
    assert any(said in reason for reason in json.loads(path.read_text())["refused"])


def test_a_model_that_sees_nothing_or_has_no_known_parts_is_refused(tmp_path, capsys):
    tiny_llama().config.save_pretrained(tmp_path / "text")
    assert main(["plan", str(tmp_path / "text")]) == 1
    assert "LlamaConfig is not the config of a model that takes pictures" in capsys.readouterr().out


def test_tied_output_layer_is_refused(tmp_path, capsys):
    config = tiny_llava().config
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    config.save_pretrained(tmp_path / "tied")
    assert main(["plan", str(tmp_path / "tied"), "--target-modules", "lm_head"]) == 1
    assert "shares its weight" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["./no/such/folder"], "no file or folder './no/such/folder'"),
        (["{here}"], "config.json"),
        (["{7b}", "--rank", "0"], "the rank 0"),
        (["{7b}", "--strength", "-1"], "`strength` is -1"),
        (["{7b}", "--rows", "0"], "`rows` is 0"),
        (["{7b}", "--row-tokens", "3"], "cannot hold a picture of 256"),
        (["{7b}", "--max-rank", "0"], "`max_rank` is 0"),
        (["{7b}", "--max-rank", "some"], "`max_rank` is 'some'"),
        (["{7b}", "--device", "cuda", "--time"], "there is no GPU here"),
    ],
)
def test_bad_input_exits_with_2(seven_billion, tmp_path, options, said, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    options = [option.replace("{here}", str(tmp_path)).replace("{7b}", str(seven_billion)) for option in options]
    assert main(["plan", *options]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error) < 2000


def test_the_file_of_an_erasure_is_planned(tmp_path, capsys):
    path, plan = tmp_path / "run.yaml", tmp_path / "plan.json"
    path.write_text(
        "model: demo\nconcept: fox\npool: nowhere\nlora_r: 3\nlora_target_modules: [q_proj]\nmax_rank: all\nmax_steps: 7\n"
        "per_device_train_batch_size: 2\nuse_cpu: true\nlora_rank_pattern: {layers.0.self_attn.q_proj: 5}\nwarmup_steps: 1\n"
        "lora_exclude_modules: .*layers.1.*\n"
    )
    assert main(["plan", "--config", str(path), "--json", str(plan)]) == 0
    assert capsys.readouterr().err.splitlines()[0] == (
        f"space-peft plan: not looked at in {path}: concept, pool, warmup_steps"
    )
    made = json.loads(plan.read_text())
    # On a CPU `erase` loads it in float32.
    assert (made["dtype"], made["tokens"]["steps"], made["tokens"]["batch_size"]) == ("float32", 7, 2)
    assert {row["name"].rpartition(".")[2]: row["left"] for row in made["layers"]} == {"q_proj": 0}
    ranks = {(row["name"].split(".layers.")[1][0], row["rank"]) for row in made["layers"]}
    assert {rank for _, rank in ranks} == {3, 5} and not [layer for layer, _ in ranks if layer == "1"]
    path.write_text("model: demo\nlorar: 3\n")
    assert main(["plan", "--config", str(path)]) == 2
    assert "sets 'lorar', which is not an option; did you mean lora_r" in capsys.readouterr().err


def test_names_of_options_are_those_of_an_erasure_too():
    old = ["--rank", "4", "--target-modules", "q", "v", "--steps", "3", "--batch-size", "2", "--max-rank", "none"]
    new = [
        "--lora_r", "4", "--lora_target_modules", "q", "v", "--max_steps", "3", "--per_device_train_batch_size", "2",
        "--max_rank", "none",
    ]  # fmt: skip
    assert build_parser().parse_args(["plan", "m", *old]) == build_parser().parse_args(["plan", "m", *new])


def test_the_demo_model_is_timed(tmp_path, capsys):
    path = tmp_path / "plan.json"
    options = ["--device", "cpu", "--dtype", "float32", "--batch-size", "2", "--rows", "10", "--steps", "4"]
    assert main(["plan", "demo", *options, "--time", "--json", str(path)]) == 0
    assert "4 steps" in capsys.readouterr().out
    plan = json.loads(path.read_text())
    seconds = plan["seconds"]
    assert 0 < seconds["step"] < 60 and seconds["steps"] == pytest.approx(4 * seconds["step"])
    assert seconds["all"] == pytest.approx(seconds["fitting"] + seconds["decomposition"] + seconds["steps"])
    # The processor lies beside the config: it says how many tokens a picture takes.
    assert plan["tokens"]["image_tokens"] > 0
    assert main(["plan", "demo", "--device", "cpu", "--dtype", "float16", "--time"]) == 2
    assert "no step is timed" in capsys.readouterr().err


def test_without_a_gpu_a_plan_says_so_where_it_matters(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    # For the GPU of another machine, whose memory nobody knows here.
    assert main(["plan", "demo"]) == 0
    out = capsys.readouterr().out
    assert "in float16" in out and "no GPU here: it is not known whether the memory of one suffices" in out
    assert main(["plan", "demo", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "in float32" in out and "no GPU" not in out
    assert main(["plan", "demo", "--time", "--batch-size", "2", "--rows", "10"]) == 0
    out = capsys.readouterr().out
    assert "in float32" in out and "no GPU here: the step was timed on the CPU" in out


def test_no_weight_is_filled(seven_billion):
    args = build_parser().parse_args(["plan", str(seven_billion), "--target", "all"])
    filled = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            # Memory that was asked for and not written to is not taken.
            if isinstance(out, torch.Tensor) and out.device.type == "cpu" and "empty" not in func.__name__:
                filled.append(out.numel())
            return out

    with Watch():
        plan, refused = run_plan(args)
    assert not refused and plan.published > 2**30
    assert max(filled) < 2**20
