"""Saving: exact resume, files that are whole or not there, foreign and damaged files, warm starts."""

from __future__ import annotations

import copy
import inspect
import io
import os
import pickle
import resource
import signal
import subprocess
import sys
import textwrap
import warnings
import zipfile
from pathlib import Path
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from test_dreamer_gpld import tiny

from sb3_dreamer_gpld import DreamerGPLD, saving
from sb3_dreamer_gpld.parallel import Processes
from sb3_dreamer_gpld.resumable import share_of
from sb3_dreamer_gpld.saving import atomic_file, plain_to_space, space_to_plain

PATHS = [str(Path(__file__).parent), str(Path(__file__).parents[1])]  # for scripts in processes of their own
OWN: dict[str, Any] = dict(train_ratio=12, buffer_size=300)  # no whole number of updates a step, and a ring that wraps


class Clock(gym.Env):
    """A deterministic environment with episodes of 20 steps, whatever the seed."""

    observation_space = spaces.Box(-1.0, 1.0, (3,))

    def __init__(self, discrete: bool = False) -> None:
        self.action_space = spaces.Discrete(3) if discrete else spaces.Box(-1.0, 1.0, (2,))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        self.x, self.steps = np.zeros(3, dtype=np.float32), 0
        return self.x.copy(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.steps += 1
        self.x = np.clip(0.9 * self.x + 0.1 * np.sum(action) + np.linspace(-0.05, 0.05, 3), -1, 1).astype(np.float32)
        return self.x.copy(), float(self.x[0]), False, self.steps == 20, {}


def model(**kwargs: Any) -> DreamerGPLD:
    env = kwargs.pop("env", None) or Clock(kwargs.pop("discrete", False))
    return tiny(env, "MlpPolicy", **{**OWN, **kwargs})


def tensors(trained: DreamerGPLD) -> dict[str, th.Tensor]:
    """Every tensor that training goes on from."""
    state = dict(trained.policy.state_dict())
    for i, values in trained.policy.optimizer.state_dict()["state"].items():
        state.update({f"optimizer/{i}/{name}": value for name, value in values.items()})
    return state


def assert_same(a: DreamerGPLD, b: DreamerGPLD) -> None:
    one, other = tensors(a), tensors(b)
    assert one.keys() == other.keys()
    differing = [name for name in one if not th.equal(one[name], other[name])]
    assert not differing, differing
    assert (a.num_timesteps, a._n_updates, a.update_ratio.credit) == (b.num_timesteps, b._n_updates, b.update_ratio.credit)


# ------------------------------------------------------------------------------------------- exact resume


RESUME = """
import sys
import torch
torch.set_num_threads(1)
sys.path[:0] = {paths!r}
from test_saving import Clock, DreamerGPLD, DummyVecEnv
env = DummyVecEnv([lambda: Clock({discrete})] * {n_envs})
model = DreamerGPLD.load("model", env=env, device="cpu")
model.load_replay_buffer("buffer")
model.learn({steps}, reset_num_timesteps=False).save("resumed")
"""


@pytest.mark.parametrize(
    "n_envs, kwargs",
    [
        (1, {}),
        (1, {"discrete": True, "penalty_random_rows": True, "penalty_rows": 2, "penalty_schedule": "linear"}),
        (
            2,
            {
                "learning_rate": lambda progress: 1e-3 * progress,
                "learning_rate_warmup": 60,
                "policy_kwargs": {"normalize_vectors": True},
            },
        ),
        (1, {"policy_kwargs": {"reconstruction": "redundancy", "redundancy_weight": 0.1}, "prior_penalty": 0.3}),
        (1, {"penalty_start": 100, "penalty_schedule": "linear"}),
        (
            1,
            {
                "planner": {"samples": 8, "policy_samples": 2, "elites": 3, "iterations": 2},
                "plan_in_training": True,
                "policy_penalty": 0.01,
                "policy_kwargs": {"spectral_norm": ["actor", "critic", "posterior"]},
            },
        ),
    ],
)
def test_resume_in_a_new_process_is_exact(n_envs: int, kwargs: dict[str, Any], one_thread: None, tmp_path: Path) -> None:
    """A run that stops at an episode's end, in a ring that has wrapped, and one that does not stop."""
    if kwargs.get("penalty_schedule") == "linear":
        kwargs = {**kwargs, "penalty_schedule": {"name": "linear", "decay_steps": 100}}
    discrete = kwargs.pop("discrete", False)

    def start() -> DreamerGPLD:
        return model(env=DummyVecEnv([lambda: Clock(discrete)] * n_envs), **kwargs)

    first, second = 320 * n_envs, 40 * n_envs
    whole = start()
    whole.learn(first)
    whole.learn(second, reset_num_timesteps=False)
    stopped = start()
    stopped.learn(first)
    stopped.save(tmp_path / "model")
    stopped.save_replay_buffer(tmp_path / "buffer")
    script = RESUME.format(paths=PATHS, steps=second, n_envs=n_envs, discrete=discrete)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    resumed = DreamerGPLD.load(tmp_path / "resumed", device="cpu")
    assert_same(whole, resumed)
    assert resumed._n_updates > stopped._n_updates
    assert resumed.penalty.start == whole.penalty.start and (whole.penalty.start > 0) == ("penalty_start" in kwargs)


def test_saving_changes_nothing(tmp_path: Path) -> None:
    """A run that is saved on the way goes on as if it had not been, random numbers included."""
    plain = model()
    plain.learn(100)
    plain.learn(60, reset_num_timesteps=False)
    saved = model()
    saved.learn(100)
    saved.save(tmp_path / "model")
    saved.save_replay_buffer(tmp_path / "buffer")
    saved.policy.save(tmp_path / "policy")
    saved.learn(60, reset_num_timesteps=False)
    assert_same(plain, saved)


def test_resume_without_the_replay_buffer_warns_once(tmp_path: Path) -> None:
    model().learn(100).save(tmp_path / "model")
    loaded = DreamerGPLD.load(tmp_path / "model", env=Clock(), device="cpu")
    updates = loaded._n_updates
    with pytest.warns(
        UserWarning, match="replay buffer is empty after 100 steps.*after 32 new steps.*save_replay_buffer"
    ) as caught:
        loaded.learn(60, reset_num_timesteps=False)
    assert len(caught) == 1 and loaded._n_updates > updates and loaded.num_timesteps == 160
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded.learn(20, reset_num_timesteps=False)
        DreamerGPLD.load(tmp_path / "model", env=Clock(), device="cpu").learn(20)  # starts afresh: nothing is missed


# ----------------------------------------------------------------------------------------- whole files only


def leave_no_room(bytes_: int) -> Any:
    """Files of this process may not grow beyond that size: writing fails as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    return resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize("kind", ["model", "replay_buffer", "policy"])
def test_full_disk_keeps_the_old_file(kind: str, tmp_path: Path) -> None:
    trained = model().learn(40)
    save = {"model": trained.save, "replay_buffer": trained.save_replay_buffer, "policy": trained.policy.save}[kind]
    path = tmp_path / "file.bin"
    save(path)
    before = path.read_bytes()
    limits, before_that = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    try:
        leave_no_room(len(before) // 2)
        with pytest.raises(OSError, match="file that was there before is unchanged.*file.bin"):
            save(path)
        with pytest.raises(OSError, match="Nothing was saved.*other.bin"):
            save(tmp_path / "other.bin")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before_that)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["file.bin"]
    save(path)
    assert os.listdir(tmp_path) == ["file.bin"]


KILLED = """
import io, os, pathlib, signal, sys
sys.path[:0] = {paths!r}
from test_saving import Clock, DreamerGPLD, model
import torch
torch.set_num_threads(1)
trained = model().learn(60)
saves = {{
    "model.zip": lambda: trained.save("model"),
    "buffer.pkl": lambda: trained.save_replay_buffer("buffer"),
    "policy.pth": lambda: trained.policy.save("policy.pth"),
}}

def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)

class Counted(io.BufferedWriter):
    writes, last = 0, 0
    def write(self, data):
        written = super().write(data)
        Counted.writes += 1
        if Counted.writes == Counted.last:
            self.flush()
            die()
        return written

plain = pathlib.Path.open

def save_counted(save):
    pathlib.Path.open = lambda self, mode: Counted(io.FileIO(str(self), "w"))
    Counted.writes = 0
    save()
    pathlib.Path.open = plain

def check():
    loaded = DreamerGPLD.load("model", env=Clock(), device="cpu")
    loaded.load_replay_buffer("buffer")
    assert loaded.num_timesteps == 60 and loaded.replay_buffer.size() >= 60
    type(trained.policy).load("policy.pth", device="cpu")

for save in saves.values():
    save_counted(save)
for name, save in saves.items():
    save_counted(save)
    count = Counted.writes
    for moment in (1, (count + 1) // 2, count, "fsync", "replace"):
        child = os.fork()
        if child == 0:
            if isinstance(moment, str):
                setattr(os, moment, die)
            else:
                Counted.last = moment
            save_counted(save)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (name, moment)
        assert os.path.exists(f".{{name}}.part"), (name, moment)
        check()
    save()
    assert not os.path.exists(f".{{name}}.part")  # the next save cleans up
print(sorted(os.listdir(".")))
"""


def test_sigkill_at_any_moment_leaves_whole_files(tmp_path: Path) -> None:
    """At the first, the middle and the last write, before the file is on the disk, and before it gets its name."""
    script = KILLED.format(paths=PATHS)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "['buffer.pkl', 'model.zip', 'policy.pth']"


def test_atomic_file_keeps_the_paths_of_sb3(tmp_path: Path) -> None:
    trained = model()
    with pytest.warns(UserWarning, match="does not exist. Will create it"):
        trained.save(tmp_path / "new" / "folder" / "a")
    with pytest.warns(UserWarning, match="is a folder. Will save instead to"):
        trained.save(tmp_path / "new.x" if (tmp_path / "new.x").mkdir() else tmp_path / "new.x")
    assert (tmp_path / "new" / "folder" / "a.zip").exists() and (tmp_path / "new.x_2").exists()
    stream = io.BytesIO()
    trained.save(stream)
    stream.seek(0)
    assert_same(trained, DreamerGPLD.load(stream, device="cpu"))


def test_atomic_file_passes_other_errors_on(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="of the caller"), atomic_file(tmp_path / "x") as file:
        file.write(b"half")
        raise RuntimeError("of the caller")
    assert os.listdir(tmp_path) == []


def test_a_loaded_run_with_a_seed_goes_on_with_other_random_numbers(tmp_path: Path) -> None:
    trained = model().learn(60)
    trained.save(tmp_path / "model")
    trained.save_replay_buffer(tmp_path / "buffer")

    def actions(**kwargs: Any) -> np.ndarray:
        loaded = DreamerGPLD.load(tmp_path / "model", env=Clock(), device="cpu", **kwargs)
        loaded.load_replay_buffer(tmp_path / "buffer")
        drawn = loaded.replay_buffer.rng.random()  # type: ignore[union-attr]
        loaded.learn(20, reset_num_timesteps=False)
        return np.append(loaded.replay_buffer.actions[64:80].ravel(), drawn)  # type: ignore[union-attr]

    one = actions(seed=1)
    assert np.array_equal(one, actions(seed=1)) and np.array_equal(actions(), actions())
    for other in (actions(seed=2), actions()):
        assert (one != other).mean() > 0.8 and one[-1] != other[-1]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda trained: pickle.loads(cloudpickle.dumps(trained))])
def test_a_copied_model_goes_on(copied: Any) -> None:
    trained = model().learn(60)
    other = copied(trained)
    assert other.learner.policy is other.policy is not trained.policy
    before = tensors(trained)
    assert other.learn(20, reset_num_timesteps=False)._n_updates > trained._n_updates
    assert all(th.equal(tensor, before[name]) for name, tensor in tensors(trained).items())


# ------------------------------------------------------------------------------------ foreign and old files


def rewritten(path: Path, to: Path, **changes: Any) -> Path:
    """A copy of a model file with other entries in its data."""
    import json

    with zipfile.ZipFile(path) as source, zipfile.ZipFile(to, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name == "data":
                content = json.dumps({**json.loads(content), **changes}).encode()
            target.writestr(name, content)
    return to


def test_damaged_and_foreign_model_files(tmp_path: Path) -> None:
    path = tmp_path / "model.zip"
    model().save(path)
    content = path.read_bytes()
    for size in (0, 10, len(content) // 2, len(content) - 1):
        (tmp_path / "cut.zip").write_bytes(content[:size])
        with pytest.raises(ValueError, match="cut.zip wasn't a zip-file: it is no model, or a truncated one.*Use another"):
            DreamerGPLD.load(tmp_path / "cut.zip")
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 255
    (tmp_path / "flipped.zip").write_bytes(flipped)
    with pytest.raises(ValueError, match="flipped.zip is damaged: its part 'policy"):
        DreamerGPLD.load(tmp_path / "flipped.zip")
    with pytest.raises(FileNotFoundError):
        DreamerGPLD.load(tmp_path / "absent")
    later = rewritten(path, tmp_path / "later.zip", format_version=saving.FORMAT_VERSION + 1)
    with pytest.raises(ValueError, match="later.zip has format version 2.*reads up to 1.*later release"):
        DreamerGPLD.load(later)
    SAC("MlpPolicy", Clock(), policy_kwargs=dict(net_arch=[4]), buffer_size=10).save(tmp_path / "sac")
    with pytest.raises(ValueError, match=r"sac.zip was not saved by DreamerGPLD: its policy is of stable_baselines3\.sac"):
        DreamerGPLD.load(tmp_path / "sac")


def test_arguments_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    """The names of the constructor are allowed, those of a subclass too, and attributes that are saved."""

    class Renamed(DreamerGPLD):
        def __init__(self, *args: Any, own: int = 0, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    model().save(tmp_path / "model")
    for wrong, text in (
        (dict(posterior_penalti=0.0), "'posterior_penalti' does not exist. Did you mean 'posterior_penalty'"),
        (dict(tau=0.1), "has no argument 'tau': the slow value follows"),
        (dict(own=3), "'own' does not exist"),
    ):
        with pytest.raises(TypeError, match=text):
            DreamerGPLD.load(tmp_path / "model", **wrong)  # type: ignore[arg-type]
    loaded = Renamed.load(tmp_path / "model", own=3, gamma=0.5, num_timesteps=7, replay_buffer_kwargs=None)
    assert loaded.gamma == 0.5 and loaded.num_timesteps == 7


def test_files_of_other_sizes_and_spaces(tmp_path: Path) -> None:
    trained = model()
    trained.save(tmp_path / "model")
    with pytest.raises(RuntimeError, match="another size.*model_size='1m'.*without model_size"):
        DreamerGPLD.load(tmp_path / "model", env=Clock(), device="cpu", model_size="1m")
    with pytest.raises(ValueError, match="Action spaces do not match"):
        DreamerGPLD.load(tmp_path / "model", env=Clock(discrete=True), device="cpu")
    with pytest.raises(RuntimeError, match="another size.*model_size='debug'"):
        model(policy_kwargs=dict(hidden=24)).set_parameters(str(tmp_path / "model"))


def test_replay_buffers_that_do_not_fit(tmp_path: Path) -> None:
    trained = model().learn(40)
    trained.save_replay_buffer(tmp_path / "buffer")
    two = model(env=DummyVecEnv([Clock, Clock]))
    before = two.replay_buffer
    for other, what in (
        (two, "number of environments is 1, the model's 2"),
        (model(policy_kwargs=dict(deter=64)), "deter is 32, the model's 64"),
        (model(policy_kwargs=dict(stoch=3)), "stoch is 4, the model's 3"),
        (model(policy_kwargs=dict(classes=3)), "classes is 4, the model's 3"),
        (model(discrete=True), "action space is Box"),
    ):
        with pytest.raises(ValueError, match=f"buffer does not belong to this model: its {what}"):
            other.load_replay_buffer(tmp_path / "buffer")
    content = (tmp_path / "buffer.pkl").read_bytes()
    (tmp_path / "cut.pkl").write_bytes(content[: len(content) // 2])
    (tmp_path / "list.pkl").write_bytes(pickle.dumps([1]))
    for name in ("cut.pkl", "list.pkl"):
        with pytest.raises(ValueError, match=f"{name} is no replay buffer, or a truncated one"):
            two.load_replay_buffer(tmp_path / name)
    assert two.replay_buffer is before


FIRST_VERSION = Path(__file__).parent / "data" / "model_v1.zip"


def test_a_file_of_the_first_version_loads_for_ever() -> None:
    """Written by ``python tests/test_saving.py``, once; its actions stand beside it."""
    loaded = DreamerGPLD.load(FIRST_VERSION, env=Clock(), device="cpu")
    expected = np.load(FIRST_VERSION.with_name("model_v1_actions.npy"))
    np.testing.assert_allclose(_actions(loaded), expected, atol=1e-5)
    assert loaded.num_timesteps == 60 and loaded._n_updates > 0
    loaded.learn(40)


def test_a_replay_buffer_of_the_first_version_loads_for_ever() -> None:
    """Saved by the run of the file above, before the modules moved into wings."""
    loaded = DreamerGPLD.load(FIRST_VERSION, env=Clock(), device="cpu")
    loaded.load_replay_buffer(FIRST_VERSION.with_name("buffer_v1.pkl"))
    buffer = loaded.replay_buffer
    assert buffer is not None and buffer.size() == 63  # 3 episodes of 20 steps, and their last observations
    assert list(buffer.windows.queue) == [(0, 55)] and not buffer.writer.pending.any()
    env, updates = Clock(), loaded._n_updates
    for row in range(63):  # what the environment gives for the stored actions
        observation, reward = (env.reset()[0], 0.0) if row % 21 == 0 else env.step(buffer.actions[row - 1, 0])[:2]
        np.testing.assert_allclose(buffer.observations[row, 0], observation, atol=1e-6)
        np.testing.assert_allclose(buffer.rewards[row, 0], reward, atol=1e-6)
    loaded.learn(40, reset_num_timesteps=False)
    assert buffer.size() == 105 and loaded._n_updates > updates


def _actions(trained: DreamerGPLD) -> np.ndarray:
    """Actions of an episode without random numbers, (5, 2)."""
    actions, state = [], None
    for t in range(5):
        action, state = trained.predict(np.linspace(-0.5, 0.1 * t, 3, dtype=np.float32), state, deterministic=True)
        actions.append(action)
    return np.stack(actions)


def test_another_batch_length_holds_for_the_rows_of_before(tmp_path: Path) -> None:
    trained = model().learn(60)
    trained.save(tmp_path / "model")
    trained.save_replay_buffer(tmp_path / "buffer")
    loaded = DreamerGPLD.load(tmp_path / "model", env=Clock(), device="cpu", batch_length=3)
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert loaded.replay_buffer is not None and trained.batch_length != 3
    assert loaded.replay_buffer.sample(2).rewards.shape == (2, 3)
    loaded.learn(10, reset_num_timesteps=False)


@pytest.mark.parametrize("settings", [dict(train_ratio=8), dict(gradient_steps=1)])
def test_updates_wait_for_new_rows_where_the_old_ones_are_lost(settings: dict[str, Any], tmp_path: Path) -> None:
    trained = model(learning_starts=40, **settings).learn(60)
    trained.save(tmp_path / "model")
    loaded = DreamerGPLD.load(tmp_path / "model", env=Clock(), device="cpu")
    with pytest.warns(UserWarning, match="updates go on after 40 new steps"):
        loaded.learn(35, reset_num_timesteps=False)
    assert loaded._n_updates == trained._n_updates > 0
    assert loaded.learn(15, reset_num_timesteps=False)._n_updates > trained._n_updates


# ---------------------------------------------------------------------------------------------- warm starts


def test_load_modules(tmp_path: Path) -> None:
    trained = model(seed=1).learn(60)
    trained.save(tmp_path / "model")
    fresh = model(seed=2)
    before = {name: tensor.clone() for name, tensor in fresh.policy.state_dict().items()}
    fresh.load_modules(tmp_path / "model", ["encoder", "decoder"])
    taken = ("world_model.encoder.", "world_model.vector_decoder.")
    for name, tensor in fresh.policy.state_dict().items():
        expected = trained.policy.state_dict()[name] if name.startswith(taken) else before[name]
        assert th.equal(tensor, expected), name
    fresh.load_modules(tmp_path / "model", [name for name in saving.MODULES if name != "projector"])  # which it has not
    for name, tensor in trained.policy.state_dict().items():
        if name not in ("actor_critic.percentiles", "actor_critic.ent_coef_rise"):
            assert th.equal(fresh.policy.state_dict()[name], tensor), name
    fresh.learn(60)


def test_an_encoder_brings_the_units_of_what_it_sees(tmp_path: Path) -> None:
    normalized: dict[str, Any] = dict(policy_kwargs={"normalize_vectors": True})
    trained = model(seed=1, **normalized).learn(60)
    trained.save(tmp_path / "model")
    fresh = model(seed=2, **normalized)
    fresh.load_modules(tmp_path / "model", ["encoder"])
    ours, theirs = fresh.policy.world_model.normalizer.state_dict(), trained.policy.world_model.normalizer.state_dict()
    assert theirs.keys() == ours.keys() and all(th.equal(ours[name], theirs[name]) for name in theirs)
    with pytest.raises(ValueError, match=r"world_model.normalizer.\w+ is only in the file.*Nothing was loaded"):
        model().load_modules(tmp_path / "model", ["encoder"])
    with pytest.raises(ValueError, match="decoder predicts in units that come with the encoder.*Nothing was loaded"):
        fresh.load_modules(tmp_path / "model", ["decoder"])
    fresh.load_modules(tmp_path / "model", ["encoder", "decoder"])


def test_load_modules_that_do_not_fit(tmp_path: Path) -> None:
    model().save(tmp_path / "model")
    other = model(discrete=True, policy_kwargs=dict(hidden=24))
    before = {name: tensor.clone() for name, tensor in other.policy.state_dict().items()}
    with pytest.raises(ValueError, match="modules must name some of encoder, rssm.*, not encodr"):
        other.load_modules(tmp_path / "model", ["encoder", "encodr"])
    with pytest.raises(
        ValueError, match=r"encoder, actor do not fit: actor_critic.policy.output.*in the file.*Nothing was loaded"
    ):
        other.load_modules(tmp_path / "model", ["encoder", "actor"])
    assert all(th.equal(tensor, before[name]) for name, tensor in other.policy.state_dict().items())


# ------------------------------------------------------------------------------------------- policy files


SPACES = [
    spaces.Box(-1.0, np.inf, (2, 3), np.float64),
    spaces.Box(0, 255, (16, 16, 3), np.uint8),
    spaces.Discrete(4, start=-2),
    *([spaces.Discrete(3, dtype=np.int32)] if "dtype" in inspect.signature(spaces.Discrete).parameters else []),
    spaces.MultiDiscrete([2, 3], start=[1, 0]),
    spaces.MultiBinary((2, 2)),
    spaces.MultiBinary(4),
    spaces.Dict({"b": spaces.Discrete(2), "a": spaces.Box(0.0, 1.0, ())}),
]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_spaces_as_plain_data(space: spaces.Space) -> None:
    stream = io.BytesIO()
    th.save(space_to_plain(space), stream)
    stream.seek(0)
    back = plain_to_space(th.load(stream, weights_only=True))
    assert back == space and back.dtype == space.dtype and getattr(back, "n", None) == getattr(space, "n", None)
    if isinstance(space, spaces.Dict):
        assert list(back.spaces) == list(space.spaces)  # type: ignore[attr-defined]


def test_spaces_that_cannot_be_saved() -> None:
    with pytest.raises(TypeError, match="Text.*allowed: Box, Discrete"):
        space_to_plain(spaces.Text(4))


def test_policy_files_load_with_weights_only(tmp_path: Path) -> None:
    trained = model(policy_kwargs=dict(net_arch=dict(pi=[8], vf=[8, 8]), deter=64)).learn(40)
    path = tmp_path / "policy.pth"
    trained.policy.save(path)
    assert th.load(path, weights_only=True)["format_version"] == saving.FORMAT_VERSION
    loaded = type(trained.policy).load(path, device="cpu")
    for (name, a), b in zip(trained.policy.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert th.equal(a, b), name
    trained.save(tmp_path / "model.zip")
    (tmp_path / "cut.pth").write_bytes(path.read_bytes()[:1000])
    for name in ("model.zip", "cut.pth"):
        with pytest.raises(ValueError, match=f"{name} is no file of MlpPolicy.save.*DreamerGPLD.load"):
            type(trained.policy).load(tmp_path / name)
    with pytest.raises(ValueError, match="policy.pth is a file of torch.save, no model.*MlpPolicy.load"):
        DreamerGPLD.load(path)


def test_a_loaded_model_warns_of_observations_that_are_not_normalised(tmp_path: Path) -> None:
    def normalised() -> VecNormalize:
        return VecNormalize(DummyVecEnv([Clock]))

    trained = model(env=normalised()).learn(40)
    trained.save(tmp_path / "model")
    with pytest.warns(UserWarning, match="do not normalise the observation.*VecNormalize.load"):
        DreamerGPLD.load(tmp_path / "model", Clock())
    with pytest.warns(UserWarning, match="do not normalise the observation"):
        trained.set_env(DummyVecEnv([Clock]))
    with pytest.warns(UserWarning, match="environments' VecNormalize has seen no observation yet"):
        DreamerGPLD.load(tmp_path / "model", normalised())
    model(env=Clock()).learn(40).save(tmp_path / "raw")
    with pytest.warns(UserWarning, match="environments normalise the observation, as they did not"):
        DreamerGPLD.load(tmp_path / "raw", normalised())
    known = normalised()
    known.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DreamerGPLD.load(tmp_path / "model", known).set_env(known)
        DreamerGPLD.load(tmp_path / "raw", Clock())
        DreamerGPLD.load(tmp_path / "model")  # to be evaluated elsewhere
        model(env=Clock()).set_env(normalised())  # of one that has not learned


def test_a_policy_file_loads_for_a_device_that_numpy_cannot_read(tmp_path: Path) -> None:
    """As on a GPU: bounds of spaces stay where NumPy reads them."""
    policy = model().policy
    policy.save(tmp_path / "policy")
    loaded = type(policy).load(tmp_path / "policy", device="meta")
    assert loaded.device.type == "meta" and loaded.observation_space == policy.observation_space


def test_policy_files_have_no_numbers_of_numpy(tmp_path: Path) -> None:
    planner = dict(samples=np.int64(8), policy_samples=2, elites=np.int32(4), temperature=np.float32(0.5))
    kwargs: dict[str, Any] = dict(units=np.int64(16), reconstruction_weight=np.float64(2.0), net_arch=[np.int64(8)])
    policy = model(policy_kwargs=kwargs, planner=planner).policy
    policy.save(tmp_path / "policy")
    loaded = type(policy).load(tmp_path / "policy", device="cpu")
    assert loaded.config == policy.config and loaded.planner is not None and loaded.planner.config.samples == 8


def test_a_loaded_buffer_is_drawn_as_the_model_says(tmp_path: Path) -> None:
    path = tmp_path / "buffer.pkl"
    model = tiny("Pendulum-v1", replay_buffer_kwargs={"recency": 0.5}).learn(40)
    assert model.replay_buffer is not None and model.replay_buffer.recency == 0.5
    model.save_replay_buffer(path)
    plain = tiny("Pendulum-v1")
    plain.load_replay_buffer(path)
    assert plain.replay_buffer is not None and plain.replay_buffer.recency == 0.0
    model.load_replay_buffer(path)
    assert model.replay_buffer.recency == 0.5


class Start(Clock):
    """Its first observation is drawn from the environment's own random numbers."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        gym.Env.reset(self, seed=seed)
        super().reset()
        self.x = self.np_random.uniform(-1, 1, 3).astype(np.float32)
        return self.x.copy(), {}


def test_a_loaded_run_does_not_meet_the_same_starts_again(tmp_path: Path) -> None:
    def starts(trained: DreamerGPLD) -> np.ndarray:
        trained.learn(60, reset_num_timesteps=False)
        assert trained.replay_buffer is not None
        return trained.replay_buffer.observations[trained.replay_buffer.is_first[:, 0], 0]  # type: ignore[index]

    trained = model(env=Start(), seed=3)
    before = starts(trained)
    trained.save(tmp_path / "model")
    again, twice = (starts(DreamerGPLD.load(tmp_path / "model", env=Start(), device="cpu")) for _ in range(2))
    assert len(before) == len(again) == 3 and np.array_equal(again, twice)
    assert not np.isin(before, again).any()
    looked_at = DreamerGPLD.load(tmp_path / "model", env=Start(), device="cpu", seed=3)
    assert looked_at.env is not None and np.array_equal(looked_at.env.reset()[0], before[0])  # it does not go on
    seeded = starts(looked_at)
    assert not np.isin(before, seeded).any()


def test_a_model_that_is_saved_again_goes_on_as_before(tmp_path: Path) -> None:
    """Its random numbers are those of the run, not those of the process that only loaded it."""
    model().learn(60).save(tmp_path / "model")
    DreamerGPLD.load(tmp_path / "model", device="cpu").save(tmp_path / "again")
    one, other = (DreamerGPLD.load(tmp_path / name, env=Clock(), device="cpu") for name in ("model", "again"))
    for trained in (one, other):
        trained.learn(40, reset_num_timesteps=False)
    assert_same(one, other)


def test_a_buffer_that_is_loaded_within_an_episode_begins_another(tmp_path: Path) -> None:
    trained = model().learn(30)
    trained.save_replay_buffer(tmp_path / "buffer")
    trained.learn(7, reset_num_timesteps=False)
    trained.load_replay_buffer(tmp_path / "buffer")
    trained.learn(1, reset_num_timesteps=False)
    buffer = trained.replay_buffer
    assert buffer is not None and buffer.rows_added.item() == 33  # 30 steps, two last observations, and the new one
    assert buffer.dones[31, 0] == 1 and buffer.timeouts[31, 0] == 1 and buffer.is_first[32, 0]


def test_a_loaded_buffer_keeps_its_capacity_and_says_so(tmp_path: Path) -> None:
    model(buffer_size=300).learn(30).save_replay_buffer(tmp_path / "buffer")
    larger = model(buffer_size=500)
    with pytest.warns(UserWarning, match="buffer has room for 300 rows .* where the model's buffer_size=500 would be 500"):
        larger.load_replay_buffer(tmp_path / "buffer")


def test_episodes_of_the_logged_mean_can_change(tmp_path: Path) -> None:
    trained = model(stats_window_size=2).learn(60)
    assert trained.ep_info_buffer is not None and len(trained.ep_info_buffer) == trained.stats_window_size == 2
    trained.stats_window_size = 3
    trained.learn(40, reset_num_timesteps=False)
    assert len(trained.ep_info_buffer) == 3
    trained.save(tmp_path / "model")
    loaded = DreamerGPLD.load(tmp_path / "model", env=Clock(), device="cpu", stats_window_size=2)
    assert loaded.learn(20, reset_num_timesteps=False).stats_window_size == 2
    assert loaded.ep_info_buffer is not None and len(loaded.ep_info_buffer) == 2 == loaded.ep_info_buffer.maxlen


def test_action_noise_follows_the_number_of_environments(tmp_path: Path) -> None:
    noise = NormalActionNoise(np.zeros(2), np.ones(2))
    model(env=DummyVecEnv([Clock] * 2), action_noise=noise).learn(20).save(tmp_path / "model")
    for envs in (1, 3):
        loaded = DreamerGPLD.load(tmp_path / "model", env=DummyVecEnv([Clock] * envs), device="cpu")
        assert loaded.learn(3 * envs, reset_num_timesteps=False).num_timesteps == 20 + 3 * envs


def test_a_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "model.zip").symlink_to(tmp_path / "disk" / "model.zip")
    for content in (b"one", b"two"):
        with atomic_file(tmp_path / "model.zip") as file:
            file.write(content)
        assert (tmp_path / "disk" / "model.zip").read_bytes() == content and (tmp_path / "model.zip").is_symlink()


def test_shares_of_processes_by_names_with_a_dot() -> None:
    second = Processes(1, 2)
    names = ("model", "model.zip", "model_0.1", "folder.v1/model_0.2", "model_0.1.zip")
    assert [str(share_of(name, "zip", second, "pt")) for name in names] == [
        "model.rank1.pt",
        "model.rank1.pt",
        "model_0.1.rank1.pt",
        "folder.v1/model_0.2.rank1.pt",
        "model_0.1.rank1.pt",
    ]


if __name__ == "__main__":  # makes the file of the first version
    if FIRST_VERSION.exists():
        sys.exit(textwrap.fill(f"{FIRST_VERSION.name} exists, and must stay as the first version wrote it"))
    first = model(seed=3).learn(60)
    FIRST_VERSION.parent.mkdir(exist_ok=True)
    first.save(FIRST_VERSION)
    np.save(FIRST_VERSION.with_name("model_v1_actions.npy"), _actions(first))
