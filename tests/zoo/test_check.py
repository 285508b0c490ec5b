"""The checker of hyperparameter files."""

import inspect
import re
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import yaml
from entries import PLAIN

from sb3_dreamer_gpld import DreamerGPLD
from sb3_dreamer_gpld.zoo import arguments, check
from sb3_dreamer_gpld.zoo import main as zoo

SHIPPED = sorted(arguments.CONFIGS.glob("*.yml"))


def test_files_are_shipped() -> None:
    names = {path.name for path in SHIPPED}
    suffixes = ("gpld", "gpld_cpu", "gpld_metaworld", "gpld_pixels", "v3")
    assert names == {f"dreamer_{suffix}.yml" for suffix in suffixes}


@pytest.mark.parametrize("file", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_have_no_problem(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert zoo.main(["check", file.name]) == 0  # found by its name from anywhere
    assert "no problem found" in capsys.readouterr().out


@pytest.mark.parametrize("file", [path for path in SHIPPED if "metaworld" not in path.stem], ids=lambda path: path.stem)
def test_shipped_files_name_existing_environments(file: Path) -> None:
    pytest.importorskip("shimmy")
    pytest.importorskip("dm_control")
    entries = yaml.safe_load(file.read_text())
    assert set(entries) - {"default"} <= set(gym.registry)
    if "cpu" not in file.stem:
        assert len(entries) == 21


def test_plain_dreamer_differs_in_the_penalty_only() -> None:
    plain, penalised = (
        yaml.safe_load((arguments.CONFIGS / f"{name}.yml").read_text()) for name in ("dreamer_v3", "dreamer_gpld")
    )
    assert plain.keys() == penalised.keys()
    for name, entry in plain.items():
        assert entry["posterior_penalty"] == 0 and entry.get("prior_penalty", 0) == 0
        others = {key: value for key, value in penalised[name].items() if "penalty" not in key}
        assert {key: value for key, value in entry.items() if "penalty" not in key} == others


PAPER = {
    "model_size": "12m",
    "learning_rate": 4e-5,
    "learning_rate_warmup": 1000,
    "learning_starts": 1024,
    "batch_size": 16,
    "batch_length": 64,
    "train_ratio": 512,
    "imagination_horizon": 25,
    "posterior_penalty": 0.5,
    "penalty_fraction": 0.5,
    "penalty_schedule": "sqrt_time",
    "penalty_min": 0.001,
}


@pytest.mark.parametrize("name", ["dreamer_gpld", "dreamer_gpld_pixels"])
def test_every_task_has_the_setting_of_the_paper(name: str) -> None:
    wrappers = [{"sb3_dreamer_gpld.envs.ActionRepeat": {"repeat": 2}}]
    for task, entry in yaml.safe_load((arguments.CONFIGS / f"{name}.yml").read_text()).items():
        assert {key: entry[key] for key in PAPER} == PAPER, task
        given = set(inspect.signature(DreamerGPLD).parameters) & set(entry)
        assert given - {"policy", "buffer_size"} == set(PAPER), task  # what is not named keeps its default
        if task != "default" or name == "dreamer_gpld_pixels":
            assert entry["env_wrapper"][:1] == wrappers and entry["policy"] == "MultiInputPolicy", task
        if name == "dreamer_gpld_pixels":
            assert entry["env_wrapper"][1]["sb3_dreamer_gpld.envs.PixelObservation"]["size"] == [64, 64], task


METAWORLD = yaml.safe_load((arguments.CONFIGS / "dreamer_gpld_metaworld.yml").read_text())


def test_every_metaworld_task_has_the_published_setting() -> None:
    """That of R2-Dreamer's release for DreamerV3, and the GPLD paper's penalty."""
    assert len(METAWORLD) == 51
    for task, entry in METAWORLD.items():
        assert task == "default" or re.fullmatch(r"metaworld/[a-z-]+-v3", task)
        assert {key: entry[key] for key in PAPER} == {**PAPER, "imagination_horizon": 15}, task
        assert entry["env_wrapper"] == [{"sb3_dreamer_gpld.envs.ActionRepeat": {"repeat": 2}}], task
        assert entry["n_timesteps"] == 500_000, task


@pytest.mark.usefixtures("no_metaworld")
@pytest.mark.parametrize("task", sorted(set(METAWORLD) - {"default"}))
def test_metaworld_tasks_without_their_extra(task: str) -> None:
    with pytest.raises(SystemExit, match=r'Meta-World tasks need metaworld: pip install "sb3-dreamer-gpld\[metaworld\]"'):
        zoo.main(["train", "--env", task, "-conf", "dreamer_gpld_metaworld.yml"])


@pytest.mark.usefixtures("metaworld")
def test_names_of_metaworld_tasks_are_checked_where_it_is_installed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "bad.yml").write_text(yaml.safe_dump({"metaworld/raech-v3": PLAIN, "metaworld/reach-v3": PLAIN}))
    assert zoo.main(["check", "bad.yml"]) == 1
    problem = (
        "bad.yml, metaworld/raech-v3: the environment 'metaworld/raech-v3' does not exist. Did you mean 'metaworld/reach-v3'?"
    )
    assert capsys.readouterr().out.splitlines() == [problem]


@pytest.mark.parametrize(
    "entry, problem",
    [
        ({"batchsize": 16}, r"^batchsize: the key 'batchsize' does not exist\. Did you mean 'batch_size'\?$"),
        ({"penalty": 16}, r"^penalty: the key 'penalty' does not exist\. Did you mean"),
        ({"lr": 16}, r"^lr: the key 'lr' does not exist\. Allowed: actor_gradient, .*batch_length, batch_size"),
        ({"seed": 1}, r"^seed: this is set by --seed"),
        ({"batch_size": "16"}, r"^batch_size: .* not '16'"),
        ({"batch_size": 0}, r"^batch_size: .* not 0"),
        ({"ent_coef": "3e-4"}, r"^ent_coef: .*YAML reads 3e-4 as text: write 3\.0e-04"),
        ({"learning_rate": "3e-4"}, r"^learning_rate: .*YAML reads 3e-4 as text"),
        ({"learning_rate": "const_0.1"}, r"^learning_rate: .* not 'const_0.1'"),
        ({"learning_rate": -1.0}, r"^learning_rate: .* not -1.0"),
        ({"model_size": "12"}, r"^model_size: .* Did you mean '12m'\?"),
        ({"policy": "MlpPolicie"}, r"^policy: .* Did you mean 'MlpPolicy'\?"),
        ({"policy": "torch.nn.Linear"}, r"^policy: .* must derive from DreamerPolicy"),
        ({"n_timesteps": "1e6"}, r"^n_timesteps: .*write 1\.0e\+06"),
        ({"n_envs": 0}, r"^n_envs: "),
        ({"frame_stack": "4"}, r"^frame_stack: "),
        ({"train_freq": [1, "epsode"]}, r"^train_freq: "),
        ({"gradient_steps": 2.5}, r"^gradient_steps: "),
        ({"stats_window_size": "a"}, r"^stats_window_size: "),
        ({"penalty_random_rows": 1}, r"^penalty_random_rows: .* true or false"),
        ({"penalty_rows": 40}, r"^penalty_rows: .* at most 32"),
        ({"penalty_schedule": "sqrt"}, r"^penalty_schedule: .* Did you mean 'sqrt_time'\?"),
        ({"optimize_memory_usage": True}, r"^optimize_memory_usage: "),
        ({"policy_kwargs": "dict(units=3"}, r"^policy_kwargs: .* not a Python expression"),
        ({"policy_kwargs": "dict(unit=3)"}, r"^policy_kwargs, unit: .* Did you mean 'units'\?"),
        ({"policy_kwargs": {"units": "3e2"}}, r"^policy_kwargs, units: .* YAML reads 3e2 as text"),
        ({"policy_kwargs": {"deter": 36, "blocks": 5}}, r"policy_kwargs together: deter must be a multiple of blocks"),
        ({"policy_kwargs": [1]}, r"^policy_kwargs: "),
        ({"replay_buffer_class": "HerReplayBuffer"}, r"^replay_buffer_class: .*SequenceReplayBuffer"),
        ({"replay_buffer_kwargs": {"size": 1}}, r"^replay_buffer_kwargs: .*'size'"),
        ({"normalize": "dict(norm_ob=True)"}, r"^normalize: .* Did you mean 'norm_obs'\?"),
        ({"normalize": 1}, r"^normalize: "),
        ({"monitor_kwargs": {"info_keyword": []}}, r"^monitor_kwargs: .* Did you mean 'info_keywords'\?"),
        ({"env_kwargs": "g=1"}, r"^env_kwargs: "),
        ({"env_wrapper": "ActionRepeat"}, r"^env_wrapper: .* a class with its module"),
        ({"env_wrapper": "sb3_dreamer_gpld.env.ActionRepeat"}, r"^env_wrapper: .*No module named"),
        ({"env_wrapper": ["sb3_dreamer_gpld.envs.ActionRepet"]}, r"^env_wrapper: .* Did you mean 'ActionRepeat'\?"),
        ({"env_wrapper": [{"sb3_dreamer_gpld.envs.ActionRepeat": {"repet": 2}}]}, r"^env_wrapper: .* Did you mean 'repeat'\?"),
        ({"env_wrapper": [{"sb3_dreamer_gpld.envs.ActionRepeat": None}]}, r"^env_wrapper: the arguments of"),
        ({"env_wrapper": [{"sb3_dreamer_gpld.envs.ActionRepeat": {}, "repeat": 2}]}, r"^env_wrapper: .*indented"),
        ({"callback": [{"stable_baselines3.common.callbacks.CheckpointCallback": {"freq": 1}}]}, r"^callback: .*'freq'"),
        ({"noise_type": "normal"}, r"^noise_type: .*need each other"),
        ({"noise_type": "pink", "noise_std": 0.1}, r"^noise_type: .* not 'pink'"),
        ({"action_noise": 0.1}, r"^action_noise: this is set by noise_type"),
    ],
)
def test_names_the_mistake(entry: dict[str, Any], problem: str) -> None:
    (found,) = check.check_entry({**PLAIN, **entry})
    assert re.search(problem, found), found


def test_names_all_mistakes_of_an_entry() -> None:
    found = check.check_entry({"policy": "MlpPolicy", "gamma": 2, "train_ratio": "x", "batchsize": 1})
    assert [problem.split(":")[0] for problem in found] == ["batchsize", "n_timesteps", "gamma", "train_ratio"]
    found = check.check_entry({**PLAIN, "posterior_penalty": 5.0e-4, "penalty_min": 1.0e-4, "gamma": 2})
    assert [problem.split(":")[0] for problem in found] == ["gamma"]


@pytest.mark.parametrize(
    "entry",
    [
        {"ent_coef": "auto", "target_entropy": 6.0},  # which depends on the actions
        {"learning_rate": "lin_3e-4", "n_timesteps": 1e6, "n_envs": 4, "train_freq": 4, "gradient_steps": -1},
        {"train_freq": [1, "episode"], "n_envs": 1, "normalize": False, "frame_stack": 2},
        {"normalize": True, "monitor_kwargs": "dict(info_keywords=('a',))", "env_kwargs": {"g": 9.81}},
        {"normalize": "dict(norm_obs=True, norm_reward=False)", "noise_type": "normal", "noise_std": 0.1},
        {"policy_kwargs": "dict(net_arch=[16], optimizer_kwargs=dict(eps=1e-8))", "policy": "MultiInputPolicy"},
        {"policy_kwargs": {"deter": 36, "blocks": 4, "stoch": 40}, "penalty_rows": 40},
        {"policy": "sb3_dreamer_gpld.policies.DreamerPolicy", "penalty_schedule": {"name": "step", "interval": 10}},
        {"policy": "CnnPolicy", "policy_kwargs": {"normalize_images": False}},
        {"policy": "sb3_dreamer_gpld.policies.CnnPolicy"},
        {"policy": "sb3_dreamer_gpld.policies.MultiInputPolicy"},
        {"callback": ["stable_baselines3.common.callbacks.ProgressBarCallback"], "env_wrapper": None},
        {"env_wrapper": ["rl_zoo3.wrappers.HistoryWrapper", {"rl_zoo3.wrappers.ActionNoiseWrapper": {"noise_std": 0.1}}]},
        {"vec_env_wrapper": "stable_baselines3.common.vec_env.VecMonitor"},
        {"env_wrapper": "rl_zoo3.utils.flatten_dict_observations"},  # a function
    ],
)
def test_accepts_what_rl_zoo3_accepts(entry: dict[str, Any]) -> None:
    assert check.check_entry({**PLAIN, **entry}) == []


@pytest.mark.parametrize(
    "entry, problem",
    [
        ({"normalize": True, "frame_stack": 2}, "normalize: rl_zoo3 stacks frames around VecNormalize"),
        ({"n_envs": 2, "train_freq": [1, "episode"]}, "train_freq: episodes cannot be counted in n_envs=2 environments"),
    ],
)
def test_what_does_not_go_together(entry: dict[str, Any], problem: str) -> None:
    (found,) = check.check_entry({**PLAIN, **entry})
    assert found.startswith(problem)


def test_check_lists_the_problems_of_all_entries(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = {"Pendulum-v1": {**PLAIN, "gama": 1}, "CartPole-v1": 3, "dm_control/walker-wlk-v0": PLAIN}
    (folder / "bad.yml").write_text(yaml.safe_dump(entries))
    assert zoo.main(["check", "bad.yml", "dreamer_v3.yml"]) == 1
    out = capsys.readouterr().out
    assert "bad.yml, Pendulum-v1: gama: the key 'gama' does not exist. Did you mean 'gamma'?" in out
    assert "bad.yml, CartPole-v1: an entry is a list of 'key: value' lines, not 3" in out
    assert "dreamer_v3.yml: no problem found" in out
    if "dm_control/walker-walk-v0" in gym.registry:
        assert "Did you mean 'dm_control/walker-walk-v0'?" in out


@pytest.mark.parametrize("text, problem", [("a: [", "is not YAML"), ("- a", "must have an entry"), ("", "must have an entry")])
def test_check_refuses_other_files(folder: Path, capsys: pytest.CaptureFixture[str], text: str, problem: str) -> None:
    (folder / "bad.yml").write_text(text)
    assert zoo.main(["check", "bad.yml"]) == 1
    assert problem in capsys.readouterr().out
