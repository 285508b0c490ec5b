"""Tests of SequenceReplayBuffer, mostly against a reference that keeps whole episodes in plain lists.

All are run with rows on the host and with rows on the device, which is the processor here.
"""

import copy
import pickle
import tracemalloc
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.save_util import load_from_pkl, save_to_pkl
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_dreamer_gpld import replay
from sb3_dreamer_gpld.buffers import SequenceReplayBuffer, SequenceSamples

D, K, C = 3, 2, 5
ACTION_DIM = 2
ACTIONS = spaces.Box(-1, 1, (ACTION_DIM,), np.float32)
FLAT = spaces.Box(-np.inf, np.inf, (2,), np.float32)
DICT = spaces.Dict({"scalar": spaces.Box(-np.inf, np.inf, (), np.float64), "table": spaces.Box(-np.inf, np.inf, (2, 2))})
ARRAYS = ("observations", "actions", "rewards", "dones", "timeouts", "is_first", "deter", "stoch")

STORAGE = {"storage": "host"}  # of the buffers that are made
host_only = pytest.mark.parametrize("storage", ["host"], indirect=True)


@pytest.fixture(scope="module", autouse=True, params=["host", "device"])
def storage(request: pytest.FixtureRequest) -> str:
    """Where the rows of all buffers lie."""
    STORAGE["storage"] = request.param
    return request.param


STEP, DONE, TIMEOUT, CUT = "step", "done", "timeout", "cut"  # CUT: a step, then the episode is abandoned without done


# ---------------------------------------------------------------- reference


@dataclass
class Episode:
    """What happened: obs[i], then actions[i], then rewards[i] and obs[i + 1]. ``end`` is None while it goes on."""

    obs: list[float] = field(default_factory=list)
    actions: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    latents: list[float | None] = field(default_factory=list)
    end: str | None = None


@dataclass
class Row:
    obs: float
    action: float
    reward: float
    is_first: bool
    is_last: bool
    is_terminal: bool
    latent: float | None


def episode_rows(episode: Episode) -> list[Row]:
    """The rows of one episode; the last observation counts only when the episode is over."""
    acted = len(episode.actions)
    rows = []
    for i in range(acted if episode.end is None else acted + 1):
        last = i == acted
        rows.append(
            Row(
                obs=episode.obs[i],
                action=0.0 if last else episode.actions[i],
                reward=0.0 if i == 0 else episode.rewards[i - 1],
                is_first=i == 0,
                is_last=last,
                is_terminal=last and episode.end == DONE,
                latent=None if last else episode.latents[i],
            )
        )
    return rows


class Reference:
    """The same data as the buffer, as a list of episodes per environment, and the rules said in the simplest way."""

    def __init__(self, n_envs: int, capacity: int, batch_length: int):
        self.capacity, self.batch_length = capacity, batch_length
        self.episodes: list[list[Episode]] = [[] for _ in range(n_envs)]
        self.refreshed: dict[tuple[int, int], float] = {}
        self.queue: list[tuple[int, int, int]] = []  # (number of the add, env, first trained row)

    def rows(self, env: int) -> list[Row]:
        rows = [row for episode in self.episodes[env] for row in episode_rows(episode)]
        for (e, number), latent in self.refreshed.items():
            if e == env:
                rows[number].latent = latent
        return rows

    def count(self, env: int) -> int:
        return sum(len(e.actions) + (e.end is not None) for e in self.episodes[env])

    def oldest(self, env: int) -> int:
        return max(0, self.count(env) - self.capacity)

    def finish(self, env: int, end: str) -> None:
        self.episodes[env][-1].end = end

    def queue_between(self, env: int, before: int, add_number: int) -> None:
        """Queue the windows that end at a multiple of the window size passed since the row count ``before``."""
        window = self.batch_length + 1
        for count in range(before + 1, self.count(env) + 1):
            if count % window == 0 and window <= self.capacity:
                self.queue.append((add_number, env, count - self.batch_length))

    def live_queue(self) -> list[tuple[int, int, int]]:
        return [(n, env, start) for n, env, start in self.queue if start - 1 >= self.oldest(env)]

    def windows(self) -> tuple[int, set[tuple[int, int]], bool]:
        """Number of steps, all windows (env, first trained row) that may be drawn, and whether they have a context."""
        envs = range(len(self.episodes))
        full = {(env, start) for env in envs for start in range(self.oldest(env) + 1, self.count(env) - self.batch_length + 1)}
        if full:
            return self.batch_length, full, True
        most = max(min(self.count(env), self.capacity) for env in envs)
        holders = [env for env in envs if min(self.count(env), self.capacity) == most]
        if any(self.count(env) > self.capacity for env in envs) and self.capacity > 1:
            return self.capacity - 1, {(env, self.oldest(env) + 1) for env in holders}, True
        return most, {(env, self.oldest(env)) for env in holders}, False


class Driver:
    """Feeds the same made-up experience to a buffer and to the reference. Every value occurs only once."""

    def __init__(self, n_envs: int, buffer_size: int, batch_length: int, space: spaces.Space = DICT, seed: int | None = 0):
        self.n_envs, self.space = n_envs, space
        # Any: observations are an array or a dict, and each test knows which
        self.buffer: Any = SequenceReplayBuffer(
            buffer_size,
            space,
            ACTIONS,
            "cpu",
            n_envs=n_envs,
            batch_length=batch_length,
            deter=D,
            stoch=K,
            classes=C,
            seed=seed,
            **STORAGE,
        )
        self.reference = Reference(n_envs, max(buffer_size // n_envs, 1), batch_length)
        self.counter = 0
        self.adds = 0
        self.last_obs = self.fresh()
        self.abandoned = np.zeros(n_envs, dtype=bool)

    def fresh(self) -> np.ndarray:
        self.counter += self.n_envs
        return np.arange(self.counter - self.n_envs, self.counter, dtype=np.float64) + 1

    def as_obs(self, values: np.ndarray) -> Any:
        return make_obs(self.space, values)

    def add(self, ops: list[str], staged: bool = False) -> None:
        ops = ops[: self.n_envs]
        # An episode can only be abandoned if the algorithm says so before the next add
        staged = staged or bool(self.abandoned.any())
        next_obs, actions, rewards, latents = self.fresh(), self.fresh(), self.fresh(), self.fresh()
        before = [self.reference.count(env) for env in range(self.n_envs)]
        is_first = np.zeros(self.n_envs, dtype=bool)
        for env, episodes in enumerate(self.reference.episodes):
            if self.abandoned[env]:
                self.reference.finish(env, CUT)
            is_first[env] = not episodes or episodes[-1].end is not None
            if is_first[env]:
                episodes.append(Episode(obs=[self.last_obs[env]]))
            episode = episodes[-1]
            episode.actions.append(actions[env])
            episode.rewards.append(rewards[env])
            episode.obs.append(next_obs[env])
            episode.latents.append(latents[env] if staged else None)
            if ops[env] in (DONE, TIMEOUT):
                self.reference.finish(env, ops[env])
            self.reference.queue_between(env, before[env], self.adds)

        if staged:
            self.buffer.stage(is_first, make_deter(latents), make_stoch(latents))
        done = np.array([op in (DONE, TIMEOUT) for op in ops])
        infos = [{"TimeLimit.truncated": True} if op == TIMEOUT else {} for op in ops]
        action = np.stack([actions, -actions], axis=1)
        self.buffer.add(self.as_obs(self.last_obs), self.as_obs(next_obs), action, rewards, done, infos)
        self.adds += 1
        self.abandoned = np.array([op == CUT for op in ops])
        self.last_obs = np.where(done | self.abandoned, self.fresh(), next_obs)

    def refresh(self, samples: SequenceSamples) -> None:
        steps = samples.rewards.shape[1]
        latents = np.stack([self.fresh()[:1] for _ in range(len(samples.envs) * steps)]).reshape(-1, steps)
        self.buffer.update_latents(samples.envs, samples.starts, make_deter(latents), th.as_tensor(make_stoch(latents)))
        for b, env in enumerate(samples.envs):
            for t in range(steps):
                number = int(samples.starts[b]) + t
                if number >= self.reference.oldest(int(env)):
                    self.reference.refreshed[int(env), number] = latents[b, t]


def make_obs(space: spaces.Space, values: np.ndarray) -> Any:
    if isinstance(space, spaces.Dict):
        return {"scalar": values.copy(), "table": values[:, None, None] + np.array([[0, 0.25], [0.5, 0.75]])}
    return np.stack([values, -values], axis=1)


def make_deter(latents: np.ndarray) -> np.ndarray:
    return (latents[..., None] + np.linspace(0, 0.5, D)).astype(np.float32)


def make_stoch(latents: np.ndarray) -> np.ndarray:
    return np.stack([latents % C, latents // C % C], axis=-1).astype(np.int64)


# ---------------------------------------------------------------- comparison


def check_latent(deter: np.ndarray, stoch: np.ndarray, latent: float | None) -> None:
    if latent is None:
        assert (stoch == -1).all() and (deter == 0).all()
    else:
        np.testing.assert_array_equal(deter, make_deter(np.array(latent)))
        np.testing.assert_array_equal(stoch, make_stoch(np.array(latent)))


def check_obs(space: spaces.Space, obs: Any, value: float) -> None:
    expected = make_obs(space, np.array([value]))
    if isinstance(space, spaces.Dict):
        for key in space.spaces:
            np.testing.assert_array_equal(obs[key], expected[key][0])
    else:
        np.testing.assert_array_equal(obs, expected[0])


def take(obs: Any, *index: Any) -> Any:
    return {key: value[index] for key, value in obs.items()} if isinstance(obs, dict) else obs[index]


def check_samples(driver: Driver, samples: SequenceSamples, batch_size: int) -> None:
    """Every window is a run of the reference's rows of one environment, none of them overwritten."""
    steps, windows, has_context = driver.reference.windows()
    assert samples.rewards.shape == (batch_size, steps)
    assert samples.prev_actions.shape == (batch_size, steps, ACTION_DIM)
    assert samples.deter.shape == (batch_size, D) and samples.stoch.shape == (batch_size, K)
    rows = [driver.reference.rows(env) for env in range(driver.n_envs)]
    for b, (env, start) in enumerate(zip(samples.envs.tolist(), samples.starts.tolist(), strict=True)):
        assert (env, start) in windows
        check_latent(samples.deter[b].numpy(), samples.stoch[b].numpy(), rows[env][start - 1].latent if has_context else None)
        for t in range(steps):
            row = rows[env][start + t]
            check_obs(driver.space, take(samples.observations, b, t), row.obs)
            assert samples.rewards[b, t] == row.reward
            assert samples.is_last[b, t] == row.is_last
            assert samples.is_terminal[b, t] == row.is_terminal
            virtual = t == 0 and not has_context
            assert samples.is_first[b, t] == (row.is_first or virtual)
            before = 0.0 if virtual else rows[env][start + t - 1].action
            assert samples.prev_actions[b, t].tolist() == [before, -before]


def check_arrays(driver: Driver) -> None:
    """The rings hold exactly the newest rows of the reference, row n at index n % capacity."""
    buffer, reference = driver.buffer, driver.reference
    capacity = reference.capacity
    for env in range(driver.n_envs):
        rows = reference.rows(env)
        assert buffer.rows_added[env] == len(rows)
        for number in range(reference.oldest(env), len(rows)):
            row, at = rows[number], (number % capacity, env)
            check_obs(driver.space, take(buffer.observations, *at), row.obs)
            assert buffer.actions[at].tolist() == [row.action, -row.action]
            assert (buffer.rewards[at], buffer.dones[at]) == (row.reward, row.is_last)
            assert buffer.timeouts[at] == (row.is_last and not row.is_terminal)
            assert buffer.is_first[at] == row.is_first
            if row.latent is None:
                assert (buffer.stoch[at] == np.iinfo(np.uint8).max).all()
            else:
                check_latent(buffer.deter[at], buffer.stoch[at], row.latent)
    most = int(buffer.rows_added.max())
    assert buffer.size() == min(most, capacity)
    assert (buffer.pos, buffer.full) == (most % capacity, most >= capacity)


def check_queue(driver: Driver, samples: SequenceSamples) -> None:
    """The batch begins with the finished windows that were never served, oldest first; they leave the queue."""
    reference = driver.reference
    waiting = reference.live_queue()
    served = list(zip(samples.envs.tolist(), samples.starts.tolist(), strict=True))[: len(waiting)]
    step_of = {(env, start): number for number, env, start in waiting}
    # Windows finished by the same add may come in any order
    assert [step_of[window] for window in served] == sorted(step_of.values())[: len(served)]
    assert len(set(served)) == len(served)
    reference.queue = [entry for entry in waiting if entry[1:] not in served]


# ---------------------------------------------------------------- against the reference

OPS = st.sampled_from([STEP] * 6 + [DONE, TIMEOUT, CUT])
ADD = st.tuples(st.lists(OPS, min_size=3, max_size=3), st.booleans())


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    n_envs=st.integers(1, 3),
    capacity=st.integers(1, 14),
    batch_length=st.integers(1, 6),
    adds=st.lists(st.tuples(ADD, st.integers(0, 4), st.booleans()), min_size=1, max_size=30),
    flat=st.booleans(),
)
def test_matches_reference(n_envs: int, capacity: int, batch_length: int, adds: list, flat: bool) -> None:
    driver = Driver(n_envs, capacity * n_envs, batch_length, FLAT if flat else DICT)
    old_samples = None
    for (ops, staged), batch_size, refresh in adds:
        driver.add(ops, staged)
        window_exists = any(min(driver.reference.count(e), capacity) > batch_length for e in range(n_envs))
        assert driver.buffer.has_window() == window_exists
        if batch_size > 0:
            samples = driver.buffer.sample(batch_size)
            check_samples(driver, samples, batch_size)
            check_queue(driver, samples)
            # Latents often arrive late, when rows of the window have been overwritten
            if refresh and old_samples is not None:
                driver.refresh(old_samples)
            old_samples = samples
    check_arrays(driver)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    n_envs=st.integers(1, 3),
    adds=st.lists(ADD, min_size=1, max_size=25),
    more=st.lists(ADD, min_size=1, max_size=25),
    by_pickle=st.booleans(),
)
def test_copy_continues_the_same(n_envs: int, adds: list, more: list, by_pickle: bool) -> None:
    """A copied buffer, also one with queued windows and unfinished transitions, goes on as the original does."""
    driver = Driver(n_envs, 9 * n_envs, 3)
    for ops, staged in adds:
        driver.add(ops, staged)
    driver.buffer.stage(np.zeros(n_envs, bool), np.ones((n_envs, D)), np.ones((n_envs, K), int))
    twin = copy.copy(driver)
    twin.reference = copy.deepcopy(driver.reference)
    twin.buffer = pickle.loads(pickle.dumps(driver.buffer)) if by_pickle else copy.deepcopy(driver.buffer)
    assert_same_arrays(driver.buffer, twin.buffer)
    for ops, staged in more:
        for each in (driver, twin):
            each.add(ops, staged)
        assert_same_samples(driver.buffer.sample(2), twin.buffer.sample(2))
    assert_same_arrays(driver.buffer, twin.buffer)


def half_way() -> Driver:
    """In mid-episode, with a queued window and staged latents: the first environment's episode is about to be cut."""
    driver = Driver(2, 40, 3)
    for i in range(9):
        driver.add([STEP, DONE if i == 4 else STEP], staged=i % 2 == 0)
    driver.buffer.sample(3)
    for _ in range(3):
        driver.add([STEP, STEP], staged=True)
    driver.buffer.stage(np.array([True, False]), np.ones((2, D)), np.ones((2, K), int))
    return driver


def test_a_buffer_saved_as_one_class_goes_on() -> None:
    """``save_to_pkl("buffer_v1_open.pkl", half_way().buffer)`` wrote the file before the class was taken apart."""
    driver = half_way()
    loaded = copy.copy(driver)
    loaded.reference = copy.deepcopy(driver.reference)
    loaded.buffer = load_from_pkl(Path(__file__).parent / "data" / "buffer_v1_open.pkl")
    assert len(loaded.buffer.windows.queue) > 0 and loaded.buffer.writer.pending.all()
    assert_same_arrays(driver.buffer, loaded.buffer)
    for ops in ([STEP, STEP], [DONE, STEP], [STEP, TIMEOUT], [STEP, STEP]):
        for each in (driver, loaded):
            each.add(ops)
        assert_same_samples(driver.buffer.sample(3), loaded.buffer.sample(3))
    assert_same_arrays(driver.buffer, loaded.buffer)
    assert (loaded.buffer.pos, loaded.buffer.full) == (driver.buffer.pos, driver.buffer.full)


def assert_same_arrays(a: SequenceReplayBuffer, b: SequenceReplayBuffer) -> None:
    for name in ARRAYS:
        one, other = getattr(a, name), getattr(b, name)
        for key in one if isinstance(one, dict) else [...]:
            assert not np.shares_memory(one[key], other[key])
            assert one[key].shape[1:] == other[key].shape[1:] and one[key].dtype == other[key].dtype
            filled = a.size()
            np.testing.assert_array_equal(one[key][:filled], other[key][:filled])


def assert_same_samples(a: Any, b: Any) -> None:
    for name, one, other in zip(a._fields, a, b, strict=True):
        for key in one if isinstance(one, dict) else [...]:
            np.testing.assert_array_equal(one[key], other[key], err_msg=name)


# ---------------------------------------------------------------- sampling


def drain(buffer: SequenceReplayBuffer) -> None:
    buffer.sample(1000)


@pytest.mark.parametrize("buffer_size, adds", [(60, 25), (60, 200)])
def test_uniform_over_all_windows_of_all_rings(buffer_size: int, adds: int) -> None:
    """Rings of different length, before and after wrapping: each window is equally likely."""
    driver = Driver(2, buffer_size, 4, seed=7)
    for i in range(adds):
        # Only the first environment has ends of episodes, and so more rows
        driver.add([DONE if i % 5 == 4 else STEP, STEP])
    drain(driver.buffer)
    _, windows, _ = driver.reference.windows()
    draws = 400 * len(windows)
    samples = driver.buffer.sample(draws)
    drawn = list(zip(samples.envs.tolist(), samples.starts.tolist(), strict=True))
    assert set(drawn) == windows
    counts = np.array([drawn.count(window) for window in windows])
    freedom = len(windows) - 1
    chi_square = ((counts - 400) ** 2 / 400).sum()
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("recency", [1.0, 0.25])
def test_a_share_of_the_windows_is_drawn_by_its_age(recency: float) -> None:
    """With log((age + 1) / age) / log(windows + 1), about 1 / age; each ring as often as without."""
    driver = Driver(2, 120, 4, seed=7)
    for i in range(40):
        driver.add([DONE if i % 5 == 4 else STEP, STEP])
    drain(driver.buffer)
    plain = driver.buffer.sample(4000)
    driver.buffer.recency = recency
    samples = driver.buffer.sample(20_000)
    assert samples.envs.mean() == pytest.approx(plain.envs.mean(), abs=0.03)
    for env in range(2):
        starts = samples.starts[samples.envs == env]
        newest = int(driver.buffer.rows_added[env]) - 4
        ages = np.arange(1, newest + 1)  # a full window starts at row 1 or later
        share = recency * np.log1p(1 / ages) / np.log(len(ages) + 1) + (1 - recency) / len(ages)
        counts = np.array([(newest - age + 1 == starts).sum() for age in ages])
        assert counts.sum() == len(starts)
        chi_square = ((counts - share * len(starts)) ** 2 / (share * len(starts))).sum()
        assert abs(chi_square - len(ages)) < 5 * np.sqrt(2 * len(ages))


def test_windows_by_age_are_stored_ones() -> None:
    """Before a full window is stored, and after the ring has wrapped; finished windows still come first."""
    driver = Driver(2, 24, 3)  # 12 rows per environment
    driver.buffer.recency = 1.0
    for i in range(40):
        driver.add([STEP, STEP])
        if i % 7 == 0:
            drain(driver.buffer)
            samples = driver.buffer.sample(50)
            _, windows, _ = driver.reference.windows()
            assert set(zip(samples.envs.tolist(), samples.starts.tolist(), strict=True)) <= windows
    for _ in range(1000 - 39):
        driver.add([STEP, STEP])
    assert driver.buffer.sample(4).starts.tolist() == [993, 993, 997, 997]


def test_another_length_of_windows() -> None:
    """Those that were queued with the length before are forgotten; a wrong length changes nothing."""
    driver = Driver(1, 40, 3)
    for _ in range(8):
        driver.add([STEP])
    queued = len(driver.buffer.windows.queue)
    driver.buffer.batch_length = 3  # as it is
    with pytest.raises(ValueError, match="batch_length must be .* at least 1"):
        driver.buffer.batch_length = 0
    assert len(driver.buffer.windows.queue) == queued > 0 and driver.buffer.sample(1).rewards.shape == (1, 3)
    driver.buffer.batch_length = 5
    assert not driver.buffer.windows.queue and driver.buffer.sample(2).rewards.shape == (2, 5)


@pytest.mark.parametrize("wrong", [-0.1, 1.5, float("nan"), "0.5", None, True])
def test_wrong_recency_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"recency must be a number in \[0"):
        SequenceReplayBuffer(10, FLAT, ACTIONS, recency=wrong)


def test_online_queue_serves_every_row_once() -> None:
    """One window per finished batch_length + 1 rows, in order, each once; then uniform ones."""
    driver = Driver(1, 100, 3)
    for _ in range(13):
        driver.add([STEP])
    assert driver.buffer.sample(2).starts.tolist() == [1, 5]
    assert driver.buffer.sample(1).starts.tolist() == [9]
    later = {int(driver.buffer.sample(1).starts[0]) for _ in range(200)}
    assert later == set(range(1, 11))


def test_online_queue_skips_overwritten_windows_and_stays_short() -> None:
    driver = Driver(2, 24, 3)  # 12 rows per environment
    for _ in range(1001):
        driver.add([STEP, STEP])
    # Rows 989..1000 are left. The window of rows 988..991 lost its context, the next two are whole
    assert driver.buffer.sample(4).starts.tolist() == [993, 993, 997, 997]
    assert len(driver.buffer.windows.queue) == 0
    for _ in range(1001):
        driver.add([STEP, STEP])
    assert len(driver.buffer.windows.queue) <= 6


@pytest.mark.parametrize("n_envs", [1, 3])
def test_training_is_possible_after_one_step(n_envs: int) -> None:
    driver = Driver(n_envs, 100, 64)
    driver.add([STEP] * n_envs, staged=True)
    assert not driver.buffer.has_window()
    samples = driver.buffer.sample(16)
    assert samples.rewards.shape == (16, 1) and samples.is_first.all()
    assert set(samples.envs.tolist()) == set(range(n_envs))


def test_buffer_of_one_row() -> None:
    driver = Driver(1, 1, 64)
    for ops in ([STEP], [STEP], [DONE], [STEP]):
        driver.add(ops)
        samples = driver.buffer.sample(2)
        check_samples(driver, samples, 2)
        assert samples.is_first.all() and not samples.prev_actions.any()
    assert SequenceReplayBuffer(1, DICT, ACTIONS, "cpu", n_envs=4).buffer_size == 1


def test_types_of_samples() -> None:
    driver = Driver(2, 100, 4)
    for _ in range(10):
        driver.add([STEP, DONE])
    samples = driver.buffer.sample(3)
    assert isinstance(samples.observations, dict)
    assert {key: tuple(value.shape) for key, value in samples.observations.items()} == {
        "scalar": (3, 4),
        "table": (3, 4, 2, 2),
    }
    types = {name: getattr(samples, name).dtype for name in samples._fields[1:]}
    assert types == {
        "prev_actions": th.float32,
        "rewards": th.float32,
        "is_first": th.bool,
        "is_last": th.bool,
        "is_terminal": th.bool,
        "deter": th.float32,
        "stoch": th.int64,
        "envs": np.int64,
        "starts": np.int64,
    }


def test_samples_do_not_share_memory_with_the_buffer() -> None:
    driver = Driver(1, 100, 4)
    for _ in range(10):
        driver.add([STEP], staged=True)
    before = {name: copy.deepcopy(getattr(driver.buffer, name)) for name in ARRAYS}
    samples = driver.buffer.sample(3)
    for value in (*samples[1:8], *samples.observations.values()):
        value.zero_()
    for name in ARRAYS:
        now = getattr(driver.buffer, name)
        for key in now if isinstance(now, dict) else [...]:
            np.testing.assert_array_equal(now[key], before[name][key])


def test_seed_repeats_sampling() -> None:
    def starts(seed: int | None) -> list[int]:
        np.random.seed(3)  # what SB3 does with the seed of the model
        driver = Driver(1, 500, 4, seed=seed)
        for _ in range(100):
            driver.add([STEP])
        drain(driver.buffer)
        return driver.buffer.sample(50).starts.tolist()

    assert starts(0) == starts(0)
    assert starts(0) != starts(1)
    assert starts(None) == starts(None)


def test_empty_buffer_cannot_be_sampled() -> None:
    buffer = Driver(1, 10, 2).buffer
    with pytest.raises(ValueError, match="empty"):
        buffer.sample(1)
    assert not buffer.has_window()


class TwoKeys(gym.Env):
    """Counts its steps in one key that is normalized and in one that is not."""

    observation_space = spaces.Dict(a=spaces.Box(-np.inf, np.inf, (2,), np.float64), b=spaces.Box(-np.inf, np.inf, ()))
    action_space = ACTIONS

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        self.count = 0.0
        return self.obs(), {}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        self.count += 1
        return self.obs(), 3 * self.count, False, self.count > 6, {}

    def obs(self) -> dict[str, Any]:
        return {"a": np.array([self.count, -10 * self.count]), "b": np.float32(self.count)}


@pytest.mark.parametrize("plain", [True, False])
def test_vec_normalize(plain: bool) -> None:
    """Stored as they came, normalized with today's statistics when sampled, in float32."""
    env: Any
    if plain:
        env = VecNormalize(gym_vec_of_a(), clip_obs=1.5)
    else:
        env = VecNormalize(DummyVecEnv([TwoKeys, TwoKeys]), norm_obs_keys=["a"], clip_obs=1.5)
    buffer: Any = SequenceReplayBuffer(200, env.observation_space, ACTIONS, "cpu", n_envs=2, batch_length=5, seed=0, **STORAGE)
    env.reset()
    obs = copy.deepcopy(env.get_original_obs())
    for _ in range(30):
        _, _, dones, infos = env.step(np.zeros((2, ACTION_DIM)))
        next_obs = copy.deepcopy(env.get_original_obs())
        buffer.add(obs, next_obs, np.zeros((2, ACTION_DIM)), env.get_original_reward(), dones, infos)
        obs = next_obs
    twin = copy.deepcopy(buffer)
    raw, samples = twin.sample(8), buffer.sample(8, env=env)
    raw_obs = raw.observations if plain else raw.observations["a"]
    got = samples.observations if plain else samples.observations["a"]
    rms = env.obs_rms if plain else env.obs_rms["a"]
    expected = np.clip((raw_obs.numpy() - rms.mean) / np.sqrt(rms.var + env.epsilon), -1.5, 1.5)
    assert got.dtype == th.float32 and got.shape == (8, 5, 2)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert np.abs(expected - raw_obs.numpy()).max() > 1
    if not plain:
        np.testing.assert_array_equal(samples.observations["b"], raw.observations["b"])
    assert samples.rewards.dtype == th.float32
    scaled = np.clip(raw.rewards.numpy() / np.sqrt(env.ret_rms.var + env.epsilon), -10, 10)
    np.testing.assert_allclose(samples.rewards.numpy(), scaled, rtol=1e-5)
    assert np.abs(scaled - raw.rewards.numpy()).max() > 1


def gym_vec_of_a() -> DummyVecEnv:
    def make() -> gym.Env:
        return gym.wrappers.TransformObservation(TwoKeys(), lambda obs: obs["a"], TwoKeys.observation_space["a"])

    return DummyVecEnv([make, make])


# ---------------------------------------------------------------- rows


def one_env(space: spaces.Space, actions: spaces.Space = ACTIONS, **kwargs: Any) -> Any:
    return SequenceReplayBuffer(20, space, actions, "cpu", **{"batch_length": 3, "seed": 0, **STORAGE, **kwargs})


def vec_obs(space: spaces.Space, n_envs: int) -> Any:
    """Observations as SB3's vectorised environments stack them."""
    if isinstance(space, spaces.Dict):
        return {key: vec_obs(subspace, n_envs) for key, subspace in space.spaces.items()}
    return np.stack([space.sample() for _ in range(n_envs)])


@pytest.mark.parametrize(
    "space, shape, dtype",
    [
        (spaces.Box(0, 255, (3, 16, 16), np.uint8), (3, 16, 16), np.uint8),
        (spaces.Box(-1, 1, (4,), np.float64), (4,), np.float32),
        (spaces.Box(-1, 1, (4,), np.float32), (4,), np.float32),
        (spaces.Box(-1, 1, (), np.float64), (), np.float32),
        (spaces.Box(-9, 9, (8, 2), np.int16), (8, 2), np.int16),
        (spaces.Discrete(500), (1,), np.int64),
        (spaces.MultiDiscrete([3, 4]), (2,), np.int64),
        (spaces.MultiBinary(5), (5,), np.int8),
        (spaces.MultiBinary([3, 2]), (3, 2), np.int8),
        (spaces.Box(-1, 1, (0,), np.float32), (0,), np.float32),
    ],
)
@pytest.mark.parametrize("in_dict", [False, True])
@pytest.mark.parametrize("n_envs", [1, 2])
def test_observation_spaces(space: spaces.Space, shape: tuple, dtype: type, in_dict: bool, n_envs: int, storage: str) -> None:
    full_space = spaces.Dict({"x": space, "other": FLAT}) if in_dict else space
    buffer = one_env(full_space, n_envs=n_envs)
    sequence = [vec_obs(full_space, n_envs) for _ in range(5)]
    for obs, next_obs in zip(sequence, sequence[1:], strict=False):
        buffer.add(obs, next_obs, np.zeros((n_envs, 2)), np.zeros(n_envs), np.zeros(n_envs, bool), [{}] * n_envs)
    stored = buffer.observations["x"] if in_dict else buffer.observations
    assert stored.shape == (20 // n_envs if storage == "host" else 4, n_envs, *shape) and stored.dtype == dtype
    got = buffer.sample(2).observations
    assert isinstance(got, dict) == in_dict
    got = got["x"] if in_dict else got
    assert tuple(got.shape) == (2, 3, *shape) and got.numpy().dtype == dtype
    for n in range(4):
        expected = (sequence[n]["x"] if in_dict else sequence[n]).reshape(n_envs, *shape).astype(dtype)
        np.testing.assert_array_equal(stored[n], expected)


@pytest.mark.parametrize(
    "space, given_shape, dim, dtype",
    [
        (spaces.Box(-5, 5, (3,), np.float64), (3,), 3, np.float32),
        (spaces.Box(-5, 5, (2, 3), np.float32), (2, 3), 6, np.float32),
        (spaces.Box(-5, 5, (2,), np.int32), (2,), 2, np.float32),
        (spaces.Discrete(4), (), 1, np.int64),
        (spaces.Discrete(4), (1,), 1, np.int64),
        (spaces.MultiDiscrete([3, 4]), (2,), 2, np.int64),
        (spaces.MultiBinary(3), (3,), 3, np.int8),
    ],
)
def test_action_spaces(space: spaces.Space, given_shape: tuple, dim: int, dtype: type, storage: str) -> None:
    buffer = one_env(FLAT, space, n_envs=2)
    size = (2, *given_shape)
    action = np.linspace(-0.9, 0.9, np.prod(size)).reshape(size) if dtype == np.float32 else np.ones(size, dtype)
    buffer.add(np.zeros((2, 2)), np.zeros((2, 2)), action, np.zeros(2), np.zeros(2, bool), [{}, {}])
    assert buffer.actions.shape == (10 if storage == "host" else 1, 2, dim) and buffer.actions.dtype == dtype
    np.testing.assert_array_equal(buffer.actions[0], action.reshape(2, dim).astype(dtype))


@pytest.mark.parametrize("handle, terminal", [(True, False), (False, True)])
def test_handle_timeout_termination(handle: bool, terminal: bool) -> None:
    buffer = one_env(FLAT, handle_timeout_termination=handle)
    buffer.add(np.zeros((1, 2)), np.ones((1, 2)), np.zeros((1, 2)), [1.0], [True], [{"TimeLimit.truncated": True}])
    samples = buffer.sample(1)
    assert samples.is_last.tolist() == [[False, True]]
    assert samples.is_terminal.tolist() == [[False, terminal]]


def test_a_row_that_continues_nothing_is_first() -> None:
    """Also if the agent thinks otherwise, as it may after a buffer was replaced in mid-episode."""
    driver = Driver(1, 20, 3)
    driver.buffer.stage(np.array([False]), np.ones((1, D)), np.ones((1, K), int))
    driver.add([STEP])
    assert driver.buffer.is_first[0, 0]


def test_stage_counts_for_one_add_only() -> None:
    driver = Driver(1, 20, 3)
    driver.add([STEP], staged=True)
    driver.add([STEP])
    assert driver.buffer.stoch[0].max() < C
    assert (driver.buffer.stoch[1] == driver.buffer.no_latent).all() and not driver.buffer.is_first[1, 0]


def test_arguments_are_copied_and_left_alone() -> None:
    space = spaces.Dict({"n": spaces.Discrete(9), "x": FLAT})
    buffer = one_env(space)
    arguments: dict[str, Any] = {
        "obs": {"x": np.full((1, 2), 1.5), "n": np.array([1])},
        "next_obs": {"x": np.full((1, 2), 2.5), "n": np.array([2])},
        "action": np.full((1, 2), 0.5, np.float32),
        "reward": np.array([3.0], np.float32),
        "done": np.array([False]),
        "infos": [{}],
    }
    latents: list[Any] = [np.array([True]), np.ones((1, 1), np.float32), th.ones((1, 1), dtype=th.int64)]
    before = copy.deepcopy((arguments, latents))
    buffer.stage(*latents)
    for value in latents:
        value[:] = 0
    buffer.add(**arguments)
    assert arguments["obs"]["n"].shape == (1,)
    for key in ("obs", "next_obs"):
        for name in ("x", "n"):
            np.testing.assert_array_equal(arguments[key][name], before[0][key][name])
            arguments[key][name][:] = 7
    for key in ("action", "reward", "done"):
        np.testing.assert_array_equal(arguments[key], before[0][key])
        arguments[key][:] = 7
    # The pending observation and reward come to light when the episode is cut
    buffer.stage(np.array([True]), np.ones((1, 1)), np.ones((1, 1), int))
    buffer.add(**arguments)
    assert isinstance(buffer.observations, dict)
    assert buffer.observations["n"][:3, 0, 0].tolist() == [1, 2, 7]
    assert buffer.observations["x"][:3, 0, 0].tolist() == [1.5, 2.5, 7]
    assert (buffer.rewards[:3, 0].tolist(), buffer.dones[:3, 0].tolist()) == ([0, 3, 0], [0, 1, 0])
    assert (buffer.actions[0, 0, 0], buffer.deter[0, 0, 0], buffer.stoch[0, 0, 0]) == (0.5, 1, 1)


# ---------------------------------------------------------------- latents


@pytest.mark.parametrize("classes, dtype", [(2, np.uint8), (254, np.uint8), (255, np.uint16), (300, np.uint16)])
def test_every_class_can_be_stored(classes: int, dtype: type) -> None:
    buffer = one_env(FLAT, classes=classes, stoch=2, batch_length=1)
    for stoch in ([[0, classes - 1]], [[-1, -1]]):
        buffer.stage(np.array([False]), np.ones((1, 1)), np.array(stoch))
        buffer.add(np.zeros((1, 2)), np.zeros((1, 2)), np.zeros((1, 2)), [1.0], [False], [{}])
    assert buffer.stoch.dtype == dtype
    first, second = (buffer._latents(buffer.rows.locate(np.array([0]), np.array([number]))) for number in (0, 1))
    assert (first[0].tolist(), first[1].tolist()) == ([[1]], [[0, classes - 1]])
    assert (second[0].tolist(), second[1].tolist()) == ([[0]], [[-1, -1]])


def test_later_window_of_a_batch_wins() -> None:
    driver = Driver(1, 30, 4)
    for _ in range(10):
        driver.add([STEP])
    deter = np.stack([np.full((4, D), 10.0), np.full((4, D), 20.0)])
    stoch = np.stack([np.full((4, K), 1), np.full((4, K), 2)])
    driver.buffer.update_latents(np.array([0, 0]), np.array([3, 1]), deter, stoch)
    assert driver.buffer.deter[1:7, 0, 0].tolist() == [20, 20, 20, 20, 10, 10]
    assert driver.buffer.stoch[1:7, 0, 0].tolist() == [2, 2, 2, 2, 1, 1]


def test_update_latents_takes_tensors_of_any_precision() -> None:
    driver = Driver(1, 30, 4)
    for _ in range(10):
        driver.add([STEP])
    samples = driver.buffer.sample(2)
    deter = th.full((2, 4, D), 0.5, dtype=th.bfloat16, requires_grad=True)
    driver.buffer.update_latents(samples.envs, samples.starts, deter, th.ones((2, 4, K), dtype=th.int64))
    assert (driver.buffer.deter[samples.starts[0], 0] == 0.5).all()


def test_latents_that_come_after_reset_are_dropped() -> None:
    driver = Driver(1, 30, 4)
    for _ in range(10):
        driver.add([STEP])
    driver.buffer.reset()
    driver.buffer.update_latents(np.array([0]), np.array([3]), np.ones((1, 4, D)), np.ones((1, 4, K), int))
    assert not driver.buffer.deter.any()


# ---------------------------------------------------------------- memory


def test_arrays_are_allocated_on_first_use(storage: str) -> None:
    buffer = Driver(2, 20, 3).buffer
    assert issubclass(SequenceReplayBuffer, ReplayBuffer)
    assert buffer.size() == 0 and not buffer.has_window()
    buffer.stage(np.zeros(2, bool), np.ones((2, D)), np.ones((2, K), int))
    buffer = copy.deepcopy(pickle.loads(pickle.dumps(buffer)))
    assert not buffer.rows.allocated
    for name in ARRAYS:
        array = getattr(copy.deepcopy(buffer), name)
        for each in array.values() if isinstance(array, dict) else [array]:
            assert each.shape[:2] == (10 if storage == "host" else 0, 2) and not each.any()
    driver = Driver(2, 20, 3)
    driver.add([STEP, STEP])
    assert driver.buffer.rows.allocated
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        driver.buffer.nonsense  # noqa: B018


@host_only
def test_memory_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before the arrays are made, and with everything counted."""
    needed = 1000 * (4 + 16 + 4 * ACTION_DIM + 3 * 4 + 1 + 4 * D + K)

    def with_memory(available: int) -> SequenceReplayBuffer:
        memory = SimpleNamespace(available=available)
        monkeypatch.setattr(replay.rows, "psutil", SimpleNamespace(virtual_memory=lambda: memory))
        return Driver(2, 1000, 3).buffer

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert with_memory(needed).actions.shape == (500, 2, ACTION_DIM)
        tight = with_memory(needed - 1)
        monkeypatch.setattr(replay.rows, "psutil", None)
        assert Driver(2, 1000, 3).buffer.actions.shape == (500, 2, ACTION_DIM)
    with_memory(needed - 1)
    with pytest.warns(UserWarning, match=r"enough memory to store the complete replay buffer 0\.00GB > 0\.00GB"):
        assert tight.actions.shape == (500, 2, ACTION_DIM)


def test_pickle_holds_only_what_is_filled(tmp_path: Any, storage: str) -> None:
    buffer: Any = SequenceReplayBuffer(1_000_000, FLAT, ACTIONS, "cpu", seed=0, deter=16, **STORAGE)
    for _ in range(100):
        buffer.add(np.ones((1, 2)), np.ones((1, 2)), np.zeros((1, 2)), [1.0], [False], [{}])
    path = tmp_path / "buffer.pkl"
    save_to_pkl(path, buffer)
    assert path.stat().st_size < 50_000
    loaded = load_from_pkl(path)
    assert loaded.buffer_size == 1_000_000 and loaded.observations.shape == (100, 1, 2)
    np.testing.assert_array_equal(loaded.observations, buffer.observations[:100])
    np.testing.assert_array_equal(loaded.rewards, buffer.rewards[:100])
    # Only the copies may have been cut
    if storage == "host":
        assert len(buffer.observations) == replay.rows.FIRST_ROWS
    else:
        assert len(buffer.rows.read_observations(slice(None))[""]) == 1_000_000


@host_only
def test_arrays_grow_with_what_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Far more rows than fit into the memory may be allowed; an error on the way loses nothing."""
    monkeypatch.setattr(replay.rows, "FIRST_ROWS", 4)
    monkeypatch.setattr(replay.rows, "psutil", None)
    driver = Driver(2, 10**13, 3)
    lengths = set()
    for i in range(40):
        driver.add([STEP, DONE if i % 3 == 2 else STEP], staged=True)
        lengths.add(len(driver.buffer.rewards))
    assert lengths == {4, 8, 16, 32, 64}
    check_arrays(driver)

    def no_memory(array: np.ndarray, rows: int) -> np.ndarray:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(replay.rows, "_lengthened", no_memory)
        with pytest.raises(MemoryError, match="holds 128 of 10,000,000,000,000 rows.*smaller buffer_size"):
            for _ in range(40):
                driver.add([STEP, DONE])
    assert driver.buffer.stored_rows().max() == 63 and driver.buffer.sample(4).rewards.shape == (4, 3)

    lengthened, left = replay.rows._lengthened, [2]

    def little_memory(array: np.ndarray, rows: int) -> np.ndarray:
        left[0] -= 1
        return lengthened(array, rows) if left[0] >= 0 else no_memory(array, rows)

    with monkeypatch.context() as patch:  # two arrays are lengthened, the others not: nothing is lost, and they are later
        patch.setattr(replay.rows, "_lengthened", little_memory)
        for _ in range(2):
            with pytest.raises(MemoryError, match="holds 128 of"):
                driver.add([STEP, DONE])
    stored = int(driver.buffer.stored_rows().min())
    before = driver.buffer.rewards[:stored].copy()
    driver.add([STEP, DONE])
    assert {len(x) for x in [*driver.buffer.observations.values(), driver.buffer.rewards, driver.buffer.deter]} == {128}
    np.testing.assert_array_equal(driver.buffer.rewards[:stored], before)


@host_only
def test_arrays_grow_one_at_a_time() -> None:
    """Those of a loaded buffer at its first step: all are as long as what was stored."""
    sizes = {"deter": 64, "stoch": 8, "classes": 4, "batch_length": 4}
    buffer = SequenceReplayBuffer(100_000, spaces.Box(-1, 1, (64,)), spaces.Box(-1, 1, (64,)), n_envs=1, **sizes)
    numbers = np.zeros((1, 64), np.float32)
    transition = numbers, numbers, numbers, np.zeros(1), np.zeros(1), [{}]
    for _ in range(2000):
        buffer.add(*transition)
    saved = pickle.dumps(buffer)
    del buffer
    tracemalloc.start()
    loaded = pickle.loads(saved)
    before, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    loaded.add(*transition)
    after, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after > 1.9 * before  # twice as long
    assert peak < after + 0.5 * before  # three arrays are as large as that, and one of them is there twice


def test_load_then_reset_closes_the_open_episode() -> None:
    """The transition that was under way when the buffer was saved is kept, as an episode that was cut."""
    driver = Driver(1, 20, 3)
    driver.add([STEP], staged=True)
    driver.add([CUT], staged=True)
    driver.buffer = pickle.loads(pickle.dumps(driver.buffer))
    driver.add([STEP])
    check_arrays(driver)
    assert driver.buffer.dones[:4, 0].tolist() == [0, 0, 1, 0] and driver.buffer.timeouts[2, 0] == 1


def test_reset_empties_everything() -> None:
    driver = Driver(2, 20, 3)
    for _ in range(30):
        driver.add([STEP, DONE], staged=True)
    driver.buffer.stage(np.ones(2, bool), np.ones((2, D)), np.ones((2, K), int))
    driver.buffer.reset()
    assert not driver.buffer.rows.allocated and driver.buffer.size() == 0 and driver.buffer.rows_added.tolist() == [0, 0]
    fresh = Driver(2, 20, 3)
    fresh.buffer, driver.buffer.rng = driver.buffer, np.random.default_rng(0)
    for _ in range(12):
        fresh.add([STEP, STEP])
    check_queue(fresh, fresh.buffer.sample(4))
    check_arrays(fresh)


def test_extend_like_sb3() -> None:
    """As SB3's own test of saved buffers extends a buffer by the arrays of its copy, but with observations that follow."""
    driver = Driver(1, 50, 3, FLAT)
    for i in range(15):
        driver.add([TIMEOUT if i % 5 == 4 else STEP])
    old = copy.deepcopy(driver.buffer)
    infos = [[{"TimeLimit.truncated": truncated}] for truncated in old.timeouts]
    following = np.concatenate([old.observations[1:], old.observations[-1:]])
    driver.buffer.extend(old.observations, following, old.actions, old.rewards, old.dones, infos)
    # 15 + 3 rows before; as many more, with 3 ends of episodes among them
    assert driver.buffer.rows_added.tolist() == [18 + 18 + 3]
    assert not driver.buffer.full and driver.buffer.size() == 39
    assert driver.buffer.sample(4).rewards.shape == (4, 3)


def test_transitions_that_do_not_follow_each_other() -> None:
    """Each is an episode of its own that was cut, with its last observation and reward; there is one warning."""
    buffer = one_env(FLAT, batch_length=1)
    obs = np.arange(12.0).reshape(6, 1, 2)
    with pytest.warns(UserWarning, match="not the next one of the transition before") as told:
        for t in (3, 0, 1, 4):
            buffer.add(obs[t], obs[t + 1], np.zeros((1, 2)), [float(t)], [False], [{}])
    assert len(told) == 1
    rows = slice(0, buffer.size())
    assert buffer.observations[rows, 0, 0].tolist() == [6, 8, 0, 2, 4, 8]  # 3, 4; 0, 1, 2; 4
    assert buffer.rewards[rows, 0].tolist() == [0, 3, 0, 0, 1, 0]
    assert buffer.is_first[rows, 0].tolist() == [True, False, True, False, False, True]
    assert buffer.dones[rows, 0].tolist() == [False, True, False, False, True, False]
    assert buffer.timeouts[rows, 0].tolist() == [False, True, False, False, True, False]


@pytest.mark.parametrize("space", [FLAT, spaces.Discrete(5)])
def test_one_environment_needs_no_axis_of_its_own(space: spaces.Space) -> None:
    """As Gymnasium gives transitions; Stable-Baselines3's buffers take them, too."""
    with_axis, without = (one_env(space, batch_length=1) for _ in range(2))
    obs = [np.asarray(space.sample()) for _ in range(4)]
    for t in range(3):
        action, reward, done = np.array([0.5, -0.5]), float(t), t == 2
        with_axis.add(obs[t][None], obs[t + 1][None], action[None], np.array([reward]), np.array([done]), [{}])
        without.add(obs[t], obs[t + 1], action, reward if t else np.array([[reward]]), done, {} if t else [{}])
    for name in ("observations", "actions", "rewards", "dones"):
        assert np.array_equal(getattr(with_axis, name)[:4], getattr(without, name)[:4]), name


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"optimize_memory_usage": True}, "optimize_memory_usage.*not needed.*once.*allowed: False"),
        ({"batch_length": 0}, "batch_length"),
    ],
)
def test_wrong_settings(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceReplayBuffer(10, FLAT, ACTIONS, "cpu", **kwargs)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"obs": {"scalar": np.zeros((2, 1)), "table": np.zeros((2, 2, 2))}}, r"obs\['scalar'\].*\(2,\).*\(2, 1\)"),
        ({"obs": {"scalar": np.zeros(2)}}, r"obs\['table'\].*\(2, 2, 2\).*no such key.*scalar"),
        ({"obs": {"scalar": np.zeros(2), "table": np.zeros((2, 4))}}, r"obs\['table'\].*\(2, 2, 2\).*\(2, 4\)"),
        ({"next_obs": {"scalar": np.zeros(3), "table": np.zeros((2, 2, 2))}}, r"next_obs\['scalar'\].*\(2,\).*\(3,\)"),
        ({"action": np.zeros((2, 3))}, r"action.*\(2, 2\).*\(2, 3\)"),
        ({"reward": np.zeros((2, 1))}, r"reward.*\(2,\).*\(2, 1\)"),
        ({"done": np.zeros(3)}, r"done.*\(2,\).*\(3,\)"),
        ({"infos": [{}]}, r"infos.*2.*1"),
    ],
)
def test_wrong_shapes_write_nothing(change: dict, message: str) -> None:
    driver = Driver(2, 20, 3)
    driver.add([STEP, DONE], staged=True)
    before = copy.deepcopy(driver.buffer)
    arguments: dict[str, Any] = {
        "obs": make_obs(DICT, np.array([1.0, 2.0])),
        "next_obs": make_obs(DICT, np.array([3.0, 4.0])),
        "action": np.zeros((2, 2)),
        "reward": np.zeros(2),
        "done": np.array([True, False]),
        "infos": [{}, {}],
    }
    with pytest.raises(ValueError, match=message):
        driver.buffer.add(**{**arguments, **change})
    assert driver.buffer.rows_added.tolist() == [1, 2]
    assert_same_arrays(driver.buffer, before)
    driver.add([STEP, STEP])
    check_arrays(driver)


def test_wrong_shape_of_a_plain_observation_is_named() -> None:
    image = spaces.Box(0, 255, (3, 16, 16), np.uint8)
    rest: Any = (np.zeros((1, 2)), [0.0], [False], [{}])
    good, channels_last = np.zeros((1, 3, 16, 16), np.uint8), np.zeros((1, 16, 16, 3), np.uint8)
    with pytest.raises(ValueError, match=r"^next_obs: expected shape \(1, 3, 16, 16\), received \(1, 16, 16, 3\)"):
        one_env(image).add(good, channels_last, *rest)


@pytest.mark.parametrize(
    "is_first, deter, stoch, name",
    [((3,), (2, D), (2, K), "is_first"), ((2,), (D,), (2, K), "deter"), ((2,), (2, D), (2, K + 1), "stoch")],
)
def test_wrong_shapes_of_latents(is_first: tuple, deter: tuple, stoch: tuple, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Driver(2, 20, 3).buffer.stage(np.zeros(is_first), np.zeros(deter), np.zeros(stoch, int))


@pytest.mark.parametrize(
    "deter, stoch, name",
    [((2, 4, D + 1), (2, 4, K), "deter"), ((1, 4, D), (2, 4, K), "deter"), ((2, 4, D), (2, 3, K), "stoch")],
)
def test_wrong_shapes_of_new_latents(deter: tuple, stoch: tuple, name: str) -> None:
    driver = Driver(1, 30, 4)
    for _ in range(10):
        driver.add([STEP])
    with pytest.raises(ValueError, match=name):
        driver.buffer.update_latents(np.array([0, 0]), np.array([1, 2]), np.zeros(deter), np.zeros(stoch, int))
