"""Recipes: checked as a whole before anything runs; steps chain through artifacts."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from lookalike.commands.run import describe_step
from lookalike.errors import ArtifactError, UsageError
from lookalike.recipe import Recipe, run_steps

pytestmark = pytest.mark.usefixtures("toy_stages")


def plain(root: str = "runs/toy") -> dict[str, Any]:
    return {
        "name": "toy",
        "root": root,
        "seed": 5,
        "steps": {
            "one": {"stage": "toy-number", "settings": {"value": 1}},
            "two": {"stage": "toy-number", "settings": {"value": 2, "seed": 9}},
            "sum": {"stage": "toy-sum", "inputs": {"numbers": ["one", "two"]}},
        },
    }


def load(tmp_path: Path, values: Any, overrides: list[str] | None = None) -> Recipe:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return Recipe.load(str(file), overrides)


def test_steps_run_in_order_and_are_skipped_when_done(tmp_path: Path, root: str) -> None:
    recipe = load(tmp_path, plain(root))
    assert recipe.published("one") is None
    with pytest.raises(ArtifactError, match=r"step 'one' is not published .* run `lookalike toy-number RECIPE --step"):
        recipe.run_step("sum")
    made = [recipe.run_step(name) for name in recipe.steps]
    assert made[-1].read_json("sum.json") == 3
    fresh = load(tmp_path, plain(root))
    assert [fresh.run_step(name).manifest for name in fresh.steps] == [artifact.manifest for artifact in made]


def test_a_dry_run_tells_what_a_stage_says_before_it_runs(tmp_path: Path, root: str) -> None:
    recipe = load(tmp_path, plain(root))
    described = describe_step(recipe, "two")
    assert (described["state"], described["preview"]) == ("would run", ["two will be 2"])
    assert "preview" not in describe_step(recipe, "sum")  # its inputs are not there yet
    recipe.run_step("one")
    recipe.run_step("two")
    assert "preview" not in describe_step(recipe, "two")
    assert describe_step(recipe, "sum")["preview"] == []  # a stage that has nothing to say


def test_a_changed_setting_changes_its_step_and_those_after(tmp_path: Path, root: str) -> None:
    recipe = load(tmp_path, plain(root))
    before = {name: recipe.run_step(name).uri for name in recipe.steps}
    changed = load(tmp_path, plain(root), ["two.value=5"])
    after = {name: changed.run_step(name).uri for name in changed.steps}
    assert [name for name in before if before[name] != after[name]] == ["two", "sum"]
    assert changed.run_step("sum").read_json("sum.json") == 6


def test_seeds_are_inherited_unless_a_step_sets_its_own(tmp_path: Path) -> None:
    recipe = load(tmp_path, plain())
    assert [recipe.config(name).seed for name in recipe.steps] == [5, 9, 5]
    assert [load(tmp_path, plain(), ["seed=6"]).config(name).seed for name in ("one", "two")] == [6, 9]


def test_overrides_by_step_name_and_by_full_path(tmp_path: Path) -> None:
    recipe = load(tmp_path, plain(), ["one.value=7", "steps.two.settings.value=8", "name=other"])
    assert [recipe.config(name).model_dump()["value"] for name in ("one", "two")] == [7, 8]
    assert recipe.name == "other"


def test_a_relative_root_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load(tmp_path, plain("runs/toy")).root == str(tmp_path / "runs/toy")
    assert load(tmp_path, plain("memory://runs/toy")).root == "memory://runs/toy"


def test_an_input_may_be_an_artifact_published_elsewhere(tmp_path: Path) -> None:
    other = load(tmp_path, plain(str(tmp_path / "other"))).run_step("two")
    values = plain(str(tmp_path / "own"))
    values["steps"]["sum"]["inputs"]["numbers"] = ["one", other.uri]
    recipe = load(tmp_path, values)
    recipe.run_step("one")
    assert recipe.run_step("sum").read_json("sum.json") == 3


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("onee.value=3", r"override 'onee.value=3': no step 'onee' \(did you mean 'one'\?\); steps: one, two, sum"),
        ("root=zz://runs", r"'zz://runs' cannot be opened: Protocol not known: zz; give a local path"),
        ("sed=3", r"unknown key 'sed' \(did you mean 'seed'\?\)"),
        ("value=3", r"'value=3': unknown key 'value'; valid keys: .*; a setting of a step is STEP.value=value"),
        (
            "steps.sum.inputs={number: [one]}",
            r"step 'sum': stage 'toy-sum' has no input 'number' \(did you mean 'numbers'\?\); it takes numbers",
        ),
        ("steps.sum.inputs={}", "step 'sum': stage 'toy-sum' needs input 'numbers'"),
        (
            "steps.more={stage: toy-sum, inputs: {numbers: [one, sum]}}",
            "'number' as 'numbers', step 'sum' makes one of kind 'sum'",
        ),
        ("one.value", "override 'one.value' is not of the form key.sub=value"),
        ("steps.one.setings={}", r"unknown key 'steps.one.setings' \(did you mean 'settings'\?\); valid keys: inputs"),
        ("one.valu=3", r"step 'one': unknown key 'valu' \(did you mean 'value'\?\)"),
        ("one.value=-3", "step 'one': 'value' is -3: .* greater than or equal to 0"),
        ("steps.one.stage=toy-numbr", r"unknown stage 'toy-numbr' \(did you mean 'toy-number'\?\)"),
        (
            "steps.sum.inputs.numbers=[onee]",
            r"step 'sum' reads 'onee', which is not in this recipe \(did you mean 'one'\?\)",
        ),
        ("steps.one.inputs.numbers=two", "step 'one' reads 'two', which comes later; move it up"),
        ("seed=-1", "'seed' is -1"),
        ("steps=3", "'steps' is 3"),
    ],
)
def test_mistakes_are_found_before_anything_runs(tmp_path: Path, override: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load(tmp_path, plain(), [override])


@pytest.mark.parametrize("name", ["../one", "", "..", "a.b", "a/b"])
def test_a_step_s_name_stays_a_folder_under_the_root(tmp_path: Path, name: str) -> None:
    values = plain()
    values["steps"][name] = values["steps"].pop("one")
    with pytest.raises(UsageError, match=r"steps\..* should match pattern"):
        load(tmp_path, values)


def test_unknown_steps_and_stages_without_steps(tmp_path: Path) -> None:
    recipe = load(tmp_path, plain())
    assert recipe.steps_of("toy-number") == ["one", "two"]
    with pytest.raises(UsageError, match=r"no step 'on' \(did you mean 'one'\?\); steps: one, two, sum"):
        recipe.stage("on")
    with pytest.raises(UsageError, match=r"recipe 'toy' has no step of stage 'embed'; it has one, two, sum"):
        recipe.steps_of("embed")


@pytest.mark.parametrize(
    ("text", "words"),
    [("- a", "must hold a mapping .* it holds list"), ("a: [", "is not valid YAML"), ("", "holds NoneType")],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UsageError, match=words):
        Recipe.load(str(tmp_path / "bad.yaml"))


def test_a_recipe_without_steps_has_nothing_to_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="recipe 'toy' has no steps; add some"):
        run_steps(load(tmp_path, {**plain(), "steps": {}}))


def test_a_missing_recipe_is_explained(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot be read \(Is a directory\); give the path of a recipe"):
        Recipe.load(str(tmp_path))
    with pytest.raises(UsageError, match=r"no recipe at /no/such.yaml"):
        Recipe.load("/no/such.yaml")


def test_a_recipe_may_extend_another_and_say_only_what_differs(tmp_path: Path, root: str) -> None:
    (tmp_path / "full.yaml").write_text(yaml.safe_dump(plain(root), sort_keys=False))
    twin = {"extends": "full.yaml", "name": "twin", "steps": {"two": {"settings": {"value": 8}}}}
    recipe = load(tmp_path, twin, ["one.value=7"])
    assert (recipe.name, recipe.seed, list(recipe.steps)) == ("twin", 5, ["one", "two", "sum"])
    configs = [recipe.config(name).model_dump() for name in ("one", "two")]
    assert [(config["seed"], config["value"]) for config in configs] == [(5, 7), (9, 8)]
    twin["steps"] = {"sum": {"inputs": {"numbers": ["two"]}}}
    assert load(tmp_path, twin).steps["sum"].inputs == {"numbers": ["two"]}  # a list is taken whole


def test_recipes_that_extend_nothing_or_each_other_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no recipe at .*absent.yaml, which .*recipe.yaml extends"):
        load(tmp_path, {"extends": "absent.yaml"})
    with pytest.raises(UsageError, match=r"'extends' is \['a'\]; give the path of one recipe"):
        load(tmp_path, {"extends": ["a"]})
    for below in ("recipe.yaml", f"../{tmp_path.name}/recipe.yaml"):
        with pytest.raises(UsageError, match="recipes extend each other"):
            load(tmp_path, {"extends": below})
