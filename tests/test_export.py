"""The exported acting step does what predict does."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from test_dreamer_gpld import BOX, RandomSpaces, policy_for, tiny

from sb3_dreamer_gpld import DreamerGPLD
from sb3_dreamer_gpld.export import NEXT_STATE, STATE, ActingStep, export_policy

CASES: dict[str, tuple[spaces.Space, spaces.Space]] = {
    "vector, box": (BOX, spaces.Box(np.array([-1.0, -1.0, -0.8]), np.array([1.0, 1.1, 0.8]), dtype=np.float64)),
    "vector, 0-d box": (BOX, spaces.Box(-0.1, 0.7, (), np.float64)),
    "vector, discrete": (BOX, spaces.Discrete(5, start=-2)),
    "image, 2-d box": (spaces.Box(0, 255, (20, 17, 3), np.uint8), spaces.Box(-2.0, 3.0, (2, 2))),
    "image, discrete": (spaces.Box(0, 255, (1, 16, 20), np.uint8), spaces.Discrete(3)),
    "dict, multi-discrete": (
        spaces.Dict(  # of pairs, which keep their order: two entries of one shape could be taken for each other
            [
                ("z", spaces.Box(-1.0, 1.0, (), np.float64)),
                ("image", spaces.Box(0, 255, (3, 16, 16), np.uint8)),
                ("class", spaces.Discrete(4, start=3)),
                ("bits", spaces.MultiBinary((2, 2))),
                ("none", spaces.Box(-1.0, 1.0, (0,))),
                ("a", spaces.Box(-1.0, 1.0, (), np.float64)),
            ]
        ),
        spaces.MultiDiscrete([3, 2]),
    ),
    "discrete, multi-binary": (spaces.Discrete(5), spaces.MultiBinary(3)),
    "vector, integers": (BOX, spaces.Box(np.array([-100, 0]), np.array([100, 100_000]), dtype=np.int64)),
}


def trained(name: str, **kwargs: Any) -> DreamerGPLD:
    observation_space, action_space = CASES[name]
    policy = "CnnPolicy" if name.startswith("image") else policy_for(observation_space)
    return tiny(RandomSpaces(observation_space, action_space), policy, **kwargs).learn(45)


def as_tensors(observation: Any) -> Any:
    if isinstance(observation, dict):
        return {name: th.as_tensor(value) for name, value in observation.items() if value.size}
    return th.as_tensor(observation)


def load(path: Path) -> tuple[Any, dict[str, Any]]:
    files = {"policy.json": ""}
    program = th.export.load(path, extra_files=files)
    return program.module(), json.loads(files["policy.json"])


SHORT = ("vector, box", "dict, multi-discrete", "vector, integers")  # each export takes some seconds


@pytest.mark.parametrize("name", [name if name in SHORT else pytest.param(name, marks=pytest.mark.long) for name in CASES])
def test_same_actions_over_episodes_with_resets(name: str, tmp_path: Path) -> None:
    """Any number of environments with one file; the state before an episode does not matter."""
    model = trained(name)
    step, metadata = load(export_policy(model.policy if "dict" in name else model, tmp_path / "policy"))
    if name == "dict, multi-discrete":
        assert metadata["observation"]["image"] == {"shape": [3, 16, 16], "dtype": "uint8"}
        assert set(metadata["observation"]) == {"z", "image", "class", "bits", "a"}
        assert metadata["state"] == {"deter": [32], "stoch": [4, 4], "action": [5]}
    for n in (1, 2, 3):
        env = DummyVecEnv([lambda: RandomSpaces(*CASES[name])] * n)
        env.seed(n)
        observation = env.reset()
        if name == "image, 2-d box":
            observation = np.moveaxis(observation, -1, 1)  # type: ignore[arg-type]
        state, done = None, np.ones(n, dtype=bool)
        memory = tuple(th.full((n, *shape), 0.5) for shape in metadata["state"].values())
        for t in range(14):
            expected, state = model.predict(observation, state, done, deterministic=True)
            action, memory = step(as_tensors(observation), memory, th.as_tensor(done))
            assert action.numpy().dtype == expected.dtype == np.dtype(metadata["action"]["dtype"])
            assert action.shape == expected.shape == (n, *metadata["action"]["shape"])
            if expected.dtype.kind == "f":
                np.testing.assert_allclose(action.numpy(), expected, atol=1e-5)
                assert all(env.action_space.contains(a) for a in action.numpy())
            else:
                np.testing.assert_array_equal(action.numpy(), expected)
            for a, b in zip(memory, state, strict=True):  # type: ignore[arg-type]
                np.testing.assert_allclose(a.numpy(), b, atol=1e-5)
            observation, _, done, _ = env.step(expected)
            if t == 4:
                done = np.arange(n) % 2 == 0  # one more reset, of some environments only
            if name == "image, 2-d box":
                observation = np.moveaxis(observation, -1, 1)  # type: ignore[arg-type]


def test_normalised_observations_go_in_as_float32(tmp_path: Path) -> None:
    """Of the keys that VecNormalize normalises."""
    whole, numbers = spaces.Box(0, 50, (3,), np.int64), spaces.Box(-9.0, 9.0, (2,), np.float64)
    space = spaces.Dict({"counts": whole, "numbers": numbers, "others": whole})
    env = VecNormalize(DummyVecEnv([lambda: RandomSpaces(space, BOX)]), norm_obs_keys=["counts", "numbers"])
    model = tiny(env, "MultiInputPolicy").learn(45)
    step, metadata = load(export_policy(model, tmp_path / "policy"))
    dtypes = {name: entry["dtype"] for name, entry in metadata["observation"].items()}
    assert dtypes == {"counts": "float32", "numbers": "float32", "others": "int64"}
    observation = env.reset()
    assert {name: str(value.dtype) for name, value in observation.items()} == dtypes  # type: ignore[union-attr]
    memory = tuple(th.zeros(1, *shape) for shape in metadata["state"].values())
    action, _ = step(as_tensors(observation), memory, th.tensor([True]))
    expected, _ = model.predict(observation, deterministic=True)
    np.testing.assert_allclose(action.numpy(), expected, atol=1e-5)
    assert model.observation_space == space


def test_spectral_norms_are_in_the_weights(tmp_path: Path) -> None:
    model = trained("vector, box", policy_kwargs={"spectral_norm": ["encoder", "posterior", "actor"]})
    step, _ = load(export_policy(model, tmp_path / "policy"))
    observation, start = np.random.default_rng(0).uniform(-1, 1, (2, 3)).astype(np.float32), np.ones(2, bool)
    expected, _ = model.predict(observation, episode_start=start, deterministic=True)
    zeros = tuple(th.zeros(2, *shape) for shape in ((32,), (4, 4), (3,)))
    actions, _ = step(th.as_tensor(observation), zeros, th.as_tensor(start))
    np.testing.assert_allclose(actions.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert not any("autocast" in str(node.target) or "mv" in str(node.target) for node in step.graph.nodes)


def test_the_actions_of_this_test_differ() -> None:
    """So that equal ones mean something."""
    model = trained("vector, box")
    observations = np.random.default_rng(0).uniform(-1, 1, (8, 3)).astype(np.float32)
    assert np.unique(model.predict(observations, deterministic=True)[0], axis=0).shape[0] >= 4


def test_it_needs_pytorch_only(tmp_path: Path) -> None:
    """The snippet of the documentation, in a process that has neither this package nor SB3."""
    model = trained("vector, box")
    path = export_policy(model, tmp_path / "policy")
    code = f"""
import json, sys, torch
files = {{"policy.json": ""}}
step = torch.export.load({str(path)!r}, extra_files=files).module()
shapes = json.loads(files["policy.json"])["state"]
state = tuple(torch.zeros(1, *shape) for shape in shapes.values())
action, state = step(torch.full((1, 3), 0.5), state, torch.tensor([True]))
assert not [name for name in sys.modules if name.startswith(("sb3", "stable_baselines3", "gymnasium"))]
print(json.dumps(action.tolist()))
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    expected, _ = model.predict(np.full((1, 3), 0.5, np.float32), deterministic=True)
    np.testing.assert_allclose(json.loads(output), expected, atol=1e-6)


def test_exporting_changes_nothing(tmp_path: Path) -> None:
    """Neither parameters nor random numbers; the compiled functions of the model are left out."""
    model = trained("vector, box")
    expected = ActingStep(model.policy)(th.ones(2, 3), model.policy.initial_state(2).parts, th.ones(2, dtype=th.bool))
    model.learner.execution.compile()
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    generator = th.get_rng_state()
    path = export_policy(model, tmp_path / "deep" / "policy")
    assert path == tmp_path / "deep" / "policy.pt2" and list(path.parent.iterdir()) == [path]
    assert th.equal(generator, th.get_rng_state())
    assert all(th.equal(value, before[name]) for name, value in model.policy.state_dict().items())
    assert all(p.requires_grad for p in model.policy.world_model.parameters())
    step, _ = load(path)
    action, _ = step(th.ones(2, 3), model.policy.initial_state(2).parts, th.ones(2, dtype=th.bool))
    th.testing.assert_close(action, expected[0])


def test_a_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "walker.v1.pt2"
    path.write_text("old")

    def fail(program: Any, file: Any, **kwargs: Any) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(th.export, "export", lambda *args, **kwargs: None)
    monkeypatch.setattr(th.export, "save", fail)
    model = tiny("Pendulum-v1")
    with pytest.raises(OSError, match="disk full"):
        export_policy(model, path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "name, format, message",
    [
        ("policy.bin", None, r"must end in .pt2 or .onnx, or have no suffix, not '.bin'"),
        ("policy.onnx", "pt2", r"must end in .pt2, or have no suffix, not '.onnx'"),
        ("policy", "onxx", r"The format 'onxx' .* 'onnx'"),
    ],
)
def test_wrong_formats(name: str, format: str | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        export_policy(tiny("Pendulum-v1"), tmp_path / name, format)
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_of_onnx_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'written with onnx and onnxscript: pip install "sb3-dreamer-gpld\[onnx\]"'):
        export_policy(tiny("Pendulum-v1"), tmp_path / "policy.onnx")
    assert list(tmp_path.iterdir()) == []


def onnx_inputs(observation: Any) -> dict[str, np.ndarray]:
    """Inputs of an ONNX file for an observation of E environments."""
    if isinstance(observation, dict):
        return {f"observation.{name}": value for name, value in observation.items() if value.size}
    return {"observation": observation}


@pytest.mark.parametrize("name", [name if name in SHORT else pytest.param(name, marks=pytest.mark.long) for name in CASES])
def test_onnx_acts_the_same_over_episodes_with_resets(name: str, tmp_path: Path) -> None:
    """In onnxruntime, one file for any number of environments; the state before an episode does not matter."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = trained(name)
    generator = th.get_rng_state()
    path = export_policy(model, tmp_path / "policy", format="onnx")
    assert path == tmp_path / "policy.onnx" and list(tmp_path.iterdir()) == [path]
    assert th.equal(generator, th.get_rng_state())
    session = onnxruntime.InferenceSession(path)
    metadata = json.loads(session.get_modelmeta().custom_metadata_map["policy.json"])
    assert [output.name for output in session.get_outputs()] == ["action", *NEXT_STATE]
    for n in (1, 3):
        env = DummyVecEnv([lambda: RandomSpaces(*CASES[name])] * n)
        env.seed(n)
        channels_last = name == "image, 2-d box"
        observation = env.reset()
        state, done = None, np.ones(n, dtype=bool)
        memory = [np.full((n, *shape), 0.5, np.float32) for shape in metadata["state"].values()]
        for t in range(14):
            if channels_last:
                observation = np.moveaxis(observation, -1, 1)  # type: ignore[arg-type]
            expected, state = model.predict(observation, state, done, deterministic=True)
            inputs = {**onnx_inputs(observation), **dict(zip(STATE, memory, strict=True)), "episode_start": done}
            action, *memory = session.run(None, inputs)
            assert action.dtype == expected.dtype and action.shape == expected.shape
            np.testing.assert_allclose(action, expected, atol=1e-5 if expected.dtype.kind == "f" else 0)
            for a, b in zip(memory, state, strict=True):  # type: ignore[arg-type]
                np.testing.assert_allclose(a, b, atol=1e-5)
            observation, _, done, _ = env.step(expected)
            if t == 4:
                done = np.arange(n) % 2 == 0  # one more reset, of some environments only


@pytest.mark.parametrize("name", ["vector, box", "vector, discrete", "dict, multi-discrete"])
def test_forward_is_a_first_step(name: str) -> None:
    """``policy(obs, deterministic=True)``, as SB3's export guide calls it, is predict without memory."""
    model = trained(name)
    env = model.get_env()
    assert env is not None
    observation = env.reset()
    tensors, _ = model.policy.obs_to_tensor(observation)
    action = model.policy(tensors, deterministic=True)
    expected, _ = model.predict(observation, deterministic=True)
    if isinstance(model.action_space, spaces.Box):
        np.testing.assert_allclose(model.policy.unscale_action(action.numpy()), expected, atol=1e-6)
    else:
        np.testing.assert_array_equal(action.numpy(), expected)
    whole, _ = ActingStep(model.policy)(tensors, model.policy.initial_state(1).parts, th.tensor([True]))
    np.testing.assert_array_equal(whole.numpy(), expected)
