# SPDX-License-Identifier: Apache-2.0
"""Claims of the registry: a name is one thing, options are what the entry takes, and errors say what there is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_g2rpo import extend, registry
from megatron_g2rpo.registry import Registry

KINDS = {
    "answer_format": registry.answer_formats,
    "engine": registry.engines,
    "estimator": registry.estimators,
    "importer": registry.importers,
    "model_family": registry.model_families,
    "response_format": registry.response_formats,
    "reward_part": registry.reward_parts,
    "surrogate": registry.surrogates,
}


def test_every_door_is_in_extend() -> None:
    assert set(extend.__all__) == set(KINDS)
    for name, kind in KINDS.items():
        assert getattr(extend, name) == kind.register


def test_an_entry_knows_its_place_and_its_facts() -> None:
    kind: Registry = Registry("colour", facts=["wavelength"])

    @kind.register("red", wavelength=700)
    def red() -> None: ...

    entry = kind.entry("red")
    assert entry.value is red
    assert entry.facts == {"wavelength": 700}
    path, _, line = entry.place.rpartition(":")
    assert path == __file__
    assert Path(path).read_text().splitlines()[int(line) - 1].strip() == '@kind.register("red", wavelength=700)'


def test_a_name_registered_twice_names_both_places() -> None:
    kind: Registry = Registry("colour")
    kind.register("red")(print)
    with pytest.raises(ValueError, match=r"colour 'red' is registered twice: at .*:\d+ and at .*:\d+$") as error:
        kind.register("red")(repr)
    assert str(error.value).count(__file__) == 2
    assert kind.get("red") is print


def test_an_unknown_name_lists_the_known_ones_and_the_nearest() -> None:
    kind: Registry = Registry("colour")
    kind.register("red")(print)
    kind.register("green")(print)
    with pytest.raises(ValueError, match=r"^unknown colour 'gren' \(did you mean 'green'\?\); known: green, red$"):
        kind.get("gren")


def test_options_are_keyword_only_parameters_that_are_not_given() -> None:
    kind: Registry = Registry("colour", given=["light"])

    @kind.register("red")
    def red(x: int, *, light: float, depth: int = 3, name: str = "r") -> tuple[float, int, str]:
        return light, depth, name

    assert list(kind.options("red")) == ["depth", "name"]
    assert kind.takes("red", "light")
    assert not kind.takes("red", "x")
    assert kind.bind("red", light=0.5, depth=4)(1) == (0.5, 4, "r")
    with pytest.raises(ValueError, match=r"colour 'red' takes no option 'dept' \(did you mean 'depth'\?\); known: .*"):
        kind.bind("red", dept=4)


def test_a_module_on_demand_is_imported_when_its_name_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    kind: Registry = Registry("colour", on_demand={"blue": "a_heavy_module_of_blue"})
    monkeypatch.setattr(registry, "colours", kind, raising=False)
    source = "from megatron_g2rpo import registry\n@registry.colours.register('blue')\ndef blue(): return 'azure'\n"
    (tmp_path / "a_heavy_module_of_blue.py").write_text(source)
    assert kind.names() == ("blue",)
    assert "a_heavy_module_of_blue" not in sys.modules
    assert kind.get("blue")() == "azure"
    assert "a_heavy_module_of_blue" in sys.modules


def test_a_name_of_a_module_on_demand_is_taken_before_it_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    kind: Registry = Registry("colour", on_demand={"blue": "another_module_of_blue"})
    monkeypatch.setattr(registry, "colours", kind, raising=False)
    source = "from megatron_g2rpo import registry\n@registry.colours.register('blue')\ndef blue(): return 'azure'\n"
    (tmp_path / "another_module_of_blue.py").write_text(source)
    with pytest.raises(ValueError, match=r"'blue' is registered twice: at .*another_module_of_blue\.py:2 and at .*"):
        kind.register("blue")(print)


def test_the_doors_open_without_torch() -> None:
    """A user's file of rewards imports nothing heavy, and a name is looked up when it is needed."""
    check = "import sys, megatron_g2rpo.extend; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize("name", ["", "a.b", 3])
def test_a_name_that_no_recipe_could_write_is_refused(name: object) -> None:
    with pytest.raises(ValueError, match="a name is text without a dot"):
        Registry("colour").register(name)  # type: ignore[arg-type]


def test_a_name_made_on_demand_is_taken_even_if_its_package_is_missing() -> None:
    kind: Registry = Registry("colour", on_demand={"red": "no_such_package.red"})
    with pytest.raises(ValueError, match=r"'red' is registered twice: in no_such_package.red and at .*:\d+$"):
        kind.register("red")(print)


@pytest.mark.parametrize(
    ("kind", "name", "value", "message"),
    [
        (
            "reward_part",
            "one_argument",
            lambda response: 0.0,
            r"it takes \(response\), and must take \(sample, ",
        ),
        ("answer_format", "homeless", lambda answer, sample, *, scale: 0.0, "its parameter 'scale' needs a default"),
        ("estimator", "of_rewards", lambda rewards: rewards, r"it takes \(rewards\), and must take \(batch, history\)"),
        ("answer_format", "texts", lambda answer, reference, more: 1.0, r".* must take \(answer, sample\)"),
        ("response_format", "a_function", lambda text: text, "it has no 'instruction'"),
        ("engine", "an_object", object, "it has no 'build'"),
        ("surrogate", "short", lambda logprobs, advantages: logprobs, r".* must take \(logprobs, old_"),
    ],
)
def test_what_could_not_be_called_is_refused_where_it_is_registered(
    kind: str, name: str, value: object, message: str
) -> None:
    with pytest.raises(ValueError, match=rf"'{name}' at .*test_registry\.py:\d+: {message}"):
        getattr(extend, kind)(name)(value)
    assert name not in KINDS[kind]


def test_a_misspelt_fact_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown 'batch' \(did you mean 'batched'\?\); known: batched"):
        extend.reward_part("judge_of_all", batch=True)


def test_what_a_file_registered_before_it_failed_is_forgotten(tmp_path: Path) -> None:
    from megatron_g2rpo.recipe import RecipeError
    from megatron_g2rpo.recipe.imports import import_all

    path = tmp_path / "half.py"
    source = (
        "from megatron_g2rpo.extend import answer_format\n@answer_format('half')\ndef half(answer, sample): return 1\n"
    )
    path.write_text(source + "raise RuntimeError('no model')\n")
    for _ in range(2):  # the second says the same, not that the name is taken
        with pytest.raises(RecipeError, match="RuntimeError: no model"):
            import_all([str(path)], None)
    path.write_text(source + "import beside_it\nassert beside_it.HERE\n")
    (tmp_path / "beside_it.py").write_text("HERE = True\n")
    import_all([str(path)], None)
    assert "half" in registry.answer_formats


def test_what_an_entry_takes_is_that_of_the_entry_in_its_place() -> None:
    """Signatures are read once; not so long that a forgotten entry's is taken for its successor's."""
    kind: Registry = Registry("colour")

    def bright(*, light: float = 1.0) -> None: ...

    def dark(*, shade: float = 0.0) -> None: ...

    kind.register("red")(bright)
    assert kind.takes("red", "light")
    kind.forget(__file__)
    kind.register("red")(dark)
    assert not kind.takes("red", "light")
    assert list(kind.options("red")) == ["shade"]
