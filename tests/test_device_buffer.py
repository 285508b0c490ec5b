"""Rows on the device, which is the processor here: the same batches and the same training as with rows on the host, and what
only they can do wrong. ``test_buffers.py`` runs its tests with both; ``test_meta.py`` sees where copies and waits are."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from test_dreamer_gpld import BOX, RandomSpaces, tiny
from test_saving import Clock, assert_same, model
from torch.utils._python_dispatch import TorchDispatchMode

from sb3_dreamer_gpld import DreamerGPLD, SequenceReplayBuffer
from sb3_dreamer_gpld.replay import device_rows
from sb3_dreamer_gpld.replay.normalizing import normalized_observations, normalized_rewards

DEVICE: dict[str, Any] = dict(replay_buffer_kwargs={"storage": "device"})
VECTOR = spaces.Box(-np.inf, np.inf, (3,), np.float64)
BOX_0 = spaces.Box(-np.inf, np.inf, (), np.float32)
MIXED = spaces.Dict({"x": VECTOR, "image": spaces.Box(0, 255, (3, 16, 16), np.uint8), "b": spaces.Discrete(4)})


def filled(storage: str, n_envs: int = 2, steps: int = 60, **kwargs: Any) -> Any:
    """A buffer with random rows, whose rings have wrapped; episodes are 13 steps long."""
    options = {"batch_length": 4, "deter": 5, "stoch": 3, "classes": 7, "seed": 0, "storage": storage, **kwargs}
    buffer = SequenceReplayBuffer(40 * n_envs, VECTOR, BOX, "cpu", n_envs=n_envs, **options)
    random = np.random.default_rng(0)
    following = random.normal(size=(n_envs, 3))
    for step in range(steps):
        obs, (following, action) = following, random.normal(size=(2, n_envs, 3))
        buffer.stage(np.zeros(n_envs, bool), random.normal(size=(n_envs, 5)), random.integers(7, size=(n_envs, 3)))
        buffer.add(obs, following, action, random.normal(size=n_envs), np.full(n_envs, step % 13 == 12), [{}] * n_envs)
    return buffer


def assert_same_samples(a: Any, b: Any) -> None:
    for name, one, other in zip(a._fields, a, b, strict=True):
        for key in one if isinstance(one, dict) else [...]:
            assert one[key].dtype == other[key].dtype, name
            np.testing.assert_array_equal(one[key], other[key], err_msg=name)


# ---------------------------------------------------------------------------------------------- the same training


@pytest.mark.parametrize(
    "space, actions, options",
    [
        (VECTOR, BOX, {}),
        (MIXED, BOX, {"train_freq": 3, "handle_timeouts": False}),
        (VECTOR, spaces.Discrete(3), {"policy_kwargs": {"classes": 300}}),  # indices wider than a byte
    ],
    ids=["vectors", "images", "discrete"],
)
@pytest.mark.parametrize("normalized", [False, True])
def test_training_is_the_same_to_the_last_bit(space: Any, actions: Any, options: dict[str, Any], normalized: bool) -> None:
    options = dict(options)
    handled = options.pop("handle_timeouts", True)

    def trained(storage: str) -> DreamerGPLD:
        env: Any = DummyVecEnv([lambda: RandomSpaces(space, actions, terminates=True)] * 2)
        if normalized:
            env = VecNormalize(env, norm_obs_keys=["x"] if isinstance(space, spaces.Dict) else None, clip_obs=1.0)
        kwargs = {"storage": storage, "handle_timeout_termination": handled}
        run = tiny(env, buffer_size=60, train_ratio=16, replay_buffer_kwargs=kwargs, **options)
        return run.learn(120, log_interval=None)

    host, device = trained("host"), trained("device")
    assert_same(host, device)
    assert host._n_updates > 20
    assert host.replay_buffer is not None and device.replay_buffer is not None
    assert (
        isinstance(device.replay_buffer.rows, device_rows.DeviceRows) and host.replay_buffer.rows_added.min() > 60
    )  # wrapped
    for _ in range(3):
        batches = (trained.replay_buffer.sample(5, trained.get_vec_normalize_env()) for trained in (host, device))  # type: ignore
        assert_same_samples(*batches)


@pytest.mark.parametrize("first, second", [("device", "device"), ("device", "host"), ("host", "device")])
def test_a_run_goes_on_exactly(first: str, second: str, tmp_path: Path) -> None:
    """With rows where the arguments of the loaded model say, wherever they lay when they were saved."""
    whole = model(buffer_size=80)
    whole.learn(100)
    whole.learn(40, reset_num_timesteps=False)
    stopped = model(buffer_size=80, replay_buffer_kwargs={"storage": first})
    stopped.learn(100)
    stopped.save_run(tmp_path)
    resumed = DreamerGPLD.load_run(tmp_path, Clock(), "cpu", replay_buffer_kwargs={"storage": second})
    assert resumed is not None and resumed.replay_buffer is not None
    assert not isinstance(resumed.replay_buffer.rows, device_rows.DeviceRows) or not resumed.replay_buffer.rows.allocated
    resumed.learn(40, reset_num_timesteps=False)
    assert_same(whole, resumed)
    assert resumed.replay_buffer.storage == second and resumed._n_updates > stopped._n_updates
    assert isinstance(resumed.replay_buffer.rows, device_rows.DeviceRows) == (second == "device")


# ---------------------------------------------------------------------------------------------- latents


class Written(TorchDispatchMode):
    """Fails where one row is written twice by one operation: on a GPU either value may stay."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = str(func)
        assert not name.startswith(("aten.index_put", "aten.scatter")), f"{name} is not looked at"
        if name.startswith("aten.index_copy"):
            self.count += 1
            assert len(set(args[2].tolist())) == len(args[2]), "a row is written twice"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("as_tensors", [True, False])
def test_of_two_windows_with_the_same_row_the_later_one_counts(as_tensors: bool) -> None:
    host, device = filled("host"), filled("device")
    envs, starts = np.array([0, 1, 0, 0]), host.rows_added[0] - np.array([10, 9, 8, 12])
    deter = np.arange(4 * 4 * 5, dtype=np.float32).reshape(4, 4, 5)
    stoch = np.arange(4 * 4 * 3).reshape(4, 4, 3) % 7
    host.update_latents(envs, starts, deter, stoch)
    with Written() as mode:
        device.update_latents(envs, starts, *((th.as_tensor(deter), th.as_tensor(stoch)) if as_tensors else (deter, stoch)))
    assert mode.count == 2
    np.testing.assert_array_equal(host.deter, device.deter)
    np.testing.assert_array_equal(host.stoch, device.stoch)


def test_rows_that_are_gone_or_not_there_yet_are_left_alone() -> None:
    host, device = filled("host"), filled("device")
    added = int(host.rows_added[0])
    for starts in (np.array([added - 42, added - 2]), np.array([added - 60, added])):
        for buffer in (host, device):
            buffer.update_latents(np.array([0, 0]), starts, np.ones((2, 4, 5)), np.ones((2, 4, 3), int))
        np.testing.assert_array_equal(host.deter, device.deter)
    assert (device.deter == 1).any()


@pytest.mark.parametrize("classes, type_there", [(254, th.uint8), (255, th.int32), (300, th.int32), (70_000, th.int64)])
def test_classes_of_any_number(classes: int, type_there: th.dtype) -> None:
    """The last class is no missing latent, and −1 is one, however it is written."""
    host, device = (filled(storage, classes=classes, batch_length=1) for storage in ("host", "device"))
    stoch = np.array([[[classes - 1, 0, 1]], [[-1, -1, -1]]])
    samples = []
    for buffer in (host, device):
        starts = buffer.rows_added[:1] - np.array([1, 2])
        buffer.update_latents(np.zeros(2, int), starts, th.ones(2, 1, 5), th.as_tensor(stoch))
        samples.append(buffer._latents(buffer.rows.locate(np.zeros(2, int), starts)))
    for one, other in zip(*samples, strict=True):
        np.testing.assert_array_equal(one, other)
    assert samples[1][0].tolist() == [[1.0] * 5, [0.0] * 5] and samples[1][1].tolist() == stoch[:, 0].tolist()
    assert device.rows._use().arrays["stoch"].dtype == type_there
    assert device.stoch.dtype == host.stoch.dtype and device.no_latent == host.no_latent


# ---------------------------------------------------------------------------------------------- VecNormalize


def statistics(space: spaces.Space, **kwargs: Any) -> VecNormalize:
    """A VecNormalize with statistics that are no round numbers."""
    env = VecNormalize(DummyVecEnv([lambda: RandomSpaces(space, BOX)]), **kwargs)
    random = np.random.default_rng(1)
    for rms in env.obs_rms.values() if isinstance(env.obs_rms, dict) else [env.obs_rms]:
        rms.mean, rms.var = random.normal(size=rms.mean.shape), random.uniform(0.1, 3, size=rms.var.shape)
    env.ret_rms.var = np.float64(1.7)
    return env


def ulps(a: Any, b: Any) -> int:
    """How many float32 numbers lie between two of the same sign, at most."""
    assert a.dtype == b.dtype == np.float32
    return int(np.abs(a.view(np.int32).astype(np.int64) - b.view(np.int32)).max())


@pytest.mark.parametrize("off", [None, "norm_obs", "norm_reward"])
def test_vec_normalize_gives_the_same_numbers(off: str | None) -> None:
    """Of normal numbers, of some that are clipped, and of whole ones."""
    space = spaces.Dict({"x": VECTOR, "h": BOX_0, "n": spaces.Box(-9, 9, (2,), np.int16), "image": MIXED["image"]})
    env = statistics(space, norm_obs_keys=["x", "h", "n"], clip_obs=1.3, clip_reward=0.9, epsilon=0.01)
    if off:
        setattr(env, off, False)
    random = np.random.default_rng(2)
    observations = {
        "x": random.normal(size=(50, 4, 3)).astype(np.float32),
        "h": random.normal(size=(50, 4)).astype(np.float32),
        "n": random.integers(-9, 10, size=(50, 4, 2)).astype(np.int16),
        "image": random.integers(256, size=(50, 4, 3, 16, 16)).astype(np.uint8),
    }
    rewards = random.normal(size=(50, 4)).astype(np.float32)
    expected: Any = env.normalize_obs(observations)
    got = normalized_observations({key: th.as_tensor(value) for key, value in observations.items()}, env)
    assert got.keys() == expected.keys() and got["image"].dtype == th.uint8
    np.testing.assert_array_equal(got["image"], expected["image"])
    if off == "norm_obs":
        np.testing.assert_array_equal(got["n"], observations["n"])
    else:
        for key in ("x", "h", "n"):
            assert ulps(got[key].numpy(), expected[key]) <= 1
            assert got[key].max() == np.float32(1.3) and got[key].min() == np.float32(-1.3)
    assert ulps(normalized_rewards(th.as_tensor(rewards), env).numpy(), env.normalize_reward(rewards)) <= 1
    assert off == "norm_reward" or normalized_rewards(th.as_tensor(rewards), env).max() == np.float32(0.9)


def test_statistics_are_those_of_the_moment() -> None:
    env, buffer = statistics(VECTOR), filled("device")
    one = copy.deepcopy(buffer).sample(4, env)
    assert isinstance(env.obs_rms, type(env.ret_rms))
    env.obs_rms.mean = env.obs_rms.mean + 0.5
    env.ret_rms.var = 2 * env.ret_rms.var
    other = copy.deepcopy(buffer).sample(4, env)
    assert (one.observations > other.observations).all() and not th.equal(one.rewards, other.rewards)


@pytest.mark.parametrize("method", ["normalize_obs", "_normalize_obs", "normalize_reward"])
def test_a_vec_normalize_that_computes_something_else_is_an_error(method: str) -> None:
    own = type("Own", (VecNormalize,), {method: lambda self, values, *rest: values})
    rewards = "reward" in method
    env = own(DummyVecEnv([lambda: RandomSpaces(VECTOR, BOX)]), norm_obs=not rewards, norm_reward=rewards)
    with pytest.raises(ValueError, match=rf"Own has a {method} of its own.*storage='host'"):
        filled("device").sample(4, env)
    filled("host").sample(4, env)


# ---------------------------------------------------------------------------------------------- memory


def test_too_little_memory_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first step, and never for a model that is only loaded."""
    row = 4 * (3 + 2 + 3 + 32) + 1 + 4  # observation, action, scalars, deter of size "debug"; is_first; stoch
    trained = model(buffer_size=1000, **DEVICE)
    assert trained.replay_buffer is not None
    monkeypatch.setattr(device_rows, "free_bytes", lambda device: 1000 * row - 1)
    text = r"1,000 rows needs 165,000 bytes on 'cpu', of which 164,999 are free; allowed: a smaller buffer_size, or .*'host'"
    with pytest.raises(MemoryError, match=text):
        trained.learn(50)
    assert trained.replay_buffer.rows_added.tolist() == [0]
    monkeypatch.setattr(device_rows, "free_bytes", lambda device: 1000 * row)
    trained.learn(50)
    assert trained.replay_buffer.rows_added.tolist() == [52]  # two episodes have ended


def test_nothing_is_allocated_to_evaluate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model(**DEVICE).learn(40).save_run(tmp_path)

    def refused(device: th.device) -> int:
        raise AssertionError("allocated")

    monkeypatch.setattr(device_rows, "free_bytes", refused)
    loaded = DreamerGPLD.load_run(tmp_path, Clock(), "cpu")
    assert loaded is not None and loaded.replay_buffer is not None
    loaded.predict(np.zeros(3, np.float32))
    assert loaded.replay_buffer.storage == "device" and loaded.replay_buffer.size() == 42
    assert loaded.replay_buffer.observations.shape == (42, 1, 3)
    loaded.save_replay_buffer(tmp_path / "again")
    with pytest.raises(AssertionError, match="allocated"):
        loaded.replay_buffer.sample(2)


def test_an_allocation_that_fails_is_the_same_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> th.Tensor:
        raise th.cuda.OutOfMemoryError("CUDA out of memory")

    buffer = SequenceReplayBuffer(100, VECTOR, BOX, "cpu", storage="device")
    with monkeypatch.context() as patch:
        patch.setattr(device_rows, "_zeros", fails)
        with pytest.raises(MemoryError, match=r"100 rows needs 4,200 bytes on 'cpu'; allowed: a smaller buffer_size"):
            buffer.add(np.zeros((1, 3)), np.zeros((1, 3)), np.zeros((1, 3)), np.zeros(1), np.zeros(1, bool), [{}])
    buffer.add(np.zeros((1, 3)), np.zeros((1, 3)), np.zeros((1, 3)), np.zeros(1), np.zeros(1, bool), [{}])
    assert buffer.size() == 1


def test_bytes_of_a_row() -> None:
    """Those of the docstring: dm_control's walker, 24 numbers and 6 actions."""
    space = spaces.Dict(
        {key: spaces.Box(-1, 1, (n,), np.float64) for key, n in dict(orientations=14, height=1, velocity=9).items()}
    )
    for deter, size in ((2048, 8357), (512, 2213)):
        actions = spaces.Box(-1, 1, (6,))
        buffer = SequenceReplayBuffer(10, space, actions, "cpu", deter=deter, stoch=32, classes=16, storage="device")
        memory = buffer.rows._use()  # type: ignore[attr-defined]
        tensors = (*memory.observations.values(), *memory.arrays.values())
        assert sum(tensor.nbytes for tensor in tensors) == 10 * size
    assert str(size) in (SequenceReplayBuffer.__doc__ or "") and "8357" in (SequenceReplayBuffer.__doc__ or "")


# ---------------------------------------------------------------------------------------------- files and devices


@pytest.mark.parametrize("storage", ["host", "device"])
def test_a_file_from_a_gpu_is_usable_without_one(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if nobody says where it is to be used, as SB3 does. It holds arrays of the host, the same for both storages."""
    buffer = filled(storage, classes=300)
    state = buffer.__getstate__() if hasattr(buffer, "__getstate__") else buffer.__dict__
    state = {**state, "_device": th.device("cuda:0")}
    rows = copy.copy(buffer.rows)
    if storage == "device":
        rows._device = th.device("cuda:0")
    content = pickle.dumps({**state, "rows": rows})
    assert b"torch._utils" not in content and b"_rebuild_tensor" not in content
    loaded = SequenceReplayBuffer.__new__(SequenceReplayBuffer)
    monkeypatch.setattr(th.cuda, "is_available", lambda: False)
    loaded.__setstate__(pickle.loads(content))
    assert loaded.device == th.device("cpu") and loaded.storage == storage
    assert_same_samples(loaded.sample(5), buffer.sample(5))
    for name in ("observations", "actions", "rewards", "dones", "timeouts", "is_first", "deter", "stoch"):
        one, other = getattr(loaded, name)[:40], getattr(filled("host", classes=300), name)[:40]
        assert one.dtype == other.dtype
        if name != "deter":  # rows without a latent keep what lay there
            np.testing.assert_array_equal(one, other, err_msg=name)


def test_a_buffer_saved_before_there_was_a_choice_has_its_rows_on_the_host() -> None:
    buffer = filled("host")
    state = {name: value for name, value in buffer.__dict__.items() if name not in ("_storage", "_device")}
    loaded = SequenceReplayBuffer.__new__(SequenceReplayBuffer)
    loaded.__setstate__(copy.deepcopy({**state, "device": th.device("cpu")}))
    assert loaded.storage == "host" and loaded.device == th.device("cpu")
    assert_same_samples(loaded.sample(5), buffer.sample(5))


def test_rows_follow_the_device_and_the_storage() -> None:
    """Half-way in an episode, with windows in the queue; and a part at a time."""
    host, moved = filled("host", steps=37), filled("device", steps=37)
    for change in (
        lambda: setattr(moved, "device", "cpu:0"),
        lambda: setattr(moved, "storage", "host"),
        lambda: setattr(moved, "storage", "device"),
    ):
        change()
        assert not isinstance(moved.rows, device_rows.DeviceRows) or not moved.rows.allocated
        for buffer in (host, moved):
            buffer.add(np.ones((2, 3)), np.zeros((2, 3)), np.zeros((2, 3)), np.ones(2), np.zeros(2, bool), [{}, {}])
        assert_same_samples(host.sample(6), moved.sample(6))
    assert moved.rows.device == th.device("cpu:0")


def test_saved_rows_are_loaded_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer, parts = filled("device", n_envs=3), []
    to_device = device_rows.to_device
    monkeypatch.setattr(device_rows, "LOADED_AT_ONCE", 100)
    monkeypatch.setattr(device_rows, "to_device", lambda part, device: parts.append(part.nbytes) or to_device(part, device))
    loaded = pickle.loads(pickle.dumps(buffer))
    loaded.rows.make_room(1)
    assert max(parts) == 100 and len(parts) > 50
    monkeypatch.undo()
    assert_same_samples(loaded.sample(50), buffer.sample(50))


def test_first_rows_may_be_added_in_inference_mode() -> None:
    buffer = SequenceReplayBuffer(100, VECTOR, BOX, "cpu", storage="device", batch_length=2)
    for mode in (th.inference_mode(), th.no_grad()):
        with mode:
            for _ in range(4):
                buffer.add(np.zeros((1, 3)), np.zeros((1, 3)), np.zeros((1, 3)), np.zeros(1), np.zeros(1, bool), [{}])
    samples = buffer.sample(2)
    buffer.update_latents(samples.envs, samples.starts, th.ones(2, 2, 1, requires_grad=True), th.ones(2, 2, 1).long())
    assert buffer.deter.max() == 1


def test_a_step_is_written_by_one_copy_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[Any] = []
    together = device_rows.together_to_device
    monkeypatch.setattr(device_rows, "together_to_device", lambda *args: copies.append(args) or together(*args))
    monkeypatch.setattr(device_rows, "to_device", SimpleNamespace())  # nothing else goes over
    filled("device", steps=12)
    assert len(copies) == 12


# ---------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "space, actions, message",
    [
        (
            spaces.Dict({"x": BOX, "depth": spaces.Box(0, 9, (3,), np.uint16)}),
            BOX,
            "observation 'depth', whose type is uint16",
        ),
        (spaces.Box(0, 9, (3,), np.uint32), BOX, "the observation, whose type is uint32"),
        (spaces.Box(0, 9, (3,), np.uint64), BOX, "the observation, whose type is uint64"),
        (BOX, spaces.MultiDiscrete([3, 4], dtype=np.uint16), "the action, whose type is uint16"),
    ],
)
def test_types_that_cannot_be_indexed_are_errors_before_the_first_step(space: Any, actions: Any, message: str) -> None:
    env = RandomSpaces(space, actions)
    with pytest.raises(ValueError, match=rf"cannot keep {message}; allowed: bool, uint8.*float64.*storage='host'"):
        tiny(env, **DEVICE)
    on_host = tiny(env)
    assert on_host.replay_buffer is not None
    with pytest.raises(ValueError, match=message):
        on_host.replay_buffer.storage = "device"
    on_host.learn(40, log_interval=None)
    assert on_host.replay_buffer.storage == "host" and on_host._n_updates > 0


@pytest.mark.parametrize("storage", ["gpu", "cuda", None, ""])
def test_another_storage_is_an_error_before_the_first_step(storage: Any) -> None:
    with pytest.raises(ValueError, match=f"storage must be 'host' or 'device', not {storage!r}"):
        model(replay_buffer_kwargs={"storage": storage})
    with pytest.raises(ValueError, match="storage must be 'host' or 'device'"):
        filled("host").storage = storage
