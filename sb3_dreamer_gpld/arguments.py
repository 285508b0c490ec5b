"""Arguments of the constructor: which values are allowed, what "auto" stands for, and what does the work of other names."""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch as th
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit

from sb3_dreamer_gpld.checks import check_bool, check_int, check_range, unknown_name
from sb3_dreamer_gpld.config import ActionSpec
from sb3_dreamer_gpld.planning import PlannerConfig

if TYPE_CHECKING:
    from sb3_dreamer_gpld.dreamer_gpld import DreamerGPLD

Function = TypeVar("Function", bound=Callable[..., Any])

_NO_SDE = "actions have no state-dependent noise here; exploration_noise adds noise that lasts"
_CLIP = "gradients are clipped per tensor, policy_kwargs=dict(optimizer_kwargs=dict(clip=...))"
_NO_CLIP = f"there is no surrogate objective to clip; {_CLIP}"
# By name: what does it here, or that there is none
KNOWN_ELSEWHERE = {
    "tau": "the slow value follows at policy_kwargs=dict(slow_value_rate=...)",
    "target_update_interval": "the slow value follows after every update, at policy_kwargs=dict(slow_value_rate=...)",
    "use_sde": _NO_SDE,
    "use_sde_at_warmup": _NO_SDE,
    "sde_sample_freq": _NO_SDE,
    "policy_delay": "actor and critic are updated together",
    "target_policy_noise": "targets are imagined returns, without noise",
    "target_noise_clip": "targets are imagined returns, without noise",
    "exploration_fraction": "the policy's samples explore, see ent_coef and exploration_noise",
    "exploration_initial_eps": "the policy's samples explore, see ent_coef and exploration_noise",
    "exploration_final_eps": "the policy's samples explore, see ent_coef and exploration_noise",
    "n_steps": "returns are mixed over all lengths up to imagination_horizon, see return_lambda",
    "n_epochs": "the number of updates follows from train_ratio, or gradient_steps",
    "gae_lambda": "the mixture of returns is return_lambda",
    "vf_coef": "the value's losses are weighed by policy_kwargs=dict(value_weight=..., replay_value_weight=...)",
    "max_grad_norm": _CLIP,
    "clip_range": _NO_CLIP,
    "clip_range_vf": _NO_CLIP,
    "target_kl": "there is no trust region",
    "normalize_advantage": "advantages are divided by the range of the returns, always",
    "n_quantiles": "the value has policy_kwargs=dict(bins=...)",
    "top_quantiles_to_drop_per_net": "there is one value net",
}


def check_names(kind: type, inits: Iterable[Callable[..., Any]], names: Iterable[str]) -> None:
    """Look whether arguments exist; names that begin with "_" are left alone.

    :param kind: class that they are given to
    :param inits: its constructors, its own and inherited ones
    :param names: to be looked at
    :raises TypeError: there is no such argument; the text says what does its work here, or names the closest one
    """
    parameters = [each for init in inits for each in inspect.signature(init).parameters.values()]
    named = [each.name for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
    allowed = [name for name in named if name != "self" and not name.startswith("_")]
    for name in names:
        if name not in allowed and not name.startswith("_"):
            if name in KNOWN_ELSEWHERE:
                raise TypeError(f"{kind.__name__} has no argument {name!r}: {KNOWN_ELSEWHERE[name]}")
            raise TypeError(unknown_name("argument", name, allowed))


def naming_unknown(init: Function) -> Function:
    """An ``__init__`` whose error for an unknown argument is that of :func:`check_names`."""

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        check_names(type(self), [init], kwargs)
        init(self, *args, **kwargs)

    return checked  # type: ignore[return-value]


def warn_without_gpu(asked: th.device | str, device: th.device) -> None:
    """Warn of a GPU that was asked for and is not there; Stable-Baselines3 goes on without a word.

    :param asked: the argument
    :param device: that is used instead
    """
    if str(asked).startswith("cuda") and device.type != "cuda":
        warnings.warn(f"device={str(asked)!r}, but PyTorch finds no GPU: the nets are on {str(device)!r}", stacklevel=4)


ACTOR_GRADIENTS = ("reinforce", "dynamics", "auto")
DEFAULT_ENT_COEF = 3e-4
# Nats for each number of a Box that the target entropy "auto" stands for: those of a standard deviation of 0.242
AUTO_TARGET_ENTROPY = 0.0


def dynamics_share(actor_gradient: float | str, actions: ActionSpec) -> float:
    """Share of the actor's gradient that comes through the imagined dynamics; REINFORCE has the rest.

    :param actor_gradient: "reinforce", "dynamics", a share in [0, 1], or "auto": dynamics for a Box, else REINFORCE, as in the
        authors' release of 2023
    :param actions: what actions look like
    :raises ValueError: another name, a share outside [0, 1], or dynamics for actions that are no Box
    """
    if isinstance(actor_gradient, str):
        if actor_gradient not in ACTOR_GRADIENTS:
            raise ValueError(unknown_name("actor_gradient", actor_gradient, (*ACTOR_GRADIENTS, "a share in [0, 1]")))
        continuous = actions.nvec is None
        share = {"reinforce": 0.0, "dynamics": 1.0, "auto": float(continuous)}[actor_gradient]
    else:
        check_range("actor_gradient (a share, or 'reinforce', 'dynamics', 'auto')", actor_gradient, 0.0, 1.0)
        share = float(actor_gradient)
    if share and actions.nvec is not None:
        raise ValueError(
            f"actor_gradient={actor_gradient!r} needs actions in a Box, since samples of other spaces have no gradient; "
            "allowed for this action space: 'reinforce', 'auto' or 0"
        )
    return share


def largest_entropy(actions: ActionSpec, max_std: float) -> float:
    """The entropy that no policy exceeds, in nats.

    :param actions: what actions look like
    :param max_std: largest standard deviation of a number in a Box
    """
    if actions.nvec is None:
        return actions.size * (math.log(max_std) + 0.5 * math.log(2.0 * math.pi * math.e))
    return sum(math.log(n) for n in actions.nvec)


def entropy_target(ent_coef: float | str, target_entropy: float | str, actions: ActionSpec) -> tuple[float, float | None]:
    """Smallest coefficient of the policy's entropy, and the entropy below which it rises.

    :param ent_coef: the coefficient; or "auto" or "auto_0.001", where it starts
    :param target_entropy: in nats; or "auto": for a Box :data:`AUTO_TARGET_ENTROPY` for each number, for other actions 0,
        which entropies never fall below
    :param actions: what actions look like
    :return: the coefficient, and the target in nats, None if the coefficient is fixed
    :raises ValueError: a value is not allowed
    """
    if target_entropy != "auto":
        if isinstance(target_entropy, str):
            raise ValueError(f"target_entropy must be 'auto' or a number of nats, not {target_entropy!r}")
        check_range("target_entropy (or 'auto')", target_entropy, -math.inf, math.inf)
    if not isinstance(ent_coef, str):
        check_range("ent_coef (or 'auto', 'auto_0.001')", ent_coef, 0.0, math.inf)
        return float(ent_coef), None
    start = DEFAULT_ENT_COEF
    if ent_coef != "auto":
        try:
            start = float(ent_coef.removeprefix("auto_"))
        except ValueError:
            start = -1.0
        if not ent_coef.startswith("auto_") or not 0.0 < start < math.inf:
            raise ValueError(
                f"ent_coef must be a number of at least 0, 'auto', or 'auto_' and a positive number to start from "
                f"('auto_0.001'), not {ent_coef!r}"
            )
    if target_entropy != "auto":
        return start, float(target_entropy)
    return start, AUTO_TARGET_ENTROPY * actions.size if actions.nvec is None else 0.0


# Arguments of the policy that the algorithm gives it, by name: what sets them
_NOT_IN_POLICY_KWARGS = {
    "model_size": "it is an argument of DreamerGPLD",
    "planner": "it is an argument of DreamerGPLD",
    "actor_group": "actor_learning_rate of DreamerGPLD is given for it",
}


def _check_kinds(algorithm: DreamerGPLD) -> None:
    """Look at the arguments that SB3 or PyTorch would stumble over because of their type.

    :param algorithm: with the arguments as attributes
    :raises ValueError, TypeError: it is another one than is allowed; the text names the argument and what is
    """
    if not hasattr(algorithm, "action_space"):
        raise ValueError("env must be an environment, a vectorised one, or the id of one, not None")
    for name in ("policy_kwargs", "replay_buffer_kwargs"):
        value = getattr(algorithm, name)
        if value is not None and not isinstance(value, Mapping):
            raise TypeError(f"{name} must be a dict of arguments, not {value!r}")
    kwargs = algorithm.policy_kwargs or {}
    for name, instead in _NOT_IN_POLICY_KWARGS.items():
        if name in kwargs:
            raise TypeError(f"policy_kwargs entry {name!r} is not allowed: {instead}")
    optimizer = kwargs.get("optimizer_class", th.optim.Optimizer)
    if not callable(optimizer):
        raise TypeError(f"policy_kwargs entry 'optimizer_class' must be a class such as torch.optim.Adam, not {optimizer!r}")
    if not callable(algorithm.learning_rate):
        check_range("learning_rate (or a function)", algorithm.learning_rate, 0.0, math.inf)
    if algorithm.action_noise is not None and not isinstance(algorithm.action_noise, ActionNoise):
        raise TypeError(
            f"action_noise must be None or an ActionNoise of Stable-Baselines3, not {algorithm.action_noise!r}; "
            "exploration_noise takes a number"
        )
    if algorithm.seed is not None:
        check_int("seed (or None)", algorithm.seed, 0)
    for name in ("plan_in_training", "penalty_random_rows"):
        check_bool(name, getattr(algorithm, name))


def _fill_train_ratio(algorithm: DreamerGPLD) -> None:
    """Replace a ``train_ratio`` of None by half a batch.

    :param algorithm: with the arguments as attributes
    :raises ValueError: the batch is no whole number of windows, or of their steps
    """
    if algorithm.train_ratio is None:
        check_int("batch_size", algorithm.batch_size, 1)
        algorithm.train_ratio = algorithm.batch_size * window_steps(algorithm) / 2


def check_arguments(algorithm: DreamerGPLD) -> None:
    """Look at every argument of the constructor, and replace a ``train_ratio`` of None by its number.

    :param algorithm: with the arguments as attributes
    :raises ValueError, TypeError: a value is not allowed; the text names the argument and what is
    """
    _check_kinds(algorithm)
    _fill_train_ratio(algorithm)
    for name, minimum in (
        ("buffer_size", 1),
        ("learning_starts", 0),
        ("batch_size", 1),
        ("batch_length", 1),
        ("imagination_horizon", 1),
        ("learning_rate_warmup", 0),
    ):
        check_int(name, getattr(algorithm, name), minimum)
    if algorithm.gradient_steps is not None:
        check_int("gradient_steps (or None)", algorithm.gradient_steps, -1)
    check_range("train_ratio", algorithm.train_ratio, 0.0, float("inf"))
    check_range("gamma", algorithm.gamma, 0.0, 1.0)
    check_range("return_lambda", algorithm.return_lambda, 0.0, 1.0)
    if algorithm.imagination_starts is not None:
        check_int("imagination_starts (or None)", algorithm.imagination_starts, 1)
        steps = window_steps(algorithm)
        if algorithm.imagination_starts > steps:
            raise ValueError(f"imagination_starts must be at most batch_length={steps}, not {algorithm.imagination_starts}")
    if algorithm.actor_learning_rate is not None and not callable(algorithm.actor_learning_rate):
        check_range("actor_learning_rate (or None, or a function)", algorithm.actor_learning_rate, 0.0, float("inf"))
    actions = ActionSpec.from_space(algorithm.action_space)
    dynamics_share(algorithm.actor_gradient, actions)
    entropy_target(algorithm.ent_coef, algorithm.target_entropy, actions)
    PlannerConfig.make(algorithm.planner, actions)
    if algorithm.plan_in_training and algorithm.planner is None:
        raise ValueError(
            "plan_in_training=True needs a planner; allowed: planner='mppi', a dict of its settings, or plan_in_training=False"
        )
    check_range("exploration_noise", algorithm.exploration_noise, 0.0, float("inf"))
    check_range("exploration_share", algorithm.exploration_share, 0.0, 1.0, low_open=True)
    check_range("policy_penalty", algorithm.policy_penalty, 0.0, float("inf"))
    check_range("penalty_start", algorithm.penalty_start, 0.0, float("inf"))
    if algorithm.precision not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"precision must be 'auto', 'float32' or 'bfloat16', not {algorithm.precision!r}")
    if algorithm.compile not in ("auto", True, False):
        raise ValueError(f"compile must be 'auto', True or False, not {algorithm.compile!r}")
    algorithm.processes.share("batch_size", algorithm.batch_size)
    _ = algorithm.penalty  # checks the rest


def window_steps(algorithm: DreamerGPLD) -> int:
    """Steps of a replayed window.

    :param algorithm: with its arguments
    :raises ValueError: they are no whole number of at least 1
    """
    steps = (algorithm.replay_buffer_kwargs or {}).get("batch_length", algorithm.batch_length)
    check_int("batch_length", steps, 1)
    return steps


def check_with_nets(algorithm: DreamerGPLD) -> None:
    """Look at the arguments that depend on the nets, or on their optimiser.

    :param algorithm: with its policy
    :raises ValueError: a value is not allowed; the text names the argument and what is
    """
    policy, rows = algorithm.policy, algorithm.policy.config.stoch
    if algorithm.penalty_rows is not None and algorithm.penalty_rows > rows:
        raise ValueError(
            f"penalty_rows must be at most {rows}, the rows of the stochastic state, not {algorithm.penalty_rows}"
        )
    if policy.config.reconstruction == "redundancy" and algorithm.batch_size * window_steps(algorithm) < 2:
        raise ValueError(
            "reconstruction='redundancy' correlates states over a batch: batch_size * batch_length must be at least 2, "
            f"not {algorithm.batch_size} * {window_steps(algorithm)}"
        )
    _, target = entropy_target(algorithm.ent_coef, algorithm.target_entropy, policy.action_spec)
    largest = largest_entropy(policy.action_spec, policy.config.max_std)
    known = algorithm.device.type != "meta"  # where a file is checked, whose actions are not
    if known and target is not None and (target > largest or target == largest > 0.0):
        raise ValueError(
            f"target_entropy={algorithm.target_entropy!r} is {target:.4g} nats, which this policy cannot reach: the "
            f"coefficient would rise for ever. Allowed: less than {largest:.4g}"
        )
    groups, expected = len(policy.optimizer.param_groups), 2 if policy.actor_group else 1
    if groups != expected:
        raise ValueError(
            f"the optimiser has {groups} groups of parameters; allowed: {expected}, "
            f"{'one of them the policy net' if policy.actor_group else 'which has all'}: learning rates are those of these"
        )
    rate, has_own = algorithm.actor_learning_rate, policy.actor_group
    if (rate is not None) != has_own:
        raise ValueError(
            f"actor_learning_rate={rate!r} has changed since the model was made; allowed: "
            f"{'a learning rate' if has_own else None}"
        )


def check_processes(algorithm: DreamerGPLD) -> None:
    """Look at what several processes that learn together cannot do.

    :param algorithm: with its environments
    :raises ValueError: something would differ between the processes
    """
    processes = algorithm.processes
    if processes.size == 1:
        return
    if algorithm.get_vec_normalize_env() is not None:
        raise ValueError(
            f"VecNormalize cannot be used in {processes.size} processes, since each would scale by statistics of its own; "
            "allowed: environments without it (observations of any scale are compressed by symlog)"
        )
    train_freq = algorithm.train_freq
    if isinstance(train_freq, TrainFreq) and train_freq != TrainFreq(1, TrainFrequencyUnit.STEP):
        raise ValueError(
            f"train_freq={train_freq.frequency} {train_freq.unit.value}s cannot be used in {processes.size} processes, which "
            "agree after each step on what comes next; allowed: 1 (train_ratio says how many updates that makes)"
        )


def check_environments(algorithm: DreamerGPLD) -> None:
    """Look at the environments of several processes, of which all call it.

    :param algorithm: with its environments
    :raises ValueError: the processes have not equally many
    """
    processes = algorithm.processes
    n_envs = algorithm.n_envs
    if processes.sums([n_envs, n_envs**2]) != [n_envs * processes.size, n_envs**2 * processes.size]:
        raise ValueError(
            f"Process {processes.rank} has {n_envs} environments, and not every process as many; allowed: the same number in "
            "each"
        )
