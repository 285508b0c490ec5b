"""On a GPU: the same update, without waiting for the device, and a short training. Skipped where there is none."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.vec_env import VecNormalize
from test_parity import RECORDINGS, Recording

from sb3_dreamer_gpld import DreamerGPLD
from sb3_dreamer_gpld.execution import CudaGraphs, Execution
from sb3_dreamer_gpld.learner import Draws
from sb3_dreamer_gpld.policies import MlpPolicy
from sb3_dreamer_gpld.transfer import to_device

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not th.cuda.is_available(), reason="no CUDA device")]


def on_gpu(value: Any) -> Any:
    """A named tuple of tensors, and dicts of them, on the GPU."""
    if isinstance(value, th.Tensor):
        return value.cuda()
    if isinstance(value, dict):
        return {key: on_gpu(part) for key, part in value.items()}
    if isinstance(value, tuple):
        return type(value)(*(on_gpu(part) for part in value))
    return value


@pytest.mark.parametrize("name", ["cont0", "disc0", "image0"])
def test_update_is_the_recorded_one_and_does_not_wait(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(th.backends.cudnn, "allow_tf32", False)  # the recordings are in float32
    recording = Recording(RECORDINGS[name])
    model = recording.model()
    batch, draws = recording.batch(model), Draws(recording.world_draws(model), recording.imagination_draws(model))
    model.device, model.policy = th.device("cuda"), model.policy.cuda()
    for state in model.policy.optimizer.state.values():
        state.update(on_gpu(state))
    arguments = on_gpu(batch), on_gpu(draws), model._n_updates
    result = model.learner.loss(*arguments)
    th.testing.assert_close(result.total.detach().cpu(), recording.tensor("loss_total"), rtol=1e-4, atol=0.0)
    model.learner.update(*arguments, [1e-4])
    th.cuda.set_sync_debug_mode("error")
    try:
        model.learner.update(*arguments, [1e-4])
    finally:
        th.cuda.set_sync_debug_mode("default")


SIZES: dict[str, Any] = dict(
    model_size="debug", batch_size=4, batch_length=8, learning_starts=32, imagination_horizon=3, train_ratio=32.0
)


def recorded(model: DreamerGPLD) -> DreamerGPLD:
    """Record its updates and steps of acting as CUDA graphs, uncompiled."""
    model.learner.execution.recorder = CudaGraphs(model.device)
    return model


def assert_captured(model: DreamerGPLD) -> None:
    assert model.learner.execution.is_recorded("step") and model.learner.execution.is_recorded("_act")


@pytest.mark.parametrize("options", [{}, {"actor_gradient": "dynamics", "ent_coef": "auto"}, {"penalty_estimator": "exact"}])
def test_captured_training_is_the_same(options: dict[str, Any]) -> None:
    """Learning rates, λ and random numbers are those of each update: the seed repeats the run without the graphs."""
    learned = dict(
        learning_rate=lambda left: 1e-3 * left, penalty_schedule="linear", seed=0, device="cuda", **SIZES, **options
    )
    plain = DreamerGPLD("MlpPolicy", "Pendulum-v1", **learned).learn(80)
    other = recorded(DreamerGPLD("MlpPolicy", "Pendulum-v1", **learned)).learn(80)
    assert_captured(other)
    for name, value in plain.policy.state_dict().items():
        th.testing.assert_close(other.policy.state_dict()[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_replays_draw_anew() -> None:
    execution = Execution(th.nn.Linear(1, 1).cuda(), th.device("cuda"))
    execution.recorder = CudaGraphs(th.device("cuda"))

    def draw(inputs: th.Tensor) -> th.Tensor:
        return inputs + th.rand(4, device="cuda")

    def draws(seed: int) -> list[th.Tensor]:
        th.cuda.manual_seed(seed)
        return [execution.run_whole(draw, lambda: "draw", th.zeros(4, device="cuda")).cpu() for _ in range(8)]

    first, second = draws(0), draws(0)
    assert execution.is_recorded("draw")
    assert len({tuple(each.tolist()) for each in first}) == 8
    th.testing.assert_close(first, second, rtol=0, atol=0)


def test_a_function_that_waits_is_not_captured() -> None:
    execution = Execution(th.nn.Linear(1, 1).cuda(), th.device("cuda"))
    execution.recorder = CudaGraphs(th.device("cuda"))

    def reading(inputs: th.Tensor) -> th.Tensor:
        return inputs * inputs.sum().item()

    with pytest.warns(UserWarning, match="Recording 'reading' as a CUDA graph failed"):
        results = [execution.run_whole(reading, lambda: "read", th.ones(3, device="cuda")).cpu() for _ in range(8)]
    assert all(th.equal(each, th.full((3,), 3.0)) for each in results) and not execution.is_recorded("reading")


def test_a_recording_that_is_dropped_leaves_the_others() -> None:
    """Also the memory that its products work in."""
    device, made_for = th.device("cuda"), [0]
    execution = Execution(th.nn.Linear(1, 1).cuda(), device)
    execution.recorder = CudaGraphs(device)
    weights = [th.randn(2048, 2048, device=device) for _ in range(2)]

    def first(inputs: th.Tensor) -> th.Tensor:
        return inputs @ weights[0]

    def second(inputs: th.Tensor) -> th.Tensor:
        return inputs @ weights[1]

    inputs = th.randn(2048, 2048, device=device)
    for _ in range(6):
        for function in (first, second):
            execution.run_whole(function, lambda: made_for[0] if function is first else 0, inputs)  # noqa: B023
    assert execution.is_recorded("first") and execution.is_recorded("second")
    made_for[0] = 1
    execution.run_whole(first, lambda: 1, inputs)
    assert not execution.is_recorded("first")
    th.cuda.empty_cache()
    held = th.full((64, 2**20), 7.0, device=device)  # lies where memory was given back
    th.testing.assert_close(execution.run_whole(second, lambda: 0, inputs), inputs @ weights[1])
    assert (held == 7.0).all()


def test_spectral_norms_are_not_in_half_precision() -> None:
    kwargs = {"policy_kwargs": {"spectral_norm": ["actor"]}}
    policy = DreamerGPLD("MlpPolicy", "Pendulum-v1", seed=0, device="cuda", **SIZES, **kwargs).policy.eval()
    linear = policy.actor_critic.policy.layers[0].linear
    with th.autocast("cuda", th.bfloat16):
        weight = linear.weight
    assert th.equal(weight, linear.weight)


@pytest.mark.skipif(
    tuple(map(int, th.__version__.split(".")[:2])) < (2, 13),
    reason="older releases of PyTorch stay in a recording that failed",
)
def test_a_capture_that_fails_leaves_the_rest_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where waiting was not seen before."""
    monkeypatch.setattr(CudaGraphs, "warm_up", lambda self, function, inputs: (function(inputs), ""))
    execution, before = Execution(th.nn.Linear(1, 1).cuda(), th.device("cuda")), th.cuda.current_stream()
    execution.recorder = CudaGraphs(th.device("cuda"))

    def reading(inputs: th.Tensor) -> th.Tensor:
        return inputs * inputs.sum().item() + th.rand(3, device="cuda")

    with pytest.warns(UserWarning, match="Recording 'reading' as a CUDA graph failed"):
        for _ in range(6):
            execution.run_whole(reading, lambda: "read", th.ones(3, device="cuda"))
    assert th.cuda.current_stream() == before
    th.rand(3, device="cuda").sum().item()
    used = []
    for _ in range(5):  # what other streams have read is free afterwards
        to_device(np.zeros(2**20, np.float32), th.device("cuda"))
        th.cuda.synchronize()
        used.append(th.cuda.memory_allocated())
    assert used[-1] <= used[1]


def test_recording_says_nothing_that_is_not_of_the_function(recwarn: pytest.WarningsRecorder) -> None:
    recorded(DreamerGPLD("MlpPolicy", "Pendulum-v1", seed=0, device="cuda", **SIZES)).learn(60)
    assert not [str(each.message) for each in recwarn if "ynchroniz" in str(each.message)]


def test_a_policy_file_of_a_box(tmp_path: Path) -> None:
    model = DreamerGPLD("MlpPolicy", "Pendulum-v1", seed=0, device="cuda", **SIZES)
    model.policy.save(tmp_path / "policy.pt")
    policy = MlpPolicy.load(tmp_path / "policy.pt")
    assert policy.device.type == "cuda" and policy.observation_space == model.observation_space


@pytest.mark.parametrize(
    ("policy", "env", "options"),
    [
        ("MlpPolicy", "CartPole-v1", {}),
        ("MlpPolicy", "Pendulum-v1", {"planner": {"samples": 8, "policy_samples": 2, "elites": 3}, "plan_in_training": True}),
    ],
    ids=["discrete", "planner"],
)
def test_what_else_is_captured(policy: str, env: str, options: dict[str, Any]) -> None:
    assert_captured(recorded(DreamerGPLD(policy, env, seed=0, device="cuda", **SIZES, **options)).learn(60))


def test_compiled_updates_in_bfloat16_are_captured() -> None:
    model = DreamerGPLD("MlpPolicy", "Pendulum-v1", seed=0, device="cuda", precision="bfloat16", compile=True, **SIZES)
    model.learn(60)
    assert not model.learner.execution.failed
    assert_captured(model)


def test_a_captured_update_does_not_wait() -> None:
    model = recorded(DreamerGPLD("MlpPolicy", "Pendulum-v1", seed=0, device="cuda", **SIZES)).learn(60)
    samples = model.replay_buffer.sample(4)
    th.cuda.set_sync_debug_mode("error")
    try:
        model.learner.update(model.policy.to_batch(samples), None, model._n_updates, [1e-4])
    finally:
        th.cuda.set_sync_debug_mode("default")
    assert_captured(model)


def test_a_loaded_model_is_captured_anew(tmp_path: Path) -> None:
    model = recorded(DreamerGPLD("MlpPolicy", "Pendulum-v1", seed=0, device="cuda", **SIZES)).learn(60)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = recorded(DreamerGPLD.load(tmp_path / "model", env=model.env, device="cuda"))
    loaded.load_replay_buffer(tmp_path / "buffer")
    loaded.learn(40, reset_num_timesteps=False)
    assert_captured(loaded)
    model.set_parameters(loaded.get_parameters())
    model.learn(20, reset_num_timesteps=False)
    assert_captured(model)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training(precision: str) -> None:
    model = DreamerGPLD("MlpPolicy", "Pendulum-v1", device="cuda", precision=precision, **SIZES).learn(100)
    assert model._n_updates > 0 and next(model.policy.parameters()).is_cuda


def test_rows_on_the_gpu() -> None:
    """Batches of a training are those of the same rows on the host, with VecNormalize too, and are read without a wait."""
    sizes = dict(buffer_size=80, replay_buffer_kwargs={"storage": "device"}, **SIZES)  # fewer rows than steps
    model = DreamerGPLD("MlpPolicy", "Pendulum-v1", device="cuda", **sizes).learn(100)
    buffer, host = model.replay_buffer, copy.deepcopy(model.replay_buffer)
    assert buffer is not None and host is not None and model._n_updates > 0
    host.storage = "host"
    env = VecNormalize(model.get_env())
    env.obs_rms.mean, env.obs_rms.var = np.array([0.1, -0.2, 0.3]), np.array([0.3, 0.7, 2.1])
    buffer.sample(4, env)
    host.sample(4, env)
    th.cuda.set_sync_debug_mode("error")
    try:
        samples = buffer.sample(4, env)
        deter = th.arange(4 * 8 * 32, dtype=th.float32, device="cuda").view(4, 8, 32)
        buffer.update_latents(samples.envs, samples.starts, deter, samples.stoch.unsqueeze(1).expand(4, 8, -1))
    finally:
        th.cuda.set_sync_debug_mode("default")
    same = host.sample(4, env)
    host.update_latents(samples.envs, samples.starts, deter, samples.stoch.unsqueeze(1).expand(4, 8, -1))
    for ours, expected in zip(samples[:-2], same[:-2], strict=True):
        assert ours.is_cuda and ours.dtype == expected.dtype
        th.testing.assert_close(ours, expected, rtol=1e-6, atol=0.0)
    np.testing.assert_array_equal(samples.starts, same.starts)
    np.testing.assert_array_equal(buffer.deter, host.deter[: buffer.size()])
    np.testing.assert_array_equal(buffer.stoch, host.stoch[: buffer.size()])


def test_too_little_memory_of_the_gpu_is_named() -> None:
    model = DreamerGPLD(
        "MlpPolicy", "Pendulum-v1", device="cuda", buffer_size=10**10, replay_buffer_kwargs={"storage": "device"}
    )
    with pytest.raises(
        MemoryError, match=r"10,000,000,000 rows needs .* bytes on 'cuda.*are free; allowed: a smaller buffer_size"
    ):
        model.learn(10)
