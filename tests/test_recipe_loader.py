"""Recipes: values, errors and their messages, overrides, order; with two small stages made for these tests."""

import subprocess
import sys
from pathlib import Path

import pytest

from handoff.errors import UserError
from training.recipe import Recipe, RecipeError, load_recipe
from training.registry import Registry

BAKE = """
from typing import Annotated, Any, Literal
from pydantic import Field
from training.config import StageConfig
from training.strict import Strict
from training.declaration import Declaration

DECLARATION = Declaration("a toy")


class Oven(Strict):
    degrees: float = Field(default=180.0, ge=0, le=300)
    minutes: int = Field(default=30, ge=1)
    fan: bool | Literal["auto"] = "auto"


class Flour(Strict):
    kind: Literal["flour"]
    grams: int = 500
    sort: Literal["wheat", "rye"] = "wheat"


class Water(Strict):
    kind: Literal["water"]
    litres: float = 0.3


class Config(StageConfig):
    parent: str
    tins: tuple[str, ...] = ()
    dough: list[Annotated[Flour | Water, Field(discriminator="kind")]] = Field(min_length=1)
    oven: Oven = Field(default_factory=Oven)


def parents(config):
    return {"parent": config.parent}
"""
TASTE = """
from pydantic import Field, model_validator
from training.config import StageConfig
from training.declaration import Declaration

DECLARATION = Declaration("a toy")


class Config(StageConfig):
    dishes: list[str] = Field(default_factory=list)
    judge: str | None = None
    salt: float = Field(default=0.5, ge=0)

    @model_validator(mode="after")
    def _no_twins(self):
        if len(set(self.dishes)) != len(self.dishes):
            raise ValueError("a dish is tasted once")
        return self


def parents(config):
    return {} if config.judge is None else {"judge": config.judge}


def soft_parents(config):
    return {f"dish:{dish}": dish for dish in config.dishes}
"""


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """Two stages, bake and taste, and a sub-package that is not a stage."""
    folder = tmp_path_factory.mktemp("kitchen")
    for name, text in (("bake", BAKE), ("taste", TASTE)):
        (folder / "kitchen_stages" / name).mkdir(parents=True)
        (folder / "kitchen_stages" / name / "__init__.py").touch()
        (folder / "kitchen_stages" / name / "config.py").write_text(text)
    (folder / "kitchen_stages" / "tools").mkdir()
    (folder / "kitchen_stages" / "__init__.py").touch()
    sys.path.insert(0, str(folder))
    yield Registry("kitchen_stages")
    sys.path.remove(str(folder))


@pytest.fixture
def load(kitchen: Registry, tmp_path: Path):
    """Loads a recipe given as text."""

    def load(text: str, *overrides: str, section: str | None = None) -> Recipe:
        path = tmp_path / "r.yaml"
        path.write_text(text)
        return load_recipe(path, overrides, section, kitchen)

    return load


@pytest.fixture
def mistakes(load, tmp_path: Path):
    """The lines of the error that a recipe gives, without the folder."""

    def mistakes(text: str, *overrides: str, section: str | None = None) -> list[str]:
        with pytest.raises(RecipeError) as caught:
            load(text, *overrides, section=section)
        return str(caught.value).replace(f"{tmp_path}/", "").splitlines()

    return mistakes


GOOD = """\
name: bread
x-often: &often {degrees: 2.2e2, minutes: 40}
stages:
  taste:
    dishes: [loaf, rolls]
    judge: loaf
  loaf:
    stage: bake
    parent: org/starter
    dough:
      - {kind: flour, grams: 1_000}
      - {kind: water}
    oven:
      <<: *often
      minutes: 50
  rolls: {stage: bake, parent: loaf, tins: [a, b], dough: [{kind: flour, sort: rye}]}
"""


def test_values_are_typed_and_have_a_source(load, tmp_path):
    recipe = load(GOOD, "rolls.dough.0.grams=3e0".replace("3e0", "3"), "seed=7")
    assert (recipe.name, recipe.seed, recipe.run_dir) == ("bread", 7, Path("runs/bread"))
    loaf = recipe.sections["loaf"].config
    assert (loaf.oven.degrees, loaf.oven.minutes, loaf.oven.fan) == (220.0, 50, "auto")
    assert (loaf.dough[0].grams, loaf.dough[1].litres) == (1000, 0.3)
    assert recipe.sections["rolls"].config.tins == ("a", "b")
    source = recipe.explain()
    file = f"{tmp_path}/r.yaml"
    assert source["loaf.oven.degrees"] == f"{file}:2"  # the line of the anchor
    assert source["loaf.oven.minutes"] == f"{file}:15"
    assert source["loaf.oven.fan"] == "default"
    assert source["loaf.dough.0.grams"] == f"{file}:11"
    assert source["loaf.dough.0.sort"] == "default"
    assert source["rolls.dough.0.grams"] == source["seed"] == "command line"
    assert source["rolls.tins"] == f"{file}:16"
    assert recipe.resolved()["stages"]["rolls"]["dough"] == [{"kind": "flour", "grams": 3, "sort": "rye"}]


def test_every_resolved_value_has_a_source(load):
    recipe = load(GOOD)

    def leaves(value, path=""):
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                yield from leaves(inner, f"{path}.{key}".lstrip("."))
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for row, inner in enumerate(value):
                yield from leaves(inner, f"{path}.{row}")
        else:
            yield path

    expected = {path.removeprefix("stages.") for path in leaves(recipe.resolved())}
    assert expected == set(recipe.explain())


def test_order_puts_parents_first_and_soft_parents_add_nothing(load):
    recipe = load(GOOD)
    assert recipe.order() == ["loaf", "rolls", "taste"]
    assert recipe.order(["taste"]) == ["loaf", "taste"]
    assert recipe.order(["rolls"]) == ["loaf", "rolls"]
    assert recipe.order(["taste", "rolls"]) == ["loaf", "rolls", "taste"]
    with pytest.raises(RecipeError, match="no section rols, did you mean rolls"):
        recipe.order(["rols"])


def test_all_mistakes_are_reported_at_once_each_with_its_line(mistakes):
    found = mistakes("""\
name: bread
sed: 3
stages:
  loaf:
    stage: bake
    parnt: org/x
    dough: [{kind: flour, gram: 3}, {kind: watr}, {grams: 3}]
    oven:
      degrees: 400
      minutes: "30"
      fan: on
      degrees: 20
  rolls: {stage: bke, parent: loaf}
  soup: {dishes: []}
  taste: {salt: -1.5, dishes: [loaf, loaf]}
""")
    assert found == [
        "r.yaml:2: sed: unknown key, did you mean seed?",
        "r.yaml:4: loaf.parent: missing, this key is required",
        "r.yaml:6: loaf.parnt: unknown key, did you mean parent?",
        "r.yaml:7: loaf.dough.0.gram: unknown key, did you mean grams?",
        "r.yaml:7: loaf.dough.1: 'watr' is none of flour, water, did you mean water?",
        "r.yaml:7: loaf.dough.2: missing, set `kind:` to flour or water",
        "r.yaml:9: loaf.oven.degrees: 400 is out of range, it must be at most 300",
        "r.yaml:10: loaf.oven.minutes: expected a whole number, not '30'",
        "r.yaml:11: loaf.oven.fan: expected true or false or auto, not 'on': write true",
        "r.yaml:12: loaf.oven.degrees: given twice, first in line 9",
        "r.yaml:13: rolls.stage: there is no stage bke, did you mean bake?",
        "r.yaml:14: soup: there is no stage soup; there are bake, taste; "
        "a section with a name of its own says `stage: <which>`",
        "r.yaml:15: taste.salt: -1.5 is out of range, it must be at least 0",
    ]


def test_a_check_over_several_keys_names_its_section(mistakes):
    assert mistakes("name: b\nstages:\n  taste: {dishes: [org/x, org/x]}\n") == [
        "r.yaml:3: taste: a dish is tasted once"
    ]


def test_a_key_of_another_stage_or_place_is_told_from_an_unknown_one(mistakes):
    found = mistakes("""\
name: bread
stages:
  taste: {parent: org/x, tins: [a]}
  bake:
    parent: org/x
    degrees: 100
    salt: 1
    oven: {dough: [], zzz: 1}
    dough: [{kind: water, grams: 3}]
""")
    assert found == [
        "r.yaml:3: taste.parent: unknown key. parent is a key of bake, not of taste",
        "r.yaml:3: taste.tins: unknown key. tins is a key of bake, not of taste",
        "r.yaml:6: bake.degrees: unknown key here, its place is bake.oven.degrees",
        "r.yaml:7: bake.salt: unknown key. salt is a key of taste, not of bake",
        "r.yaml:8: bake.oven.dough: unknown key here, its place is bake.dough",
        "r.yaml:8: bake.oven.zzz: unknown key, known here: degrees, fan, minutes",
        "r.yaml:9: bake.dough.0.grams: unknown key here, its place is bake.dough.grams",
    ]


MINIMAL = "name: b\nstages:\n  bake: {parent: org/x, dough: [{kind: water}], oven: {degrees: %s}}\n"


@pytest.mark.parametrize(
    ("text", "value"),
    [("3e-3", 0.003), ("1E2", 100.0), (".5", 0.5), ("1.", 1.0), ("+2", 2), ("010", 10), ("0x10", 16), ("1_0.5", 10.5)],
)
def test_numbers_are_read_as_they_look(load, text, value):
    assert load(MINIMAL % text).sections["bake"].config.oven.degrees == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (".nan", ".nan is not a finite number"),
        ("-.inf", "-.inf is not a finite number"),
        ("1:30", "expected a number, not '1:30'"),
        ("2026-01-01", "expected a number, not '2026-01-01'"),
        ("'3'", "expected a number, not '3'"),
        ("true", "expected a number, not true"),
        ("null", "expected a number, not nothing"),
        ("[3]", "expected a number, not a list"),
        ("{a: 3}", "expected a number, not a mapping"),
        ("9223372036854775808", "a whole number of 19 digits is too large (below 2^63)"),
        pytest.param("7" * 900, "a whole number of 900 digits is too large (below 2^63)", id="many digits"),
        pytest.param(
            "0x" + "f" * 898, "a whole number of 900 digits is too large (below 2^63)", id="many hexadecimal digits"
        ),
        (r'"\ud83d"', r"\ud83d holds a character that no text has"),
        (r'"a\0"', r"a\x00 holds a character that no text has"),
        (
            "hot #3\n",
            "hot ends here, since ` #` begins a comment in YAML: put the value in quotes if # belongs to it, or a "
            "space behind the # if it does not",
        ),
        ("!!float 3", "the YAML tag tag:yaml.org,2002:float is not read here; write the value without a tag"),
    ],
)
def test_text_that_resembles_a_number_is_refused(mistakes, text, words):
    assert f"r.yaml:3: bake.oven.degrees: {words}" in mistakes(MINIMAL % text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "r.yaml:1: is empty"),
        ("- a\n", "r.yaml:1: must hold keys: name, stages, ..."),
        ("name: b\nstages:\n\tbake: 3\n", "r.yaml:3: not valid YAML"),
        ("name: [b\nstages: {}\n", "r.yaml:2: not valid YAML"),
        ("name: b\nstages: {}\n", "r.yaml:2: stages: needs at least 1 entry"),
        ("name: b\nstages: 3\n", "r.yaml:2: stages: expected a mapping of keys, not 3"),
        ("name: ../b\nstages: {taste: {}}\n", "r.yaml:1: name: '../b' cannot name a folder"),
        ("stages: {taste: {}}\n", "r.yaml:1: name: missing, this key is required"),
        ("name: b\nstages: {logs: {stage: taste}}\n", "r.yaml:2: logs: cannot name a section"),
        ("name: b\nstages: {a.b: {stage: taste}}\n", "r.yaml:2: a.b: cannot name a section"),
        ("name: b\nseed: -1\nstages: {taste: {}}\n", "r.yaml:2: seed: -1 is out of range, it must be at least 0"),
        ("name: b\nstages: {taste: &t {judge: *t}}\n", "r.yaml:2: taste.judge: refers to itself"),
        ("name: b\nstages: {taste: 3}\n", "r.yaml:2: taste: expected a mapping of keys"),
        ("name: b\n---\nname: c\n", "r.yaml:2: not valid YAML: but found another document"),
        (
            "name: b\nstages: {taste: {}}\nx-a: " + "[" * 60 + "]" * 60,
            "r.yaml:3: x-a" + ".0" * 39 + ": more than 40 levels",
        ),
        ("name: b\nx-a: " + "{a: " * 9000, "r.yaml:1: not valid YAML: more than 40 levels"),
        ("name: b\nstages:\n  taste: {judge: \x07}\n", r"r.yaml:3: not valid YAML: the character \x07 at position 33"),
        ("name: b\n" + 'x-"\\ud83d": 1\n"\\ud83d": 1\n', r"r.yaml:1: the key \ud83d holds a character"),
        (f"name: {'b' * 101}\nstages: {{taste: {{}}}}\n", "r.yaml:1: name: 'bbb"),
        (
            "name: b\noutput_root: ~nobody-here/x\nstages: {taste: {}}\n",
            "r.yaml:2: output_root: ~nobody-here/x: there is",
        ),
        (
            "name: b\ndata_root: ${SCRATCH}/d\nstages: {taste: {}}\n",
            "r.yaml:2: data_root: ${SCRATCH}/d: a recipe's variables are not replaced; the shell does it on the "
            "command line: data_root=...",
        ),
        (f"name: b\nstages: {{taste: {{judge: {'x' * 9000}}}}}\n", "r.yaml:2: taste.judge: xxx"),
        ("name: b\nstages: {taste: {judge: $BASE/x}}\n", "r.yaml:2: taste.judge: $BASE/x: a recipe's variables"),
    ],
)
def test_broken_files_name_their_line(mistakes, text, expected):
    assert mistakes(text)[0].startswith(expected)


def test_anchors_that_multiply_are_refused_soon(mistakes):
    rows = [f"x-{n}: &n{n} [{', '.join([f'*n{n - 1}' if n else '1'] * 9)}]" for n in range(9)]
    found = [line for line in mistakes("\n".join(["name: b", *rows])) if "x-5." in line]
    assert len(found) == 1
    assert found[0].endswith(": the recipe has more than 100,000 values; an anchor that is used again counts again")


def test_a_comment_is_no_part_of_a_value(load):
    assert load(MINIMAL.replace("%s", "3 #x\n ") + "  taste: {}  #end\n").sections["bake"].config.oven.degrees == 3
    assert load(bake("org/x # a note")).sections["loaf"].parents == {"parent": "org/x"}
    assert load(bake("'org/x' #note")).sections["loaf"].parents == {"parent": "org/x"}


def test_a_sign_that_only_resembles_a_number_names_no_entry(mistakes):
    assert mistakes(bake("org/x"), "loaf.dough.².litres=1") == [
        "command line: loaf.dough.².litres: loaf.dough is a list of 1, its entries are numbered from 0"
    ]


def test_unreadable_files_are_refused(kitchen, tmp_path):
    (tmp_path / "tiny.yaml").touch()
    with pytest.raises(RecipeError, match=r"tinny.yaml: no such recipe, did you mean .*/tiny.yaml\?"):
        load_recipe(tmp_path / "tinny.yaml", registry=kitchen)
    with pytest.raises(RecipeError, match="is a folder"):
        load_recipe(tmp_path, registry=kitchen)
    (tmp_path / "latin.yaml").write_bytes(b"name: b\n# caf\xe9\n")
    with pytest.raises(RecipeError, match=r"latin.yaml:2: not UTF-8"):
        load_recipe(tmp_path / "latin.yaml", registry=kitchen)


# ---- parents


def bake(parent: str) -> str:
    return f"name: b\nstages:\n  loaf:\n    stage: bake\n    parent: {parent}\n    dough: [{{kind: water}}]\n"


def test_a_parent_is_a_section_a_folder_or_a_hub_id(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old" / "model").mkdir(parents=True)
    for ref in ("old", "old/model", str(tmp_path / "old"), "meta-llama/Llama-3.2-1B"):
        assert load(bake(ref)).sections["loaf"].parents == {"parent": ref}
        assert load(bake(ref)).order() == ["loaf"]


@pytest.mark.parametrize(
    ("ref", "hint"),
    [
        ("loof", "did you mean loaf?"),
        ("old/modl", "there are loaf"),
        ("a/b/c", "there are loaf"),
        ("./x", "there are loaf"),
    ],
)
def test_an_unknown_parent_is_refused(mistakes, tmp_path, monkeypatch, ref, hint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old").mkdir()  # so old/... is read as a path, not as a hub id
    (found,) = mistakes(bake(ref))
    assert found.startswith(
        f"r.yaml:5: loaf.parent: {ref} is not a section of this recipe, an existing folder or .gguf file, or a hub id"
    )
    assert hint in found


def test_a_stage_cannot_wait_for_itself(mistakes):
    assert mistakes(bake("loaf")) == ["r.yaml:5: loaf.parent: a stage cannot start from itself"]
    text = "name: b\nstages:\n  a: {stage: bake, parent: c, dough: [{kind: water}]}\n"
    text += "  b: {stage: bake, parent: a, dough: [{kind: water}]}\n  c: {stage: taste, dishes: [b]}\n"
    assert mistakes(text) == ["r.yaml:3: a: sections wait for each other: a <- c <- b <- a"]


# ---- overrides


def test_overrides_are_as_strict_as_the_file(mistakes):
    found = mistakes(
        MINIMAL % 3,
        "bake.oven.degres=3",
        "bake.oven.degrees=hot",
        "bake.oven.minutes=",
        "bake.dough.4.kind=water",
        "bake.parent.x=1",
        "bakke.parent=a/b",
        "oven.degrees=3",
        "stages.bake.parent=a/b",
        "bake=3",
        "fast",
        "bake.tins=[a: b: c",
    )
    assert found == [
        "command line: bake: is a section; set one of its keys: bake.key=value",
        "command line: bake.dough.4.kind: bake.dough is a list of 1, its entries are numbered from 0",
        "command line: bake.oven.degrees: expected a number, not 'hot'",
        "command line: bake.oven.degres: unknown key, did you mean degrees?",
        "command line: bake.oven.minutes: expected a whole number, not nothing",
        "command line: bake.parent.x: bake.parent is 'org/x', it has no keys",
        found[6],
        "command line: bakke.parent: bakke is neither a section (bake) nor one of name, seed, data_root, output_root, "
        "did you mean bake?",
        "command line: fast: an override has the form section.key=value",
        "command line: oven.degrees: oven is neither a section (bake) nor one of name, seed, data_root, output_root, "
        "write for example bake.oven.degrees",
        "command line: stages.bake.parent: leave out `stages.`: bake.parent=...",
    ]
    assert found[6].startswith("command line: bake.tins: not valid YAML")


def test_overrides_reach_lists_whole_mappings_and_keys_not_in_the_file(load):
    recipe = load(
        MINIMAL % 3,
        "bake.tins=[x, y]",
        "bake.dough.0={kind: flour}",
        "bake.oven={minutes: 9}",
        "data_root=~/d",
        "name=c",
    )
    config = recipe.sections["bake"].config
    assert (config.tins, config.dough[0].grams, config.oven.minutes, config.oven.degrees) == (("x", "y"), 500, 9, 180.0)
    assert recipe.data_root == Path("~/d").expanduser()
    assert recipe.run_dir == Path("runs/c")
    assert recipe.explain()["bake.oven.minutes"] == recipe.explain()["bake.dough.0.kind"] == "command line"
    assert recipe.explain()["bake.oven.degrees"] == "default"  # the mapping was replaced as a whole


def test_overrides_may_be_relative_to_the_section_that_is_run(load, mistakes):
    recipe = load(GOOD, "oven.minutes=5", "rolls.oven.minutes=6", section="loaf")
    assert [recipe.sections[name].config.oven.minutes for name in ("loaf", "rolls")] == [5, 6]
    assert mistakes(MINIMAL % 3, "oven.minuts=5", section="bake") == [
        "command line: bake.oven.minuts: unknown key, did you mean minutes?"
    ]
    assert "no section loof, did you mean loaf" in mistakes(GOOD, section="loof")[0]


def test_a_mistake_is_a_user_error():
    assert issubclass(RecipeError, UserError)


def test_loading_needs_no_torch(root):
    code = (
        "import sys, training.recipe, training.registry as r\n"
        "r.Registry().config_classes()\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
