"""The registry of estimators, their options, what they may return, plug-ins, batches, and what importing costs."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import openrlhf_pgrpo
from openrlhf_pgrpo.core import estimator
from openrlhf_pgrpo.core.estimator import (
    AdvantageEstimator,
    NoOptions,
    RewardBatch,
    advantage_estimators,
    estimate,
    load_plugin,
    make_advantage_estimator,
    namespace_of,
    option_classes,
    register_advantage_estimator,
)

pytestmark = pytest.mark.core


@pytest.fixture(autouse=True)
def own_names(monkeypatch):
    """Removes after each test what it registered or imported."""
    monkeypatch.setattr(estimator, "_estimators", {})
    monkeypatch.setattr(estimator, "_option_classes", {})
    monkeypatch.setattr(sys, "modules", sys.modules.copy())


# --- names ---------------------------------------------------------------------------------------------------------


def test_a_registered_class_is_made_by_name_with_its_options():
    @register_advantage_estimator("mine")
    class Mine(AdvantageEstimator):
        pass

    assert advantage_estimators() == {"mine": Mine}
    mine = make_advantage_estimator("mine", "options")
    assert type(mine) is Mine and mine.options == "options"


def test_what_advantage_estimators_returns_is_a_copy():
    advantage_estimators()["mine"] = AdvantageEstimator
    assert advantage_estimators() == {}


def estimator_class(module, qualname):
    return type("Mine", (AdvantageEstimator,), {"__module__": module, "__qualname__": qualname})


def test_the_same_class_again_is_fine_and_the_newer_one_counts():
    register_advantage_estimator("mine")(estimator_class("plug", "Mine"))
    again = register_advantage_estimator("mine")(estimator_class("plug", "Mine"))  # the module was imported anew
    assert advantage_estimators() == {"mine": again}


@pytest.mark.parametrize("module, qualname", [("plug", "Other"), ("other", "Mine")])
def test_two_classes_of_one_name_are_refused_and_the_first_stays(module, qualname):
    first = register_advantage_estimator("mine")(estimator_class("plug", "Mine"))
    with pytest.raises(ValueError, match=f"'mine' needs one owner, got plug.Mine and {module}.{qualname}: rename"):
        register_advantage_estimator("mine")(estimator_class(module, qualname))
    assert advantage_estimators() == {"mine": first}


def test_an_unknown_name_lists_what_exists():
    for name in ("b", "a"):
        register_advantage_estimator(name)(AdvantageEstimator)
    with pytest.raises(ValueError, match=r"needs one of \['a', 'b'\], got 'c'"):
        make_advantage_estimator("c", None)


def test_an_estimator_without_memory_saves_nothing_and_refuses_a_state():
    plain = AdvantageEstimator(options=None)
    plain.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match=r"AdvantageEstimator keeps no state, got keys \['history'\]"):
        plain.load_state_dict({"history": {}})


# --- options -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Level:
    level: float = 0.5  # a plain field is an option too


def test_an_estimator_brings_its_own_options():
    @register_advantage_estimator("mine", options=Level)
    class Mine(AdvantageEstimator):
        pass

    assert Mine.options_class is Level
    assert option_classes() == {"mine": Level} and namespace_of(Level) == "mine"
    assert make_advantage_estimator("mine").options == Level()
    assert make_advantage_estimator("mine", Level(0.9)).options.level == 0.9


def test_an_estimator_without_options_has_none():
    @register_advantage_estimator("plain-one")  # so any name will do
    class Plain(AdvantageEstimator):
        pass

    assert Plain.options_class is NoOptions and make_advantage_estimator("plain-one").options == NoOptions()
    assert option_classes() == {} and namespace_of(NoOptions) is None


def test_options_are_inherited_under_the_name_that_was_first():
    @register_advantage_estimator("first", options=Level)
    class First(AdvantageEstimator):
        pass

    @register_advantage_estimator("second-one")
    class Second(First):
        pass

    @register_advantage_estimator("third", options=Level)
    class Third(AdvantageEstimator):
        pass

    assert option_classes() == {"first": Level}
    assert Second.options_class is Third.options_class is Level and namespace_of(Level) == "first"


def test_a_subclass_may_have_options_of_its_own():
    @dataclass(frozen=True)
    class More(Level):
        more: int = 1

    @register_advantage_estimator("first", options=Level)
    class First(AdvantageEstimator):
        pass

    @register_advantage_estimator("second", options=More)
    class Second(First):
        pass

    assert First.options_class is Level and Second.options_class is More
    assert option_classes() == {"first": Level, "second": More}


def test_options_of_a_module_imported_anew_replace_the_old_ones():
    def options_class():
        return dataclass(type("Options", (), {"__module__": "plug", "__qualname__": "Options"}))

    old, new = options_class(), options_class()
    register_advantage_estimator("mine", options=old)(estimator_class("plug", "Mine"))
    register_advantage_estimator("other", options=new)(estimator_class("plug", "Other"))
    assert option_classes() == {"mine": new} and namespace_of(old) == namespace_of(new) == "mine"
    register_advantage_estimator("mine", options=new)(estimator_class("plug", "Mine"))
    assert option_classes() == {"mine": new} and type(make_advantage_estimator("mine").options) is new


@pytest.mark.parametrize("options", [dict, Level(), "level"])
def test_options_that_are_no_dataclass_are_refused(options):
    with pytest.raises(ValueError, match="'mine' needs a dataclass as options, got"):
        register_advantage_estimator("mine", options=options)(AdvantageEstimator)
    assert advantage_estimators() == option_classes() == {}


@pytest.mark.parametrize("name", ["my-estimator", "my.estimator", "2nd", "my estimator"])
def test_a_name_that_is_no_namespace_is_refused_if_there_are_options(name):
    with pytest.raises(
        ValueError, match=f"'{name}' has options, so it needs a name of letters, digits and underscores"
    ):
        register_advantage_estimator(name, options=Level)(AdvantageEstimator)
    assert advantage_estimators() == option_classes() == {}


def test_the_estimators_of_this_package_share_one_namespace():
    code = (
        "from openrlhf_pgrpo.core import controls, pgrpo, pgrpo_eb\n"
        "from openrlhf_pgrpo.core.estimator import advantage_estimators, option_classes\n"
        "print(*advantage_estimators(), *option_classes(), {e.options_class for e in advantage_estimators().values()})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[:5] == ["pgrpo", "pgrpo_global", "pref_group_norm", "pgrpo_eb", "pgrpo"]
    assert done.stdout.split()[5:] == ["{<class", "'openrlhf_pgrpo.core.pgrpo.PGRPOOptions'>}"]


# --- what an estimator may return ----------------------------------------------------------------------------------

BATCH = RewardBatch([1, 2, 9], [0, 0, 1], ["a", "a", "b"], [None] * 3, [None] * 3)


def returning(value):
    class Fixed(AdvantageEstimator):
        def __call__(self, batch):
            return value

    return Fixed(NoOptions())


@pytest.mark.parametrize("value", [[1, 2, 3], (1.0, 2.0, 3.0), np.array([1, 2, 3], np.float32), np.arange(1, 4)])
def test_one_finite_number_per_sample_is_fine_in_any_form(value):
    found = estimate("mine", returning(value), BATCH)
    assert found.dtype == np.float64 and found.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    "value, got",
    [
        (np.zeros((3, 1)), "got shape (3, 1)"),
        (np.zeros(4), "got shape (4,)"),
        (np.zeros(2), "got shape (2,), none for sample 2 of preference group 'b'"),
        (0.0, "got shape ()"),
        ([0, np.nan, np.inf], "got nan for sample 1 of preference group 'a' (2 of 3 samples)"),
        ([0, 1, -np.inf], "got -inf for sample 2 of preference group 'b' (1 of 3 samples)"),
        (None, "got None"),  # an estimator without `return`
        (["a", "b", "c"], "got list of <U1"),
        ([[0], [1, 2], 3], "got list: setting an array element with a sequence"),
        ({"a": 1}, "got dict of object"),
    ],
)
def test_anything_else_is_refused_with_estimator_sample_and_shape(value, got):
    with pytest.raises(ValueError) as error:
        estimate("mine", returning(value), BATCH)
    need = "advantage estimator 'mine' needs to return one finite number per sample, shape (3,), "
    assert str(error.value).startswith(need + got)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda batch: batch.rewards.__isub__(1.0),
        lambda batch: batch.rewards.sort(),
        lambda batch: batch.rewards.__setitem__(0, 5.0),
        lambda batch: np.clip(batch.rewards, 0, 1, out=batch.rewards),
        lambda batch: batch.prompt_groups.fill(0),
        lambda batch: batch.pref_group_codes.fill(0),
    ],
)
def test_d18_an_estimator_cannot_change_the_rewards_that_others_read(spoil):
    class Spoiling(AdvantageEstimator):
        def __call__(self, batch):
            spoil(batch)
            return batch.rewards

    rewards = np.array([1.0, 2.0, 3.0])
    batch = RewardBatch(rewards, np.arange(3), list("aab"), [None] * 3, [None] * 3)
    with pytest.raises(
        ValueError, match="estimator 'mine' needs to leave the batch as it is, got .*read-only: let it"
    ):
        estimate("mine", Spoiling(NoOptions()), batch)
    assert rewards.tolist() == [1, 2, 3]
    rewards += 1  # the array of the caller is still the caller's


def test_an_error_inside_an_estimator_passes_through():
    class Broken(AdvantageEstimator):
        def __call__(self, batch):
            raise TypeError("my own")

    with pytest.raises(TypeError, match="my own"):
        estimate("mine", Broken(NoOptions()), BATCH)


# --- plug-ins ------------------------------------------------------------------------------------------------------

PLUGIN = """
import numpy as np
from openrlhf_pgrpo import AdvantageEstimator, register_advantage_estimator

@register_advantage_estimator("median_baseline")
class MedianBaseline(AdvantageEstimator):
    def __call__(self, batch):
        return batch.rewards - np.median(batch.rewards)
"""


def write(path, text=PLUGIN):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def test_a_plugin_file_registers_its_estimator_also_twice(tmp_path):
    plugin = write(tmp_path / "my plugin.py")
    for _ in range(2):
        load_plugin(plugin)
    batch = RewardBatch([1, 2, 9], [0, 0, 0], "aaa", [None] * 3, [None] * 3)
    assert list(make_advantage_estimator("median_baseline")(batch)) == [-1, 0, 7]


def test_a_plugin_may_be_a_dotted_module(tmp_path, monkeypatch):
    write(tmp_path / "my_package" / "__init__.py", "")
    write(tmp_path / "my_package" / "plugin.py")
    monkeypatch.syspath_prepend(tmp_path)
    load_plugin("my_package.plugin")
    assert list(advantage_estimators()) == ["median_baseline"]


def test_two_files_of_one_name_do_not_replace_each_other(tmp_path):
    load_plugin(write(tmp_path / "mine" / "plugin.py"))
    with pytest.raises(ValueError, match="'median_baseline' needs one owner"):
        load_plugin(write(tmp_path / "yours" / "plugin.py"))


def test_a_missing_plugin_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="needs an existing file, got .*nowhere.py"):
        load_plugin(str(tmp_path / "nowhere.py"))


@pytest.mark.parametrize("plugin", ["no_such_module", "no_such_package.module", "./mine", "openrlhf_pgrpo.no_such"])
def test_a_missing_plugin_module_is_named(plugin):
    with pytest.raises(ValueError) as error:
        load_plugin(plugin)
    assert f"a plugin needs a .py file or an importable module, got {plugin!r}" in str(error.value)


@pytest.mark.parametrize("text, error", [("1 / 0", ZeroDivisionError), ("import no_such_thing", ModuleNotFoundError)])
@pytest.mark.parametrize("how", ["file", "module", "package"])
def test_an_error_inside_a_plugin_passes_through(tmp_path, monkeypatch, how, text, error):
    monkeypatch.syspath_prepend(tmp_path)
    file = write(tmp_path / "broken_plugin.py", text)
    write(tmp_path / "broken_package" / "__init__.py", text)
    write(tmp_path / "broken_package" / "plugin.py")
    with pytest.raises(error):
        load_plugin({"file": file, "module": "broken_plugin", "package": "broken_package.plugin"}[how])


# --- reward batches ------------------------------------------------------------------------------------------------


def test_a_reward_batch_is_float64_and_int64():
    batch = RewardBatch([1, 2], np.array([0, 1], np.int32), ["a", "b"], [None] * 2, [None] * 2)
    assert (batch.rewards.dtype, batch.prompt_groups.dtype) == (np.float64, np.int64)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_reward_that_is_no_number_names_sample_and_preference_group(bad):
    with pytest.raises(ValueError, match=rf"got {bad} for sample 1 of preference group 'b' \(2 of 3 samples\)"):
        RewardBatch([1, bad, bad], [0, 1, 2], ["a", "b", "c"], [None] * 3, [None] * 3)


@pytest.mark.parametrize("field", ["rewards", "prompt_groups", "pref_groups", "users", "labels"])
def test_fields_of_unequal_length_are_refused_with_their_lengths(field):
    fields = dict(rewards=[1, 2], prompt_groups=[0, 0], pref_groups=["a"] * 2, users=[None] * 2, labels=["x"] * 2)
    with pytest.raises(ValueError, match=rf"one entry per sample in every field, got .*'{field}': 1"):
        RewardBatch(**{**fields, field: fields[field][:1]})


def test_a_prompt_group_of_two_preference_groups_is_refused_with_both_named():
    with pytest.raises(ValueError, match=r"got 'a' and 'b' in prompt group 7 \(sample 2\)"):
        RewardBatch([1, 2, 3, 4], [7, 0, 7, 0], ["a", "b", "b", "b"], [None] * 4, [None] * 4)


def test_a_matrix_of_rewards_is_refused():
    with pytest.raises(ValueError, match="one entry per sample"):
        RewardBatch([[1, 2], [3, 4]], [0, 1], ["a", "b"], [None] * 2, [None] * 2)


# --- imports -------------------------------------------------------------------------------------------------------

HEAVY = {"ray", "openrlhf", "vllm", "deepspeed", "transformers", "torch"}


def fresh_import(statement, stubs):
    """(top-level modules, CPU seconds) after `statement` in a fresh interpreter.

    Empty stand-ins for the heavy modules come first on its path: so an import that hides behind `try` is seen also
    where they are not installed.
    """
    for name in HEAVY:
        write(stubs / f"{name}.py", "")
    root = Path(openrlhf_pgrpo.__file__).parents[1]
    code = f"import sys, time; t = time.process_time(); {statement}; print(time.process_time() - t, *sys.modules)"
    environment = {**os.environ, "PYTHONPATH": f"{stubs}{os.pathsep}{root}", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    seconds, *modules = done.stdout.split()
    return {name.split(".")[0] for name in modules}, float(seconds)


CORE = sorted(path.stem for path in Path(estimator.__file__).parent.glob("[a-z]*.py"))


@pytest.mark.parametrize(
    "statement", ["import openrlhf_pgrpo", *(f"import openrlhf_pgrpo.core.{name}" for name in CORE)]
)
def test_importing_is_light(statement, tmp_path):
    modules, seconds = fresh_import(statement, tmp_path)
    assert "openrlhf_pgrpo" in modules
    assert not modules & HEAVY
    assert seconds < 1.5


def test_the_package_alone_loads_not_even_numpy(tmp_path):
    assert "numpy" not in fresh_import("import openrlhf_pgrpo; dir(openrlhf_pgrpo)", tmp_path)[0]


@pytest.mark.parametrize("name", openrlhf_pgrpo.__all__)
def test_a_public_name_loads_neither_torch_nor_ray_nor_the_host(name, tmp_path):
    modules, _ = fresh_import(f"from openrlhf_pgrpo import {name}", tmp_path)
    assert not modules & HEAVY
    assert name in dir(openrlhf_pgrpo) and getattr(openrlhf_pgrpo, name).__name__ == name


def test_a_name_that_is_not_public_is_refused():
    with pytest.raises(AttributeError, match="'openrlhf_pgrpo' has no attribute 'PGRPOO'"):
        openrlhf_pgrpo.PGRPOO  # noqa: B018
    with pytest.raises(ImportError):
        from openrlhf_pgrpo import no_such_name  # noqa: F401


def test_the_test_above_would_see_a_heavy_import(tmp_path):
    write(tmp_path / "guarded.py", "try:\n    import ray.util\nexcept ImportError:\n    pass")
    assert fresh_import("import guarded", tmp_path)[0] & HEAVY == {"ray"}
    assert fresh_import("sum(range(10_000_000))", tmp_path)[1] > 0.05


# --- words ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CORE)
def test_core_names_no_flag(name):
    text = (Path(estimator.__file__).parent / f"{name}.py").read_text(encoding="utf-8")
    assert re.findall(r"--\w+[.\w]*", text) == []


def test_options_belong_to_a_name_and_not_to_a_class():
    @dataclass(frozen=True)
    class One:
        a: int = 1

    @dataclass(frozen=True)
    class Other:
        b: int = 2

    class Mine(AdvantageEstimator):
        pass

    register_advantage_estimator("mine", options=One)(Mine)
    register_advantage_estimator("other", options=Other)(Mine)
    assert make_advantage_estimator("mine").options == One()
    assert make_advantage_estimator("other").options == Other()


@pytest.mark.parametrize("returned", [["1", "2"], None])
def test_an_estimator_returns_numbers(returned):
    batch = RewardBatch(np.zeros(2), np.zeros(2), ["a", "a"], [None, None], ["", ""])
    with pytest.raises(ValueError, match="advantage estimator 'mine' needs to return one finite number per sample"):
        estimate("mine", lambda batch: returned, batch)
