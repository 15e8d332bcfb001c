"""Grids: which cells they have, what names a cell, and everything that is wrong with one at once."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Features

from unpoison.attacks.triggers import PAIR_TRIGGERS, TRIGGERS
from unpoison.benchmark import contents
from unpoison.benchmark.grid import Grid, make_grid, read_grid
from unpoison.benchmark.settings import GIVEN, class_number
from unpoison.catalog import DEFENSES, resolve
from unpoison.data.shapes import SHAPES_CLASSES, make_shapes
from unpoison.defenses.cgd import CGDConfig
from unpoison.errors import ConfigError, GridError, LabelRangeError

GRIDS = Path(__file__).parents[2] / "grids"


def problems_of(tables: dict[str, Any]) -> list[str]:
    with pytest.raises(GridError) as caught:
        make_grid(tables, name="g", path="g.toml")
    assert caught.value.hint
    return list(caught.value.problems)


def test_a_grid_is_a_product_with_every_victim_as_given(grid: Grid) -> None:
    names = [(cell.names.attack, cell.names.method, cell.names.seed) for cell in grid.cells]
    assert len(names) == len(set(names)) == 2 * 3 * 2
    assert {cell.names.rate for cell in grid.cells if cell.names.attack == "clean"} == {0.0}
    keys = [cell.key for cell in grid.cells]
    for place, cell in enumerate(grid.cells):
        assert keys.index(cell.given().key) <= place
        assert cell.given().is_given


def test_the_control_and_victims_that_two_products_share_are_one_cell(tables: dict[str, Any]) -> None:
    once = make_grid(tables, name="g", path="g.toml")
    tables["cells"].append(tables["cells"][0] | {"rate": [0.1, 0.2], "method": ["none", "nad"]})
    twice = make_grid(tables, name="g", path="g.toml")
    assert [cell.key for cell in once.cells] == [cell.key for cell in twice.cells][: len(once.cells)]
    assert len(twice.cells) == len({cell.key for cell in twice.cells}) == 12 + 2 + 2 * 1 + 2 * 2


def test_other_defaults_of_a_method_make_other_cells(
    grid: Grid, tables: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Raised(CGDConfig):
        alpha: float = 0.9

    assert contents.method_defaults("cgd", published=False) != contents.method_defaults("cgd", published=True)
    with monkeypatch.context() as patch:
        patch.setattr(contents, "resolve", lambda path: Raised if path.endswith(":CGDConfig") else resolve(path))
        contents.method_defaults.cache_clear()
        try:
            other = make_grid(tables, name="g", path="g.toml")
        finally:
            contents.method_defaults.cache_clear()
    changed = {new.names.method for new, old in zip(other.cells, grid.cells, strict=True) if new.key != old.key}
    assert changed == {"cgd"}


def test_the_hash_is_of_all_inputs_and_of_nothing_else(grid: Grid, tables: dict[str, Any], tmp_path: Path) -> None:
    cell = grid.cells[-1]
    assert len(cell.key) == 16
    assert replace(cell, limits=replace(cell.limits, seconds=1.0)).key == cell.key
    assert replace(cell, least_asr=10.0).key != cell.key
    assert replace(cell, names=replace(cell.names, seed=7)).key != cell.key
    assert replace(cell, model=replace(cell.model, epochs=9)).key != cell.key
    assert "also" not in cell.inputs["attack"]
    other = make_grid(tables | {"description": "Said otherwise."}, name="h", path="h.toml")
    assert [found.key for found in other.cells] == [found.key for found in grid.cells]
    file = tmp_path / "test.parquet"
    keys = []
    for content in (b"a", b"b"):
        file.write_bytes(content)
        tables["data"]["shapes"]["test"] = f"{file}[0:10]"
        keys.append(make_grid(tables, name="g", path="g.toml").cells[0].key)
    assert keys[0] != keys[1]


def test_a_precision_makes_other_cells_but_the_one_that_came_first(tables: dict[str, Any]) -> None:
    names = {}
    for precision in ("no", "bf16", "fp16"):
        made = make_grid(tables | {"precision": precision}, name="g", path="g.toml")
        assert {cell.precision for cell in made.cells} == {precision}
        names[precision] = [cell.key for cell in made.cells]
        assert all(("precision" in cell.inputs) == (precision != "bf16") for cell in made.cells)
    assert len(set(names["no"] + names["bf16"] + names["fp16"])) == 3 * len(names["no"])
    assert [cell.key for cell in make_grid(tables, name="g", path="g.toml").cells] == names["no"]
    assert "precision must be one of no, bf16, fp16, got 'half'." in problems_of(tables | {"precision": "half"})


def test_all_that_is_wrong_is_said_at_once(tables: dict[str, Any]) -> None:
    tables["colour"] = 1
    tables["least_asr"] = 101
    tables["limits"] = {"second": 3}
    tables["data"]["shapes"]["tests"] = "x"
    tables["model"]["net"]["epochs"] = 0
    tables["attack"] = {"mine": {"trigger": "badnit"}, "other": {"trigger": "blended", "params": {"alpa": 0.1}}}
    tables["method"] = {"mine": {"method": "cgd", "config": {"betta": 1}}}
    tables["cells"][0] |= {"attack": ["badnte"], "method": ["cdg"], "rate": [2.0], "seed": [-1], "model": ["nett"]}
    found = "\n".join(problems_of(tables))
    for sentence in (
        "there is no key 'colour'",
        "least_asr must be a number from 0 to 100, got 101",
        "[limits]: there is no key 'second'. Did you mean 'seconds'?",
        "[data.shapes]: there is no key 'tests'. Did you mean 'test'?",
        "[model.net]: epochs must be positive",
        "[attack.mine]: There is no attack named 'badnit'. Did you mean 'badnet'?",
        "[attack.other]: blended has no parameter 'alpa'. Did you mean 'alpha'?",
        "[method.mine]: config: there is no key 'betta'. Did you mean 'beta'?",
        "There is no attack named 'badnte'. Did you mean 'badnet'?",
        "There is no defense named 'cdg'. Did you mean 'cgd'?",
        "a rate must be in (0, 1], got 2.0",
        "a seed must be 0 or more, got -1",
        "there is no [model.nett]",
    ):
        assert sentence in found


def test_everything_that_is_wrong_with_a_table_is_said_and_nothing_that_follows_from_it(tables: dict[str, Any]) -> None:
    tables["model"]["net"] |= {"epochs": 0, "image_size": "x", "arch": "small-resnt", "scores": {"scorerz": 1}}
    tables["model"]["tiny"] = {"kind": "clipp", "victim": {"steps": 0, "bach": 1}, "gpus": -1.0}
    tables["data"]["shapes"] = {"tests": "shapes:100:1", "trian": "shapes:200:0", "target": "star"}
    part = {"trigger": "blended", "target": 1, "rate": 0.1}
    tables["attack"] = {
        "mine": {"trigger": "badnet", "colour": 1, "most_captions": 3},
        "two": {"also": [part | {"rate": 2.0}, part | {"rates": 1}, part], "trigger": "badnet"},
        "low-gap": {"params": {"alpa": 1}, "through_par": True, "prepare": {"rouns": 1, "share": 1}},
    }
    tables["method"] = {"ft": {"config": {"stepss": 1, "learning_rate": -1.0, "steps": "x"}}, "own": {"methd": "ft"}}
    tables["cells"][0] |= {"model": ["net", "tiny"], "attack": ["mine", "two", "low-gap"], "method": ["ft", "own"]}
    tables["cells"].append({"data": ["shapes"], "model": 3, "attack": ["badnet"], "method": ["ft"], "sead": [1]})
    wanted = {
        "[data.shapes]: there is no key 'tests'. Did you mean 'test'?",
        "[data.shapes]: there is no key 'trian'. Did you mean 'train'?",
        "[model.net]: epochs must be positive, got 0.",
        "[model.net]: Expected `int`, got `str` - at `$.image_size`.",
        "[model.net]: There is no architecture named 'small-resnt'. Did you mean 'small-resnet'?",
        "[model.net]: scores: there is no key 'scorerz'. Did you mean 'scorers'?",
        "[model.tiny]: Invalid enum value 'clipp' - at `$.kind`.",
        "[model.tiny]: gpus must be 0 or more, got -1.0.",
        "[model.tiny]: victim: there is no key 'bach'. Did you mean 'batch'?",
        "[attack.mine]: there is no key 'colour'.",
        "[attack.mine]: most_captions is for natural captions, not templates.",
        "[attack.two]: also 1: a rate must be in (0, 1], got 2.0.",
        "[attack.two]: also 2: there is no key 'rates'. Did you mean 'rate'?",
        "[attack.low-gap]: low-gap has no parameter 'alpa'.",
        "[attack.low-gap]: low-gap is not trained through PAR.",
        "[attack.low-gap]: prepare: there is no key 'rouns'. Did you mean 'rounds'?",
        "[attack.low-gap]: prepare: there is no key 'share'.",
        "[method.ft]: config: there is no key 'stepss'. Did you mean 'steps'?",
        "[method.own]: there is no key 'methd'. Did you mean 'method'?",
        "[[cells]] 2: there is no key 'sead'. Did you mean 'seed'?",
        "[[cells]] 2: Expected `array`, got `int` - at `$.model`.",
    }  # fmt: skip
    found = problems_of(tables)
    assert {sentence for sentence in wanted if not any(problem.startswith(sentence) for problem in found)} == set()
    others = [problem for problem in found if not any(problem.startswith(sentence) for sentence in wanted)]
    assert all(problem.startswith(("[method.ft]: config: ", "[model.tiny]: victim: expected")) for problem in others)
    assert any("learning_rate" in problem for problem in others)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"method": ["par"]}, "par needs suspicious CLIP, clean pairs, which the classifier net has not."),
        ({"model": ["tiny"]}, "cgd needs victim model, poisoned training set, which the CLIP tiny has not."),
        ({"attack": ["text-key"]}, "text-key needs image-caption pairs, which the classifier net has not."),
        ({"attack": ["clean-image"], "model": ["tiny"], "method": ["par"]}, "clean-image works on labels"),
        ({"attack": ["badclip"]}, "badclip is trained on a CLIP; net is none."),
        ({"attack": ["low-gap"], "model": ["tiny"], "method": ["par"]}, "low-gap is trained on a classifier"),
        ({"model": ["tiny"], "method": ["cbpt"]}, "cbpt needs clean labelled shots, which the CLIP tiny has not. Give"),
        ({"attack": ["near"], "model": ["tiny"], "method": ["par"]}, "select = 'boundary' is for a classifier"),
        ({"attack": ["input-aware"], "model": ["tiny"], "method": ["par"]}, "input-aware is trained on a classifier"),
    ],
)
def test_cells_that_cannot_be_are_refused(tables: dict[str, Any], change: dict[str, Any], sentence: str) -> None:
    tables["attack"] = {"near": {"trigger": "badnet", "select": "boundary"}}
    tables["cells"][0] |= change
    assert any(sentence in problem for problem in problems_of(tables))


def test_every_reason_why_a_cell_cannot_be_is_found_whatever_else_is_given(tables: dict[str, Any]) -> None:
    tables["attack"] = {
        "chosen": {"trigger": "low-gap", "mode": "all-to-one", "select": "boundary"},
        "labels": {"trigger": "badnet", "mode": "all-to-all"},
        "parts": {"trigger": "badnet", "also": [{"trigger": "clean-image", "target": "rings", "rate": 0.1}]},
        "key": {"trigger": "badnet", "also": [{"trigger": "text-key", "target": "rings", "rate": 0.1}]},
    }
    tables["cells"] = [
        {"data": ["shapes"], "model": ["tiny"], "attack": ["chosen", "labels", "parts"], "method": ["par"]},
        {"data": ["shapes"], "model": ["net"], "attack": ["key"], "method": ["ft"]},
    ]
    del tables["reported"]
    found = "\n".join(problems_of(tables))
    for sentence in (
        "chosen: select = 'boundary' is for a classifier, not tiny.",
        "chosen is trained on a classifier; tiny is none.",
        "labels has no mode 'all-to-all' on the CLIP tiny. It has: all-to-one",
        "parts: also: clean-image works on labels (clean-image); tiny is a CLIP",
        "key: also: text-key needs image-caption pairs, which the classifier net has not.",
    ):
        assert sentence in found


def test_shares_that_a_set_has_not_are_found(tables: dict[str, Any], tmp_path: Path) -> None:
    classes = Features({"label": ClassLabel(names=["cat", "dog"])})
    file = tmp_path / "train.parquet"
    labels = pa.array([0] * 30 + [1] * 60 + [0] * 10, pa.int64())
    pq.write_table(pa.table({"label": labels}, schema=classes.arrow_schema), file)
    tables["data"]["shapes"] |= {"train": f"{file}[0:90]", "test": str(file), "target": "cat"}
    further = {"trigger": "sig", "target": "dog", "rate": 0.7}
    tables["attack"] = {"two": {"trigger": "badnet", "also": [further]}, "sig": {}, "sig-dirty": {"trigger": "sig"}}
    tables["attack"]["sig-dirty"]["mode"] = "all-to-one"
    tables["cells"][0] |= {"attack": ["two", "sig", "sig-dirty", "clean"], "rate": [0.3, 0.34, 0.7], "method": ["ft"]}
    del tables["reported"]
    assert problems_of(tables) == [
        "[[cells]] 1: two: also 1 at a rate of 0.7 poisons 63 samples in the class 'dog', of 60 there.",
        "[[cells]] 1: two at a rate of 0.34 poisons 0.34 + 0.7 of the set, which is more than all of it.",
        "[[cells]] 1: two at a rate of 0.7 poisons 0.7 + 0.7 of the set, which is more than all of it.",
        "[[cells]] 1: two at a rate of 0.7 poisons 63 samples outside the class 'cat', of 60 there.",
        "[[cells]] 1: sig at a rate of 0.34 poisons 31 samples in the class 'cat', of 30 there.",
        "[[cells]] 1: sig at a rate of 0.7 poisons 63 samples in the class 'cat', of 30 there.",
        "[[cells]] 1: sig-dirty at a rate of 0.7 poisons 63 samples outside the class 'cat', of 60 there.",
    ]
    tables["data"]["shapes"] |= {"train": "shapes:1500:3", "target": "star"}
    tables["attack"]["two"]["also"][0] |= {"target": 1, "rate": 0.001}
    stars = int((make_shapes(1500, seed=3).labels == SHAPES_CLASSES.index("star")).sum())
    tables["cells"][0] |= {"rate": [stars / 1500]}
    assert make_grid(tables, name="g", path="g.toml").cells
    tables["cells"][0] |= {"rate": [(stars + 1) / 1500]}
    assert [text.partition(" poisons ")[2] for text in problems_of(tables)] == [
        f"{stars + 1} samples in the class 'star', of {stars} there."
    ]


def test_real_captions_are_not_made_up_from_templates(tables: dict[str, Any]) -> None:
    tables["attack"] = {
        "natural": {"trigger": "badnet", "captions": "natural"},
        "aligned": {"trigger": "badnet", "captions": "aligned", "select": "captions"},
        "plain": {"trigger": "badnet"},
    }
    tables["cells"][0] |= {"model": ["tiny"], "attack": ["natural", "aligned", "plain"], "method": ["par"]}
    del tables["reported"]
    assert problems_of(tables) == [
        f"[[cells]] 1: {name}: {said} needs real captions; give [data.shapes] captioned."
        for name, said in (
            ("natural", "captions = 'natural'"), ("aligned", "captions = 'aligned'"), ("aligned", "select = 'captions'")
        )
    ]  # fmt: skip
    tables["data"]["shapes"]["captioned"] = "shapes:100:2"
    assert make_grid(tables, name="g", path="g.toml").cells


def test_models_and_targets_that_are_none_are_named(tables: dict[str, Any], tmp_path: Path) -> None:
    classes = Features({"label": ClassLabel(names=["cat", "dog"])})
    file = tmp_path / "test.parquet"
    pq.write_table(pa.table({"label": pa.array([0, 1], pa.int64())}, schema=classes.arrow_schema), file)
    further = {"trigger": "badnet", "target": "ringz", "rate": 0.1}
    tables["attack"] = {"two": {"trigger": "badnet", "also": [further]}}
    tables["data"]["shapes"]["target"] = "starr"
    tables["data"]["animals"] = {"train": "shapes:200:0", "test": str(file), "target": 7}
    tables["model"]["net"] |= {"arch": "small-resnt", "clip": "tinny", "gpus": -1.0}
    tables["model"]["other"] = {"kind": "classifier", "arch": "small-resnt", "clip": "tinny"}
    tables["model"]["own"] = {"kind": "classifier", "arch": "no.such.module:net"}
    tables["cells"] = [
        {"data": ["shapes"], "model": ["other", "own"], "attack": ["two"], "method": ["ft"]},
        {"data": ["animals"], "model": ["tiny"], "attack": ["clean"], "method": ["par"]},
    ]
    del tables["reported"]
    found = "\n".join(problems_of(tables))
    for sentence in (
        "[data.shapes]: target: There is no class named 'starr'. Did you mean 'star'?",
        "[data.shapes]: also: badnet: There is no class named 'ringz'. Did you mean 'rings'?",
        "[data.animals]: target: target 7 is outside the 2 classes. Give a number from 0 to 1, or a name.",
        "[model.other]: There is no architecture named 'small-resnt'. Did you mean 'small-resnet'?",
        "[model.own]: --arch no.such.module:net: No module named",
        "[model.other] clip: there is no CLIP 'tinny'",
        "[model.net]: gpus must be 0 or more, got -1.0.",
    ):
        assert sentence in found


@pytest.mark.parametrize("target", [-1, 2])
def test_a_target_out_of_range_is_refused(target: int) -> None:
    assert class_number(1, ["cat", "dog"]) == class_number("dog", ["cat", "dog"])
    with pytest.raises(LabelRangeError, match="outside the 2 classes"):
        class_number(target, ["cat", "dog"])


def test_trainings_and_choices_that_no_trigger_has_are_refused(tables: dict[str, Any]) -> None:
    tables["attack"] = {
        "a": {"trigger": "badnet", "through_par": True},
        "b": {"trigger": "badnet", "prepare": {"epochs": 1}},
        "c": {"trigger": "badclip", "through_par": True, "prepare": {"epocs": 1}},
        "d": {"trigger": "badnet", "select": "nearest"},
        "e": {"trigger": "badnet", "also": [{"trigger": "badclip", "target": 1, "rate": 0.1}]},
        "f": {"trigger": "badnet", "also": [{"trigger": "blended", "target": 1, "rate": 1.1}]},
    }
    found = "\n".join(problems_of(tables))
    assert "[attack.a]: badnet is not trained through PAR." in found
    assert "[attack.b]: badnet is not trained beforehand." in found
    assert "[attack.c]: prepare: there is no key 'epocs'." in found
    assert "[attack.e]: also: badclip is trained beforehand." in found
    assert "[attack.f]: also 1: a rate must be in (0, 1], got 1.1." in found
    assert "[attack.d]: Invalid enum value 'nearest'" in found


def test_figures_of_papers_are_of_methods_and_attacks_of_the_grid(tables: dict[str, Any]) -> None:
    reported = {"method": "ft", "setting": "another net", "source": "a paper", "asr": {"badnet": 12.0}}
    tables["reported"] = [reported]
    assert make_grid(tables, name="g", path="g.toml").reported[0].asr == {"badnet": 12.0}
    tables["reported"] = [reported | {"asr": {"mean": 3.0}}]
    assert make_grid(tables, name="g", path="g.toml").reported[0].asr == {"mean": 3.0}
    tables["reported"] = [reported | {"asr": {"at-most": 1.0}}]
    assert make_grid(tables, name="g", path="g.toml").reported[0].asr == {"at-most": 1.0}
    tables["reported"] = [reported | {"c_acc": {"at-most": 1.0}}]
    assert problems_of(tables) == ["[[reported]] 1: 'at-most' is a bound on ASRs; c_acc has none."]
    tables["reported"] = [reported | {"method": "cgdd"}, reported | {"c_acc": {"badnte": 101.0}}, {"method": "ft"}]
    found = "\n".join(problems_of(tables))
    assert "[[reported]] 1: no cell has the method 'cgdd'. Did you mean 'cgd'?" in found
    assert "[[reported]] 2: no cell has the attack 'badnte'. Did you mean 'badnet'?" in found
    assert "[[reported]] 2: a rate is 0 to 100 percent, got 101." in found
    assert "[[reported]] 3:" in found
    tables["reported"] = {"method": "ft"}
    assert any("expected tables [[reported]]" in problem for problem in problems_of(tables))


def test_files_that_are_not_there_are_named(tables: dict[str, Any]) -> None:
    tables["data"]["shapes"] |= {"train": "nowhere/train.parquet[0:5]", "retrieval": "./gone"}
    tables["model"]["net"]["clip"] = "./no/clip"
    found = "\n".join(problems_of(tables))
    assert "[data.shapes] train: nowhere/train.parquet[0:5] is not there." in found
    assert "[data.shapes] retrieval: ./gone is not there." in found
    assert "[model.net] clip: ./no/clip is not there." in found


@pytest.mark.parametrize("cells", [None, [], "x"])
def test_a_grid_without_cells_is_refused(tables: dict[str, Any], cells: Any) -> None:
    tables["cells"] = cells
    assert any("there is no [[cells]]" in problem for problem in problems_of(tables))


def test_a_file_that_is_no_toml_is_refused(tmp_path: Path) -> None:
    (tmp_path / "g.toml").write_text("a = [")
    with pytest.raises(ConfigError, match="not TOML"):
        read_grid(tmp_path / "g.toml")


def test_the_quick_grid_holds() -> None:
    grid = read_grid(GRIDS / "quick.toml")
    assert {cell.model.kind for cell in grid.cells} == {"classifier", "clip"}
    assert not grid.not_run


@pytest.mark.parametrize("name", ["cpu", "paper"])
def test_the_other_grids_lack_nothing_but_data(name: str) -> None:
    tables = tomllib.loads((GRIDS / f"{name}.toml").read_text())
    for data in tables["data"].values():
        data |= {key: "shapes:100:0" for key in data if key != "target"} | {"target": 0}
    for part in (part for attack in tables["attack"].values() for part in attack.get("also", [])):
        part["target"] = 1
    for model in tables["model"].values():
        model |= {"model": "tiny", "clip": "tiny"}
    grid = make_grid(tables, name=name, path=f"{name}.toml")
    assert bool(grid.not_run) == (name == "paper")
    assert len({cell.names.attack for cell in grid.cells if cell.model.kind == "clip"}) >= 9
    assert len({cell.names.attack for cell in grid.cells if cell.model.kind == "classifier"}) >= 9
    wanted = {entry.name for entry in DEFENSES}
    assert wanted <= {cell.method.method for cell in grid.cells if cell.method is not None}
    more = [cell for cell in grid.cells if cell.names.seed > 2]
    searched = [cell for cell in more if cell.model.kind == "clip"]  # clean models, for the searches' false alarms
    assert all(cell.attack is None and cell.names.method in (GIVEN, "cbpt", "par") for cell in searched)
    assert {cell.names.attack for cell in more if cell not in searched} <= {"clean-image"}  # for victims too weak
    assert {cell.names.seed for cell in grid.cells if cell not in more} == {0, 1, 2}
    adaptive = {(cell.model.kind, cell.names.attack) for cell in grid.cells if cell.attack and cell.attack.adaptive}
    assert adaptive == {("classifier", "boundary"), ("classifier", "low-gap"), ("clip", "aligned"),
                        ("clip", "through-par"), ("clip", "feature-small")}  # fmt: skip
    if name == "paper":
        triggers = {cell.attack.trigger for cell in grid.cells if cell.attack is not None}
        assert triggers == {*TRIGGERS, *PAIR_TRIGGERS}
        assert {cell.names.rate for cell in grid.cells if cell.names.attack == "nashville"} == {0.001}
        badclip = [cell for cell in grid.cells if cell.names.attack == "badclip"]
        assert {cell.names.model for cell in badclip} == {"rn50-slow", "vit-b-32-slow"}
        for cell in badclip:
            assert cell.model.victim["learning_rate"] == 1e-6
            assert cell.attack is not None
            assert cell.attack.most_captions == 128


def test_the_number_of_captions_counts_where_it_is_given(tables: dict[str, Any]) -> None:
    def keys(attack: dict[str, Any]) -> list[str]:
        tables["attack"] = {"badnet": {"captions": "natural"} | attack}
        return [cell.key for cell in make_grid(tables, name="g", path="g.toml").cells]

    assert keys({}) == keys({}) != keys({"most_captions": 3})
    tables["attack"]["badnet"] = {"most_captions": 3}
    assert any("most_captions is for natural captions" in text for text in problems_of(tables))
    tables["attack"]["badnet"] = {"most_captions": 0, "captions": "natural"}
    assert any("most_captions must be 1 or more" in text for text in problems_of(tables))
