"""Updates and steps of acting that are recorded once and replayed, as CUDA graphs are, compute what they compute otherwise.

The tape (``tape.py``) stands for a CUDA graph on the processor.
"""

from __future__ import annotations

import copy
import itertools
import pickle
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from tape import Tape
from test_dreamer_gpld import BOX, TINY, RandomSpaces, tiny
from test_meta import CASES, VECTOR, case
from torch.utils._pytree import tree_map

from sb3_dreamer_gpld import DreamerGPLD, execution
from sb3_dreamer_gpld.execution import Execution
from sb3_dreamer_gpld.learner import Learner
from sb3_dreamer_gpld.nets.gpld import penalty_weight
from sb3_dreamer_gpld.nets.steps import Runner
from sb3_dreamer_gpld.nets.world_model import PenaltyWeights
from sb3_dreamer_gpld.optim import LaProp

LEARNED = dict(train_ratio=32.0, learning_rate=lambda left: 1e-3 * left, learning_rate_warmup=10, penalty_schedule="linear")


def recorded(model: DreamerGPLD) -> Tape:
    """Record what the model does whole from now on."""
    model.learner.execution.recorder = tape = Tape()
    return tape


def assert_equal(one: DreamerGPLD, two: DreamerGPLD) -> None:
    """Of two models, all parameters and buffers, the optimiser's state, and the buffers' latents."""
    for name, value in one.policy.state_dict().items():
        assert th.equal(value, two.policy.state_dict()[name]), name
    states = [model.policy.optimizer.state_dict()["state"] for model in (one, two)]
    for index, state in states[0].items():
        for name, value in state.items():
            assert th.equal(value, states[1][index][name]), (index, name)
    assert np.array_equal(one.replay_buffer.deter, two.replay_buffer.deter)
    assert np.array_equal(one.replay_buffer.stoch, two.replay_buffer.stoch)


def model_of(name: str, **options: Any) -> DreamerGPLD:
    """The model of a case, whose rates and λ change from update to update."""
    return case(name, **{**LEARNED, **options})


IN_BFLOAT16 = ("vectors", "images", "dynamics")


@pytest.mark.parametrize(
    ("name", "precision"), [*((name, "float32") for name in CASES), *((name, "bfloat16") for name in IN_BFLOAT16)]
)
def test_recorded_training_is_the_same(name: str, precision: str) -> None:
    """To the last bit, with learning rates, λ, entropy's coefficient and percentiles that change from update to update."""
    plain = model_of(name, precision=precision).learn(60, log_interval=None)
    other = model_of(name, precision=precision)
    tape = recorded(other)
    other.learn(60, log_interval=None)
    assert tape.recordings == 2  # an update and a step of acting
    assert tape.replays > plain._n_updates and plain._n_updates > 10
    assert_equal(plain, other)
    assert plain.learner.metrics.take() == other.learner.metrics.take()


def test_several_environments() -> None:
    plain = tiny(make_vec_env("Pendulum-v1", 3), **LEARNED).learn(90, log_interval=None)
    other = tiny(make_vec_env("Pendulum-v1", 3), **LEARNED)
    recorded(other)
    assert_equal(plain, other.learn(90, log_interval=None))


def without_rates(self: LaProp, *args: Any) -> None:
    self.rates = None
    return STEP(self, *args)


STEP, LOSS, DRAW = LaProp.step, Learner.weighted_loss, Learner.draw


def calls(self: Learner, name: str) -> int:
    """How often Python has come here: at each plain update, and never again once it is recorded."""
    counter = self.__dict__.setdefault(f"_{name}_calls", itertools.count())
    return next(counter)


def with_own_lambda(self: Learner, batch: Any, draws: Any, weights: PenaltyWeights) -> Any:
    own = penalty_weight(self.config.penalty, self.config.penalty.posterior, calls(self, "loss"))
    return LOSS(self, batch, draws, PenaltyWeights(own, None))


def of_numpy(self: Learner, *sizes: int) -> Any:
    generator = np.random.default_rng(calls(self, "draw"))
    draws = DRAW(self, *sizes)

    def own(x: Any) -> Any:
        drawn = isinstance(x, th.Tensor) and x.is_floating_point()
        return th.from_numpy(generator.random(x.shape)).to(x) if drawn else x

    return tree_map(own, draws)


@pytest.mark.parametrize(
    ("where", "name", "fault"),
    [
        (LaProp, "step", without_rates),
        (Learner, "weighted_loss", with_own_lambda),
        (Learner, "draw", of_numpy),
    ],
    ids=["learning rate", "λ", "random numbers"],
)
def test_a_number_that_is_baked_in_is_found(where: Any, name: str, fault: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each planted fault makes the recorded run differ from a plain one that has it, too."""
    monkeypatch.setattr(where, name, fault)
    plain, again = (model_of("vectors").learn(60, log_interval=None) for _ in range(2))
    assert_equal(plain, again)
    other = model_of("vectors")
    tape = recorded(other)
    other.learn(60, log_interval=None)
    assert tape.replays > 20
    with pytest.raises(AssertionError):
        assert_equal(plain, other)


def test_it_is_recorded_anew_when_something_changes(tmp_path: Path) -> None:
    model = model_of("vectors", train_ratio=0.0)
    model.learn(40, log_interval=None)
    tape = recorded(model)

    def recordings_after(updates: int = 6) -> int:
        before = tape.recordings
        model.train(updates, 4)
        return tape.recordings - before

    assert recordings_after(2) == 0, "the first updates are not recorded"
    assert recordings_after() == 1 and recordings_after() == 0
    model.penalty_start = 10**9  # λ is 0 until then: a number, and no reason
    assert recordings_after() == 0
    model.posterior_penalty = 0.0
    assert recordings_after() == 1
    model.set_parameters(copy.deepcopy(model.get_parameters()))  # another optimiser's state
    assert recordings_after() == 1
    model.precision = "bfloat16"
    assert recordings_after() == 1
    model.gamma = 0.5
    assert recordings_after() == 1
    model.policy.world_model.reward.requires_grad_(False)
    assert recordings_after() == 1
    model.batch_size = 2
    model.train(6, 2)
    model.train(6, 4)
    assert recordings_after() == 0
    model.policy.optimizer.param_groups[0]["clip"] = 0.1
    assert recordings_after() == 1


def test_windows_that_grow_are_not_recorded() -> None:
    """With explicit ``gradient_steps`` updates begin before a whole window is stored, and every one has other shapes."""
    model = tiny("Pendulum-v1", gradient_steps=1, learning_starts=2)
    tape = recorded(model)
    model.learn(TINY["batch_length"], log_interval=None)
    assert model._n_updates > 3 and tape.recordings == 1  # acting alone
    model.learn(10, reset_num_timesteps=False, log_interval=None)
    assert tape.recordings == 2


def test_a_recorded_run_is_saved_and_goes_on(tmp_path: Path) -> None:
    """As one that is not recorded, and recorded again."""

    def course(recording: bool) -> DreamerGPLD:
        model = model_of("vectors", learning_rate=1e-3)
        if recording:
            recorded(model)
        model.learn(40, log_interval=None)
        model.save(tmp_path / "model")
        model.save_replay_buffer(tmp_path / "buffer")
        model = DreamerGPLD.load(tmp_path / "model", env=RandomSpaces(VECTOR, BOX))
        model.load_replay_buffer(tmp_path / "buffer")
        tape = recorded(model) if recording else Tape()
        model.learn(30, reset_num_timesteps=False, log_interval=None)
        assert tape.replays > 10 or not recording
        return model

    assert_equal(course(recording=False), course(recording=True))


def test_an_update_that_fails_is_told_and_changes_nothing() -> None:
    model = model_of("vectors", train_ratio=0.0)
    model.learn(40, log_interval=None)
    recorded(model)
    model.train(6, 4)
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    model.replay_buffer.rewards[:] = np.nan
    with pytest.raises(FloatingPointError, match="Update 6: the losses .*reward"):
        model.train(2, 4)
    for name, value in model.policy.state_dict().items():
        assert th.equal(value, before[name]), name


class Failing(Tape):
    def record(self, *args: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")


class Waiting(Tape):
    def warm_up(self, function: Callable[[Any], Any], inputs: Any) -> tuple[Any, str]:
        return function(inputs), "called a synchronizing CUDA operation"


@pytest.mark.parametrize(("recorder", "text"), [(Failing, "operation not permitted"), (Waiting, "called a synchronizing")])
def test_a_recording_that_fails(recorder: type[Tape], text: str) -> None:
    """Training goes on without it, after one warning for each function; one that would fail is not begun."""
    plain = model_of("vectors").learn(60, log_interval=None)
    other = model_of("vectors")
    other.learner.execution.recorder = tape = recorder()
    with pytest.warns(UserWarning, match=f"as a CUDA graph failed, so training goes on without: {text}") as warned:
        other.learn(60, log_interval=None)
    assert sorted(str(w.message).split("'")[1] for w in warned if "CUDA graph" in str(w.message)) == ["act", "step"]
    assert tape.recordings == 0
    assert_equal(plain, other)


def test_a_recording_that_fails_is_gone_before_training_goes_on() -> None:
    """What it held is free, since the function that then runs as it is needs that memory."""
    alive: list[bool] = []
    held: list[Any] = []

    class Holding(Tape):
        def record(self, function: Callable[[Any], Any], inputs: Any) -> Any:
            pool = th.nn.Linear(1, 1)  # what a frame of the recording holds
            held.append(weakref.ref(pool))
            raise RuntimeError("out of memory")

    def function(inputs: th.Tensor) -> th.Tensor:
        alive.extend(each() is not None for each in held)
        return inputs + 1

    runner = Execution(th.nn.Linear(1, 1), th.device("cpu"))
    runner.recorder = Holding()
    with pytest.warns(UserWarning, match="out of memory"):
        for _ in range(5):
            runner.run_whole(function, lambda: "key", th.ones(1))
    assert alive == [False, False]


def test_nothing_is_recorded_within_plain() -> None:
    """Windows that still grow would each be recorded by themselves."""
    runner = Execution(th.nn.Linear(1, 1), th.device("cpu"))
    runner.recorder = tape = Tape()
    with runner.plain():
        assert [runner.run_whole(th.abs, lambda: "key", -th.ones(1)).item() for _ in range(6)] == [1.0] * 6
    assert tape.recordings == 0 and runner.recorder is tape


def test_other_optimisers_are_not_recorded() -> None:
    """Their steps have learning rates of Python."""
    model = tiny(RandomSpaces(BOX, BOX), train_ratio=32.0, policy_kwargs=dict(optimizer_class=th.optim.Adam))
    tape = recorded(model)
    model.learn(60, log_interval=None)
    assert model._n_updates > 10 and tape.recordings == 1  # acting alone


def test_the_tape_sees_what_a_graph_would() -> None:
    """A value that is read, and a number that is baked in; recording and undoing leave memory and random numbers alone."""
    x, y = th.ones(3), th.zeros(3)

    def function(inputs: th.Tensor) -> th.Tensor:
        y.add_(inputs * factor)
        return y + th.rand(3)

    factor = 2.0
    state = th.get_rng_state()
    outputs, replay = Tape().record(function, x)
    assert th.equal(y, th.zeros(3)) and th.equal(state, th.get_rng_state())
    factor = 3.0
    expected = 2.0 + th.rand(3, generator=th.Generator().set_state(state))
    replay()
    assert th.equal(y, th.full((3,), 2.0)) and th.equal(outputs, expected)
    x.fill_(2.0)
    replay()
    assert th.equal(y, th.full((3,), 6.0))
    with pytest.raises(RuntimeError, match="reads a value"):
        Tape().record(lambda inputs: inputs.sum().item(), x)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda policy: pickle.loads(pickle.dumps(policy))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_the_policy_runs_as_it_is(copied: Callable) -> None:
    """Graphs and compiled functions cannot be copied, and are of the original's parameters."""
    model = model_of("vectors", learning_rate=1e-3)
    model.learner.execution.recorder = lock = Tape()
    lock.graph = threading.Lock()  # type: ignore[attr-defined]  # as little to be copied as a CUDA graph
    model.learner.execution.compile()
    policy = copied(model.policy)
    observation = np.zeros(3, dtype=np.float32)
    assert type(policy.world_model.runner) is Runner
    assert np.array_equal(
        policy.predict(observation, deterministic=True)[0], model.predict(observation, deterministic=True)[0]
    )


@pytest.mark.skipif(th.cuda.is_available(), reason="there is a GPU")
def test_nothing_is_recorded_on_a_processor() -> None:
    model = tiny("Pendulum-v1")
    model.learner.execution.compile()
    assert model.learner.execution.recorder is None


def test_on_a_gpu_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "CudaGraphs", lambda device: device)
    runner = execution.Execution(tiny("Pendulum-v1").policy, th.device("cuda"))
    assert runner.recorder is None and runner.chunk_rows > 2**32
    runner.compile()
    assert runner.recorder == th.device("cuda")
