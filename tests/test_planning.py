"""Planning: the search against a reference, imagined returns another way, and the planner as an SB3 user meets it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from test_dreamer_gpld import BOX, RandomSpaces, tiny

from sb3_dreamer_gpld import DreamerGPLD
from sb3_dreamer_gpld.nets.actor_critic import imagined_returns
from sb3_dreamer_gpld.nets.distributions import two_hot_mean
from sb3_dreamer_gpld.planning import Planner, PlannerConfig
from sb3_dreamer_gpld.policies import MlpPolicy

SMALL: dict[str, Any] = dict(samples=24, policy_samples=6, elites=5, iterations=3)


def box_env() -> RandomSpaces:
    return RandomSpaces(BOX, BOX)


@pytest.fixture(scope="module")
def model() -> DreamerGPLD:
    """Has learned a little, and its heads predict something."""
    model = tiny(box_env(), planner=SMALL).learn(60)
    generator = th.Generator().manual_seed(1)
    for head in (model.policy.world_model.reward, model.policy.actor_critic.value):
        for p in head.output.parameters():
            p.data = 0.3 * th.randn(p.shape, generator=generator)
    return model


def state(model: DreamerGPLD, n_envs: int) -> tuple[th.Tensor, th.Tensor]:
    """A posterior state after one observation, (E, D), (E, C·K)."""
    observations = np.random.default_rng(2).uniform(-1, 1, (n_envs, 3)).astype(np.float32)
    _, parts = model.predict(observations, episode_start=np.ones(n_envs, bool), deterministic=True)
    assert parts is not None
    return th.as_tensor(parts[0]), th.as_tensor(parts[1]).flatten(1)


def observations(n_envs: int, steps: int = 1) -> np.ndarray:
    return np.random.default_rng(3).uniform(-1, 1, (steps, n_envs, 3)).astype(np.float32)


# ------------------------------------------------------------------------------------------------ what is computed


def test_the_search_is_that_of_the_paper() -> None:
    """Against the update written out in NumPy, float64, an environment at a time."""
    config = PlannerConfig(horizon=2, samples=9, policy_samples=3, elites=4, iterations=3, temperature=0.7, min_std=0.1)
    generator = np.random.default_rng(0)
    proposals, mean = generator.uniform(-1, 1, (2, 3, 2, 5)), generator.uniform(-1, 1, (2, 2, 5))
    noise, goal = generator.normal(size=(3, 2, 6, 2, 5)), generator.uniform(-1, 1, (3, 2, 5))

    def returns(candidates: th.Tensor, iteration: int) -> th.Tensor:
        return -(candidates - th.as_tensor(goal[iteration])).square().sum((-2, -1))

    tensors = (th.as_tensor(x) for x in (proposals, mean, noise))
    found = Planner(config).improve(returns, *tensors)
    for env in range(2):
        mu, sigma = mean[env], np.full((2, 5), config.max_std)
        for i in range(3):
            drawn = np.clip(mu + sigma * noise[i, env], -1, 1)
            candidates = np.concatenate([proposals[env], drawn])
            score = -((candidates - goal[i]) ** 2).sum((1, 2))
            best = np.argsort(-score)[:4]
            weight = np.exp(0.7 * (score[best] - score.max()))
            weight /= weight.sum()
            elites = candidates[best]
            mu = np.einsum("m,mha->ha", weight, elites)
            sigma = np.sqrt(np.einsum("m,mha->ha", weight, (elites - mu) ** 2)).clip(0.1, 2.0)
        for ours, reference in zip(found, (mu, sigma, elites, weight), strict=True):
            np.testing.assert_allclose(ours[env].numpy(), reference, atol=1e-12)


def test_the_search_finds_the_best_actions() -> None:
    goal = th.tensor([[0.5, -0.9], [-0.2, 0.1], [0.0, 0.8]])  # (H, A)
    config = PlannerConfig(policy_samples=0, iterations=12, temperature=50.0)
    noise = th.randn(12, 1, 512, 3, 2, generator=th.Generator().manual_seed(0))
    mean, *_ = Planner(config).improve(
        lambda x, _: -(x - goal).square().sum((-2, -1)), th.zeros(1, 0, 3, 2), th.zeros(1, 3, 2), noise
    )
    assert (mean[0] - goal).abs().max() < 0.1


def test_imagined_returns_of_given_actions(model: DreamerGPLD) -> None:
    """Rollouts of the RSSM's own ``imagine``, and λ-returns with λ = 1, in float64."""
    planner, policy = Planner(PlannerConfig(horizon=4)), model.policy
    world_model, actor_critic = policy.world_model, policy.actor_critic
    generator = th.Generator().manual_seed(0)
    actions, noise = 2 * th.rand(6, 4, 3, generator=generator) - 1, th.rand(4, 6, 4, generator=generator)
    deter, stoch = state(model, 6)
    with th.no_grad():
        ours = planner.returns(world_model, actor_critic, deter, stoch, actions, noise)
        features = world_model.rssm.imagine(
            deter, stoch.view(6, world_model.config.classes, -1), lambda _, h: actions[:, h], noise, 4
        )
        x = th.stack(features)  # (H + 1, N, D + C·K)
        reward = two_hot_mean(world_model.reward(x), world_model.bins)
        cont = th.sigmoid(world_model.cont(x).squeeze(-1))
        value = two_hot_mean(actor_critic.value(x), actor_critic.bins)
    reference = imagined_returns(reward.double(), cont.double(), value.double(), 1.0)[0]
    assert reference.std() > 0.01 * reference.abs().mean()  # sequences that are all alike would show nothing
    np.testing.assert_allclose(ours.numpy(), reference.numpy(), rtol=1e-5)


def test_proposals_follow_the_policy(model: DreamerGPLD) -> None:
    planner, policy = model.policy.planner, model.policy
    assert planner is not None
    deter, stoch = state(model, 2)
    draws = planner.draw(2, 3, policy.config.stoch, deter.device)
    world_model, actor_critic = policy.world_model, policy.actor_critic
    with th.no_grad():
        ours = planner.proposals(world_model, actor_critic, deter, stoch, draws.policy_actions, draws.policy_stoch)
        taken = []

        def act(features: th.Tensor, h: int) -> th.Tensor:
            mean, std = actor_critic.distribution.parameters(actor_critic.policy(features))
            taken.append((mean + std * draws.policy_actions[h].flatten(0, 1)).clamp(-1, 1))
            return taken[-1]

        starts = (deter.repeat_interleave(6, 0), stoch.repeat_interleave(6, 0).view(12, policy.config.classes, -1))
        world_model.rssm.imagine(*starts, act, draws.policy_stoch.flatten(1, 2), 3)
    assert ours.shape == (2, 6, 3, 3)
    th.testing.assert_close(ours, th.stack(taken, 1).view(2, 6, 3, 3))


def test_the_plan_goes_on_and_is_dropped_where_an_episode_starts(model: DreamerGPLD, monkeypatch: pytest.MonkeyPatch) -> None:
    planner, seen = model.policy.planner, []
    assert planner is not None
    improve = planner.improve
    monkeypatch.setattr(planner, "improve", lambda r, p, mean, noise: seen.append(mean) or improve(r, p, mean, noise))
    x = observations(2, 2)
    _, first = model.predict(x[0], episode_start=np.ones(2, bool))
    model.predict(x[1], first, episode_start=np.array([False, True]))
    assert first is not None and first[3].shape == (2, 3, 3) and np.any(first[3])
    assert not seen[0].any()
    np.testing.assert_array_equal(seen[1][0], np.concatenate([first[3][0, 1:], np.zeros((1, 3))]))
    assert not seen[1][1].any()


# --------------------------------------------------------------------------------------------------- ways to act


def test_deterministic_plans_are_a_function_of_their_input(model: DreamerGPLD) -> None:
    """No generator is touched, and an environment's action does not depend on how many there are."""
    x, start, before = observations(3)[0], np.ones(3, bool), th.get_rng_state()
    actions, _ = model.predict(x, episode_start=start, deterministic=True)
    again, _ = model.predict(x, episode_start=start, deterministic=True)
    assert th.equal(th.get_rng_state(), before)
    np.testing.assert_array_equal(actions, again)
    for i in range(3):
        alone, _ = model.predict(x[i], episode_start=start[:1], deterministic=True)
        np.testing.assert_allclose(alone, actions[i], atol=1e-5)


@pytest.mark.parametrize("std", [0.0, 0.07])
def test_a_sampled_plan_is_an_elite_by_its_weight_plus_noise(std: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first action of the elite, with the plan's standard deviation there."""
    n, actions = 4000, th.tensor([0.5, -0.5, 0.1])
    planner = Planner(PlannerConfig(**SMALL))
    elites = actions.view(1, 3, 1, 1) * th.tensor([1.0, 0.3, 0.1]).view(1, 1, 3, 1).expand(n, 1, 3, 1)  # (E, M, H, A)
    plan = th.full((n, 3, 1), 0.7), th.tensor([std, 9.0, 9.0]).view(1, 3, 1).expand(n, 3, 1)
    found = *plan, elites, th.tensor([0.2, 0.8, 0.0]).expand(n, 3)
    monkeypatch.setattr(planner, "improve", lambda *_: found)
    nets = tiny(RandomSpaces(BOX, spaces.Box(-1, 1, (1,)))).policy
    state = nets.initial_state(n)
    th.manual_seed(0)
    with th.no_grad():
        action, mean = planner.plan(
            nets.world_model, nets.actor_critic, state.deter, state.stoch.flatten(1), plan[0], th.ones(n, dtype=th.bool), False
        )
    assert th.equal(mean, plan[0])
    first, second = (action - 0.5).abs() < 0.45, (action + 0.5).abs() < 0.45
    assert (first ^ second).all() and first.float().mean().item() == pytest.approx(0.2, abs=0.03)
    for near, at in ((first, 0.5), (second, -0.5)):
        assert action[near].mean().item() == pytest.approx(at, abs=0.02)
        assert action[near].std().item() == pytest.approx(std, abs=0.01)


def test_each_iteration_of_a_plan_has_draws_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    planner, seen = Planner(PlannerConfig(**SMALL)), []
    nets = tiny(box_env()).policy
    monkeypatch.setattr(planner, "returns", lambda *args: seen.append(args[-1]) or th.zeros(len(args[2])))
    state = nets.initial_state(1)
    with th.no_grad():
        planner.plan(
            nets.world_model, nets.actor_critic, state.deter, state.stoch.flatten(1), th.zeros(1, 3, 3), th.ones(1) > 0, True
        )
    assert len(seen) == 3 and not th.equal(seen[0], seen[1]) and not th.equal(seen[1], seen[2])
    assert all(th.equal(each[:, :1].expand_as(each), each) for each in seen)  # common to the sequences that are compared


def test_a_deterministic_plan_begins_with_its_first_action(model: DreamerGPLD, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = th.linspace(-0.9, 0.9, 9).view(1, 3, 3)  # (E, H, A)
    monkeypatch.setattr(model.policy.planner, "improve", lambda *_: (plan, th.zeros_like(plan), None, None))
    action, after = model.predict(observations(1)[0], episode_start=np.ones(1, bool), deterministic=True)
    np.testing.assert_array_equal(action, model.policy.to_env_action(plan[:, 0]))
    assert after is not None
    np.testing.assert_array_equal(after[2], plan[:, 0])
    np.testing.assert_array_equal(after[3], plan)


def test_plans_start_where_the_observation_has_led(model: DreamerGPLD, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[th.Tensor, th.Tensor]] = []
    plan = Planner.plan
    monkeypatch.setattr(Planner, "plan", lambda self, *args: seen.append((args[2], args[3])) or plan(self, *args))
    x = observations(2, 2)
    _, before = model.predict(x[0], episode_start=np.ones(2, bool))
    _, after = model.predict(x[1], before)
    for (deter, stoch), parts in zip(seen, (before, after), strict=True):
        assert parts is not None
        np.testing.assert_array_equal(deter, parts[0])
        np.testing.assert_array_equal(stoch, parts[1].reshape(2, -1))


def test_sampled_plans_differ_and_repeat_with_a_seed(model: DreamerGPLD) -> None:
    x, actions = observations(1)[0], []
    for seed in (0, 1, 0):
        th.manual_seed(seed)
        actions.append(model.predict(x, episode_start=np.ones(1, bool))[0])
    assert np.abs(actions[0] - actions[1]).max() > 1e-3
    np.testing.assert_array_equal(actions[0], actions[2])


@pytest.mark.parametrize("n_envs", [1, 3])
def test_planned_actions_are_collected_if_asked_for(n_envs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    plan = Planner.plan
    monkeypatch.setattr(Planner, "plan", lambda self, *args: calls.append(len(args[2])) or plan(self, *args))
    for plan_in_training in (False, True):
        env = make_vec_env(box_env, n_envs=n_envs)
        tiny(env, "MlpPolicy", planner=SMALL, plan_in_training=plan_in_training).learn(12 * n_envs)
        assert calls == ([n_envs] * 12 if plan_in_training else [])


def test_a_trained_model_is_loaded_with_another_planner(model: DreamerGPLD, tmp_path: Path) -> None:
    model.save(tmp_path / "model")
    plain = DreamerGPLD.load(tmp_path / "model", planner=None)
    other = DreamerGPLD.load(tmp_path / "model", planner={**SMALL, "horizon": 5})
    x, start = observations(1)[0], np.ones(1, bool)
    assert len(plain.predict(x, episode_start=start)[1]) == 3  # type: ignore[arg-type]
    _, state = other.predict(x, episode_start=start)
    assert state is not None and state[3].shape == (1, 5, 3)
    with pytest.raises(ValueError, match=r"a plan of shape \(1, 5, 3\), .* has \(1, 3, 3\)"):
        model.predict(x, state)
    with pytest.raises(ValueError, match="plan of shape None"):
        model.predict(x, state[:3])


def test_the_policys_own_file_keeps_the_planner(model: DreamerGPLD, tmp_path: Path) -> None:
    model.policy.save(tmp_path / "policy.pt")
    loaded = MlpPolicy.load(tmp_path / "policy.pt", device="cpu")
    x, start = observations(2)[0], np.ones(2, bool)
    ours, reference = (policy.predict(x, None, start, deterministic=True)[0] for policy in (loaded, model.policy))
    np.testing.assert_array_equal(ours, reference)


def test_evaluation_plans(model: DreamerGPLD, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, plan = [], Planner.plan
    monkeypatch.setattr(Planner, "plan", lambda self, *args: calls.append(1) or plan(self, *args))
    mean, _ = evaluate_policy(model, make_vec_env(box_env, n_envs=2), n_eval_episodes=2)
    assert mean == 10.0 and len(calls) >= 10


# ---------------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("planner", "text"),
    [
        ("mpi", "planner 'mpi' does not exist. Did you mean 'mppi'"),
        ({"name": "cem"}, "planner 'cem' does not exist"),
        ({"sample": 5}, "planner's setting 'sample' does not exist. Did you mean 'samples'"),
        (7, "planner must be None, 'mppi', a dict"),
        ({"horizon": 0}, "planner's horizon must be a whole number of at least 1"),
        ({"iterations": 1.5}, "planner's iterations"),
        ({"policy_samples": 512}, "policy_samples must be fewer than its samples=512, not 512"),
        ({"elites": 600}, "elites must be at most its samples=512, not 600"),
        ({"temperature": -1}, "planner's temperature"),
        ({"min_std": 0.5, "max_std": 0.1}, "planner's max_std must be a number in"),
        ({"min_std": 0.0, "max_std": 0.0}, "planner's max_std must be a number in"),
    ],
)
def test_wrong_settings_are_named(planner: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text.replace("[", r"\[")):
        tiny(box_env(), planner=planner)


def test_planning_needs_a_box() -> None:
    with pytest.raises(ValueError, match=r"planner='mppi' needs actions in a Box.* allowed for this action space: None"):
        tiny(RandomSpaces(BOX, spaces.Discrete(3)), planner="mppi")


def test_planning_in_training_needs_a_planner() -> None:
    with pytest.raises(ValueError, match="plan_in_training=True needs a planner; allowed: planner='mppi'"):
        tiny(box_env(), plan_in_training=True)
