"""Settings by name."""

import inspect
from typing import Any

import pytest
import yaml

from sb3_dreamer_gpld import DreamerGPLD, preset
from sb3_dreamer_gpld.presets import CONFIGS, PRESETS


@pytest.mark.parametrize(("name", "file"), PRESETS.items())
def test_a_preset_is_what_the_file_has_for_any_environment(name: str, file: str) -> None:
    entry = yaml.safe_load((CONFIGS / file).read_text())["default"]
    arguments = preset(name)
    assert set(arguments) == set(entry) - {"n_timesteps", "policy"}
    assert all(arguments[key] == entry[key] for key in arguments)
    assert set(arguments) <= set(inspect.signature(DreamerGPLD).parameters)


def test_an_environment_may_have_settings_of_its_own() -> None:
    entries = yaml.safe_load((CONFIGS / PRESETS["cpu"]).read_text())
    own = preset("cpu", "CartPole-v1")
    assert own["gamma"] == entries["CartPole-v1"]["gamma"] != preset("cpu")["gamma"]
    assert set(own) == set(preset("cpu"))
    assert preset("cpu", "Acrobot-v1") == preset("cpu", None) == preset("cpu")


@pytest.mark.parametrize("env", ["Pendulum-v1", "CartPole-v1"])
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_makes_an_agent(name: str, env: str) -> None:
    arguments = preset(name)
    model = DreamerGPLD("MlpPolicy", env, **{**arguments, "model_size": "debug"})
    for key, value in arguments.items():
        assert getattr(model, key) == value or key == "model_size"


def test_the_paper_s_settings() -> None:
    """Sonigra & Kumar 2026: size 12m, posterior penalty 0.5 with the floor 0.001, train ratio 512, horizon 25."""
    paper = preset("paper")
    assert (paper["model_size"], paper["train_ratio"], paper["imagination_horizon"]) == ("12m", 512, 25)
    assert (paper["posterior_penalty"], paper["penalty_min"], paper["penalty_schedule"]) == (0.5, 0.001, "sqrt_time")
    assert (paper["batch_size"], paper["batch_length"], paper["learning_rate"]) == (16, 64, 4e-5)


def test_a_preset_is_a_new_dict_each_time() -> None:
    changed: dict[str, Any] = preset("cpu")
    changed["gamma"] = 0.5
    changed.setdefault("policy_kwargs", {})["units"] = 1
    assert preset("cpu").get("gamma") != 0.5 and preset("cpu").get("policy_kwargs", {}).get("units") != 1


def test_single_values_of_a_preset_change() -> None:
    """Entries of a dict one by one; what the preset does not set is added."""
    whole = preset("cpu")
    changed = preset("cpu", gamma=0.5, model_size="12m", seed=3, policy_kwargs=dict(reconstruction_weight=30.0, units=32))
    kwargs = {**whole["policy_kwargs"], "reconstruction_weight": 30.0, "units": 32}
    assert whole["policy_kwargs"]["normalize_vectors"] and whole["policy_kwargs"]["reconstruction_weight"] != 30.0
    assert changed == {**whole, "gamma": 0.5, "model_size": "12m", "seed": 3, "policy_kwargs": kwargs}
    assert preset("cpu", policy_kwargs=None)["policy_kwargs"] is None
    with pytest.raises(TypeError, match="argument 'gama' does not exist. Did you mean 'gamma'"):
        preset("cpu", gama=0.5)


@pytest.mark.parametrize("name", ["gpu", "CPU", "", None])
def test_unknown_presets_are_refused(name: Any) -> None:
    with pytest.raises(ValueError, match="preset .* does not exist.*Allowed: cpu, paper"):
        preset(name)
