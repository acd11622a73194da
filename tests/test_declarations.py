"""What the stages declare: complete, true to Makefile, README and recipes, and enough for a stage that is new."""

import re
from pathlib import Path

import pytest

from training.declaration import Declaration, HeldModel
from training.recipe import DATA_ROLE, load_recipe
from training.registry import Registry

STAGES = Registry().names


def stage_targets(makefile: str) -> set[str]:
    """Targets of a Makefile that do nothing but run up to one section."""
    found = re.findall(r"^([\w-]+):[^\n=]*\n((?:\t[^\n]*\n)+)", makefile, re.MULTILINE)
    return {
        target
        for target, body in found
        if len(body.splitlines()) == 1 and body.count("--to ") == 1 and "$(RUN)" in body
    }


def declared_targets() -> dict[str, tuple[str, ...]]:
    return {stage: declared.targets for stage, declared in Registry().declarations().items()}


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_declares_itself(stage: str) -> None:
    declared = Registry().declaration(stage)
    assert isinstance(declared, Declaration) and declared.caption
    titles = [chart.title for chart in declared.charts]
    assert len(set(titles)) == len(titles) and all(chart.lines for chart in declared.charts)
    assert not declared.missing or declared.targets, "the report names the target that makes what is missing"
    trains = "train" in Registry().config_class(stage).model_fields
    assert bool(declared.compared) == trains, "replay takes again the steps of the stages that train"


def test_the_makefile_has_the_declared_targets_and_no_others(root: Path) -> None:
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    targets = [target for targets in declared_targets().values() for target in targets]
    assert len(set(targets)) == len(targets)
    assert stage_targets(makefile) == set(targets)
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony is not None and set(targets) <= set(phony.group(1).split())


def test_a_target_runs_a_section_of_the_stage_that_declares_it(root: Path) -> None:
    """In the recipe that the Makefile takes by default, or in the one that the target's help names."""
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    for stage, targets in declared_targets().items():
        for target in targets:
            run = re.search(rf"^{target}:([^\n]*)\n\t\$\(RUN\) --to (\w+)$", makefile, re.MULTILINE)
            assert run is not None, target
            named = re.search(r"recipes/\w+\.yaml", run.group(1))
            recipe = load_recipe(root / (named.group() if named else "recipes/tiny.yaml"))
            assert recipe.sections[run.group(2)].stage == stage, target


def test_the_readme_has_a_row_for_each_stage_with_its_targets(root: Path) -> None:
    text = (root / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\w, ]+) \| `stages/(\w+)` \|", text, re.MULTILINE)
    assert {stage: tuple(targets.split(", ")) for targets, stage in rows} == declared_targets()


@pytest.mark.parametrize("recipe", ["tiny", "real", "overoptimize", "rejection"])
def test_a_section_holds_models_that_it_starts_from_or_looks_at(root: Path, recipe: str) -> None:
    loaded = load_recipe(root / "recipes" / f"{recipe}.yaml")
    for section in loaded.sections.values():
        held = Registry().models(section.stage, section.config)
        read = {ref for role, ref in section.parents.items() if not role.startswith(DATA_ROLE)}
        parents = {*read, *section.soft_parents.values()}
        assert {model.parent for model in held} == parents, section.name
        assert any(model.trained for model in held) == ("train" in section.resolved), section.name


def test_the_models_of_ppo_and_of_grpo(root: Path) -> None:
    loaded = load_recipe(root / "recipes" / "tiny.yaml")
    ppo, grpo = loaded.sections["ppo"], loaded.sections["grpo"]
    assert Registry().models(ppo.stage, ppo.config) == [
        HeldModel("policy", "sft", trained=True),
        HeldModel("reference", "sft"),
        HeldModel("critic", "reward", trained=True),
        HeldModel("reward", "reward"),
    ]
    assert [model.role for model in Registry().models(grpo.stage, grpo.config)] == ["policy", "reference"]


def test_a_critic_without_a_reward_model_comes_from_the_policy(root: Path) -> None:
    overrides = ["ppo.reward=[{function: world_gold}]"]
    section = load_recipe(root / "recipes" / "tiny.yaml", overrides).sections["ppo"]
    critic = next(model for model in Registry().models(section.stage, section.config) if model.role == "critic")
    assert (critic.parent, str(critic)) == ("sft", "critic from sft (trained, the policy's body, a new head)")


def test_a_stage_that_is_unknown_here_has_its_name_alone() -> None:
    assert Registry().declaration("distil") == Declaration("distil")
