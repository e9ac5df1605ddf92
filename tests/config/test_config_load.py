"""YAML and overrides to a run: what is read, what is refused, in which words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from stablemoe_ds.config.costs import flops_per_token
from stablemoe_ds.config.difference import differences
from stablemoe_ds.config.load import dump_run, load_run
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.errors import UserError

SHIPPED = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.yaml"))


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_run(path, overrides)
    return str(caught.value)


def test_numbers_and_words_of_yaml_1_1_are_not_taken_for_others(small: Path) -> None:
    run = load_run(small, ["name=no", "schedule.steps=60_000", "optimizer.eps=1E-9", "run_dir=1:30"])
    assert run.optimizer.lr == 6e-4
    assert (run.name, run.schedule.steps, run.optimizer.eps, run.run_dir) == ("no", 60_000, 1e-9, "1:30")


def test_overrides_take_lists_null_and_new_sections_and_the_last_one_wins(small: Path) -> None:
    run = load_run(
        small,
        [
            "data.train=[a, {path: b, weight: 2}]",
            "data.valid=c",
            "stages.at_step=null",
            "stages.plateau.window=7",
            "moe.layers=[1]",
            "moe.layers=[1, 3]",
            "deepspeed.zero_optimization.overlap_comm=true",
        ],
    )
    assert [(source.path, source.weight) for source in run.data.train] == [("a", 1.0), ("b", 2.0)]
    assert run.data.valid[0].path == "c"
    assert run.stages.at_step is None
    assert run.stages.plateau is not None
    assert run.stages.plateau.window == 7
    assert run.moe.layers == [1, 3]
    assert run.deepspeed == {"zero_optimization": {"overlap_comm": True}}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("moe.expert=3", "moe.expert: unknown key; did you mean moe.experts?"),
        ("moe.distilled.knd=word", "moe.distilled.knd: unknown key; did you mean moe.distilled.kind?"),
        ("data.train=[{path: a, wieght: 2}]", "data.train.0.wieght: unknown key; did you mean data.train.0.weight?"),
        ("stages.plateau.windw=3", "stages.plateau.windw: unknown key; did you mean stages.plateau.window?"),
        ("modle.heads=3", "modle: unknown key; did you mean model?"),
        ("optimizer.warmup_steps=3", "optimizer.warmup_steps: unknown key; did you mean schedule.warmup_steps?"),
        ("lr=1e-3", "lr: unknown key; did you mean optimizer.lr?"),
    ],
)
def test_unknown_key_is_answered_with_the_nearest_known_one(small: Path, override: str, said: str) -> None:
    assert refusal(small, override) == f"override {override}: {said}"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.heads=0", "got 0: expected more than 0"),
        ("model.heads=4.0", "got 4.0: expected an integer; nearest that works: 4"),
        ("model.heads=true", "got true: expected an integer"),
        ("model.heads='4'", 'got "4": expected an integer'),
        ("model.bias=yes", 'got "yes": expected true or false; nearest that works: false (the default)'),
        ("model.norm=rms", 'got "rms": expected layernorm or rmsnorm; nearest that works: rmsnorm'),
        ("name=6", 'got 6: expected text; nearest that works: "6" (in quotes)'),
        ("optimizer.lr=", "got null: expected a number"),
        ("data.sequence_length=[]", "got []: expected an integer; nearest that works: 1024 (the default)"),
        ("moe.layers=2", "got 2: expected a list, e.g. [1, 2]"),
        ("seed=-1", "got -1: expected at least 0; nearest that works: 1234 (the default)"),
        ("moe=[1]", "got [1]: expected a section: keys and values below it"),
        ("moe.layers=[3, 1, 3]", "got [3, 1, 3]: layers must ascend without repeats; nearest that works: [1, 3]"),
    ],
)
def test_wrong_value_is_named_with_what_was_expected(small: Path, override: str, said: str) -> None:
    assert refusal(small, override) == f"override {override}: {override.partition('=')[0]}: {said}"


def test_every_error_has_its_own_line_with_the_place_it_comes_from(small: Path) -> None:
    small.write_text("model: {layers: 4, hidden_size: 32, heads: -4}\noptimizer: {lr: fast}\nschedule: {steps: 3}\n")
    assert refusal(small, "seed=x").splitlines() == [
        'override seed=x: seed: got "x": expected an integer; nearest that works: 1234 (the default)',
        f"{small}: model.heads: got -4: expected more than 0",
        f"{small}: model.ffn_hidden_size: missing: inner width of a block's feed-forward layer",
        f'{small}: optimizer.lr: got "fast": expected a number',
        f"{small}: schedule.tokens_per_step: missing: tokens in an update, over all ranks and accumulation steps",
    ]


def test_long_lists_of_errors_are_cut(small: Path) -> None:
    said = refusal(small, "moe.layers=[" + ",".join(["x"] * 50) + "]")
    assert said.splitlines()[-1] == "... and 30 more"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "found nothing"),
        (b"# only a comment\n", "found nothing"),
        (b"- a\n- b\n", 'found ["a", "b"]'),
        (b"just text", 'found "just text"'),
        (b"a: &x [1]\nb: *x\n", ":2:4: invalid YAML: aliases (*name) are not read"),
        (b"seed: 1\nseed: 2\n", ":2:1: invalid YAML: the key 'seed' is there twice"),
        (b"model: {layers: 1, layers: 2}", ":1:20:"),
        (b"1: 2\n", "a key must be a name"),
        (b"? [a]\n: 2\n", "a key must be a name"),
        (b"name: a\0b\n", "is not allowed"),
        (b'name: "a\\0b"\n', "NUL"),
        (b'name: "\\ud800"\n', "surrogate"),
        (b"name: \xff\xfe\n", "byte 6 is not UTF-8"),
        (b"a: [1\n", "invalid YAML"),
        (b"a: 1\n---\nb: 2\n", "expected a single document"),
        (b"name: !!python/object/apply:os.system [ls]\n", "tag"),
        (b"seed: " + b"9" * 5000, "out of range"),
        (b"seed: 1e999", "out of range"),
        (b"a: " + b"[" * 100 + b"]" * 100, "nested deeper than 40"),
        (b"[" * 100_000, "nested deeper than 40"),
        (b"a: 1\n" + b"#" * (1 << 20), "larger than"),
    ],
)
def test_text_that_is_no_run_is_refused_in_one_line(small: Path, content: bytes, said: str) -> None:
    small.write_bytes(content)
    message = refusal(small)
    assert message.startswith(str(small))
    assert said in message
    assert "\n" not in message


def test_path_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "absent.yaml")
    assert "directory" in refusal(tmp_path)
    assert "null" in refusal(Path("a\0b"))


@pytest.mark.parametrize("override", ["steps", "=3", "a..b=3", ".a=3", "seed.x=3", "seed=[1", "seed=*x", "a=b: c: d"])
def test_malformed_override_is_refused(small: Path, override: str) -> None:
    assert refusal(small, override).startswith("override ")


def test_message_is_printable_on_one_line_whatever_was_typed(small: Path) -> None:
    for override in ("seed=a\nb", "na\nme=1", "name=\udc80", "\x1b[31m=2"):
        said = refusal(small, override)
        assert said.isprintable(), said
        assert len(said) < 250


def test_dumped_run_reads_back_equal(small: Path, tmp_path: Path) -> None:
    texts = [
        "6e-4",
        "no",
        "null",
        "010",
        "1:30",
        "a: b",
        "# c",
        "",
        "é\u2028",
        " x ",
        "2020-01-01",
        "0x1F",
        "0o17",
        "08",
        "1_0",
        ".inf",
        "<<",
        "=",
        "True",
        "[a",
        "\x7f",
        "-_",
    ]
    run = load_run(small, ["deepspeed.x=[1, 2.5e-7, null, {y: true}]", "optimizer.eps=1e-12"])
    run = RunConfig.model_validate({**run.model_dump(), "deepspeed": {"texts": texts, **run.deepspeed}})
    again = tmp_path / "again.yaml"
    again.write_text(dump_run(run), encoding="utf-8")
    assert load_run(again) == run
    assert yaml.safe_load(again.read_text(encoding="utf-8"))["deepspeed"] == run.deepspeed, "also by YAML 1.1"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configuration_survives_dump_and_load(path: Path, tmp_path: Path) -> None:
    run = load_run(path)
    again = tmp_path / "again.yaml"
    again.write_text(dump_run(run))
    assert load_run(again) == run


def test_configuration_needs_no_torch() -> None:
    code = (
        "import sys; import stablemoe_ds.config.load, stablemoe_ds.config.cost_report, stablemoe_ds.config.reference;"
        "print([m for m in ('torch', 'deepspeed', 'megatron', 'numpy') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("recipe", "base"),
    [
        ("demo-table", "demo"),
        ("wikitext-2-table", "wikitext-2"),
        ("enwiki-small-table", "suites/enwiki-small"),
    ],
)
def test_a_recipe_with_a_table_is_its_base_in_all_else(recipe: str, base: str) -> None:
    folder = SHIPPED[0].parent
    ours, theirs = (load_run(folder / f"{name}.yaml", ["model.vocab_size=4096"]) for name in (recipe, base))
    changed = {key for key, _, _ in differences(ours, theirs)}
    recipes, table = {"moe.router", "moe.table", "moe.gate"}, "cooccurrence"
    free = {"moe.balance_weight", "moe.distilled.lr_scale", "moe.router_input"}  # what stage 1 alone needs
    if recipe == "demo-table":  # no router needs a scaled embedding there
        free |= {"model.embedding"}
    if recipe == "enwiki-small-table":  # two experts of half the width
        recipes, table = recipes | {"moe.experts", "moe.top_k", "moe.ffn_hidden_size"}, "crossed"
    assert recipes <= changed <= recipes | free
    assert flops_per_token(ours) == flops_per_token(theirs)
    assert (ours.moe.router, ours.moe.table, ours.moe.gate_name) == ("table", table, "one")
