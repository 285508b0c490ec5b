"""How far the penalty's gradient reaches, and what it does to the smoothness of the world model, in short runs.

Usage: python -m benchmarks.penalty_reach [--task cartpole-swingup] [--size debug] [--batch 16] [--length 16] [--steps 2000]
       [--train-ratio 64] [--learning-rate 1e-3] [--seeds 3] [--arms off posterior prior both] [--every 60] [--max-runs N]
       python -m benchmarks.penalty_reach --draw
       python -m benchmarks.penalty_reach --variance

The first form makes the runs that are still missing, one CSV file for each arm and seed; --max-runs stops after so many. A row
is measured on replayed windows, beside the training: the norm of the gradient of either penalty (exact, at all states, λ = 1)
by group of parameters, whether it is trained on or not, the Jacobian norms, and the transition ratios. --draw makes a picture
and tables of them. --variance shows how much the estimates vary on a batch at the end of the first seed's runs.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor, nn

from benchmarks.results import read_columns, read_csv, write_csv
from sb3_dreamer_gpld import DreamerGPLD
from sb3_dreamer_gpld.diagnostics import posterior_states, replay_windows, smoothness, undisturbed
from sb3_dreamer_gpld.envs import make_dmc
from sb3_dreamer_gpld.nets.gpld import rademacher
from sb3_dreamer_gpld.nets.world_model import WorldModel, WorldModelDraws
from sb3_dreamer_gpld.saving import staged

ARMS = {"off": (0.0, 0.0), "posterior": (0.5, 0.0), "prior": (0.0, 0.5), "both": (0.5, 0.5)}  # λ₀ of posterior and prior
PENALTIES = ("posterior", "prior")
GROUPS = ("encoder", "recurrence", "posterior", "prior", "decoder", "reward", "continue")
MEASURES = ("posterior_jacobian", "prior_jacobian", "transition_ratio", "transition_ratio_max", "return")
LAST_EPISODES = 3  # whose mean return is recorded
DRAWS = 32  # estimates on which a standard deviation is measured
SETTINGS = ("task", "size", "batch", "length", "steps", "train_ratio", "learning_rate", "action_repeat", "every")


# ------------------------------------------------------------------------------------------------------------- measuring


def parameter_groups(world_model: WorldModel) -> dict[str, list[nn.Parameter]]:
    """The parameters of the world model by group; the recurrence is all of the RSSM but its two heads."""
    rssm = world_model.rssm
    heads = [*rssm.posterior.parameters(), *rssm.prior.parameters()]
    decoders = [module for module in (world_model.vector_decoder, world_model.image_decoders) if module is not None]
    groups: dict[str, Iterable[nn.Parameter]] = {
        "encoder": world_model.encoder.parameters(),
        "recurrence": (p for p in rssm.parameters() if all(p is not head for head in heads)),
        "posterior": rssm.posterior.parameters(),
        "prior": rssm.prior.parameters(),
        "decoder": (p for module in decoders for p in module.parameters()),
        "reward": world_model.reward.parameters(),
        "continue": world_model.cont.parameters(),
    }
    return {name: list(parameters) for name, parameters in groups.items()}


class Penalties:
    """Both penalties at the posterior states of one batch, and their gradients. To be used inside ``undisturbed``.

    :param model: whose replay buffer the batch is from
    :param generator: draws the batch
    """

    def __init__(self, model: DreamerGPLD, generator: np.random.Generator) -> None:
        batch = replay_windows(model, model.batch_size, generator)
        self.world_model, self.size = model.policy.world_model, batch.rewards.shape
        self.groups = parameter_groups(self.world_model)
        with th.enable_grad():
            self.states, self.tokens = posterior_states(model.policy, batch)

    @th.enable_grad()
    def __call__(self, kind: str, estimator: str = "exact", fraction: float = 1.0) -> Tensor:
        """:return: the penalty at the chosen states divided by their share, and 0 at the others, (B, T)"""
        total, device, config = self.size.numel(), self.tokens.device, self.world_model.config
        at = th.randperm(total, device=device)[: max(1, int(fraction * total))]
        probes = rademacher((config.stoch, len(at), config.classes), device) if estimator == "hutchinson" else None
        # The probes of the net that is not asked for are not looked at
        draws = WorldModelDraws(self.tokens, at, None, probes, probes)
        losses = self.world_model.penalty_losses(self.states.deter, self.tokens, draws, kind == "posterior", kind == "prior")
        return losses[f"{kind}_penalty"] * (total / len(at))

    @th.enable_grad()
    def gradients(self, penalty: Tensor) -> dict[str, Tensor]:
        """Gradient of the mean of a penalty (B, T), flattened, by group."""
        parameters = [p for group in self.groups.values() for p in group]
        grads = th.autograd.grad(penalty.mean(), parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        flat = iter(grads)
        return {name: th.cat([next(flat).flatten() for _ in group]) for name, group in self.groups.items()}


def measure_reach(model: DreamerGPLD, generator: np.random.Generator) -> dict[str, float]:
    """One row of a run."""
    with undisturbed(model.policy, int(generator.integers(2**31))):
        penalties = Penalties(model, generator)
        states, tokens = penalties.states, penalties.tokens
        flat = [x.detach().flatten(0, 1) for x in (states.deter, states.stoch, tokens)]
        found = smoothness(model.policy, flat[0], flat[1], flat[2], scales=())
        norms = {
            f"{kind}/{group}": gradient.norm().item()
            for kind in PENALTIES
            for group, gradient in penalties.gradients(penalties(kind)).items()
        }
    assert model.ep_info_buffer is not None
    returns = [episode["r"] for episode in list(model.ep_info_buffer)[-LAST_EPISODES:]]
    return {
        "update": model._n_updates,
        "posterior_jacobian": found.posterior_jacobian.mean().item(),
        "prior_jacobian": found.prior_jacobian.mean().item(),
        "transition_ratio": found.transition_ratio.mean().item(),
        "transition_ratio_max": found.transition_ratio.max().item(),
        "return": statistics.fmean(returns) if returns else math.nan,
        **norms,
    }


def measure_variance(model: DreamerGPLD, generator: np.random.Generator) -> list[dict[str, Any]]:
    """Standard deviations of the estimates, relative to the exact value at all states, on one batch.

    :return: rows for each penalty and estimate: of a single state (the root of the mean variance over the states, by the mean
        value), of the batch's mean, and of the gradient (root of the mean squared distance by the norm)
    """
    rows = []
    with undisturbed(model.policy, 0):
        penalties = Penalties(model, generator)
        for kind in PENALTIES:
            exact = penalties(kind)
            gradient = th.cat(list(penalties.gradients(exact).values()))
            for estimator, fraction in (("hutchinson", 1.0), ("exact", 0.5), ("hutchinson", 0.5)):
                estimates = [penalties(kind, estimator, fraction) for _ in range(DRAWS)]
                values = th.stack([x.detach() for x in estimates])  # (draws, B, T)
                distances = [
                    (th.cat(list(penalties.gradients(x).values())) - gradient).square().sum().item() for x in estimates
                ]
                single = values.var(0).mean().sqrt() / exact.mean() if fraction == 1 else th.tensor(math.nan)
                rows.append(
                    {
                        "penalty": kind,
                        "estimator": estimator,
                        "fraction": fraction,
                        "state": single.item(),
                        "batch": (values.mean((1, 2)).std() / exact.mean()).item(),
                        "gradient": math.sqrt(statistics.fmean(distances)) / gradient.norm().item(),
                    }
                )
    return rows


class Recorder(BaseCallback):
    """Measures before the first update that is due, and then every so many updates.

    :param every: updates between two rows
    """

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every = every
        self.rows: list[dict[str, float]] = []
        self.generator = np.random.default_rng(0)

    def _on_step(self) -> bool:
        model: Any = self.model
        if model.replay_buffer.has_window() and model._n_updates >= self.every * len(self.rows):
            self.record()
        return True

    def record(self) -> None:
        model: Any = self.model
        self.rows.append(measure_reach(model, self.generator))


# ------------------------------------------------------------------------------------------------------------------ runs


def train(arm: str, seed: int, args: argparse.Namespace) -> tuple[DreamerGPLD, list[dict[str, float]]]:
    """One run, and its rows."""
    posterior, prior = ARMS[arm]
    model = DreamerGPLD(
        "MultiInputPolicy",
        make_dmc(args.task, action_repeat=args.action_repeat, seed=seed),
        model_size=args.size,
        batch_size=args.batch,
        batch_length=args.length,
        train_ratio=args.train_ratio,
        learning_rate=args.learning_rate,
        learning_rate_warmup=100,
        learning_starts=512,
        buffer_size=max(1000, args.steps + 1000),
        posterior_penalty=posterior,
        prior_penalty=prior,
        precision="float32",
        compile=False,
        device="cpu",
        seed=seed,
    )
    recorder = Recorder(args.every)
    model.learn(args.steps, callback=recorder, log_interval=None)
    if recorder.rows[-1]["update"] < model._n_updates:
        recorder.record()
    return model, recorder.rows


def make_runs(args: argparse.Namespace) -> None:
    """Make the runs that are missing.

    :raises SystemExit: the folder has runs of another setting
    """
    settings = {name: getattr(args, name) for name in SETTINGS}
    file = args.data / "settings.json"
    if file.exists() and json.loads(file.read_text()) != settings:
        raise SystemExit(f"{file} has other settings: {file.read_text().strip()}. Name another folder with --data")
    missing = [(arm, seed) for seed in range(args.seeds) for arm in args.arms if not _csv(args, arm, seed).exists()]
    for arm, seed in missing[: args.max_runs]:
        start = time.perf_counter()
        model, rows = train(arm, seed, args)
        with staged(args.data) as folder:
            (folder / "settings.json").write_text(json.dumps(settings, indent=2) + "\n")
            write_csv(folder / _csv(args, arm, seed).name, rows)
            if seed == 0:
                write_csv(folder / f"variance_{arm}.csv", measure_variance(model, np.random.default_rng(0)))
        print(f"{arm}, seed {seed}: {rows[-1]['update']} updates, {time.perf_counter() - start:.0f} s", flush=True)
    print(f"{max(0, len(missing) - (args.max_runs or len(missing)))} runs are missing")


def _csv(args: argparse.Namespace, arm: str, seed: int) -> Path:
    return args.data / f"{arm}_{seed}.csv"


# --------------------------------------------------------------------------------------------------------------- results

Runs = dict[str, list[dict[str, np.ndarray]]]  # by arm: the columns of each seed


def read_runs(args: argparse.Namespace) -> Runs:
    """:raises SystemExit: there is none"""
    runs: Runs = {}
    for arm in args.arms:
        for file in sorted(args.data.glob(f"{arm}_[0-9]*.csv")):
            runs.setdefault(arm, []).append(read_columns(file))
    if not runs:
        raise SystemExit(f"{args.data} has no runs; make them first, without --draw")
    return runs


def spread(values: Iterable[float]) -> str:
    """Mean and standard deviation over the seeds."""
    numbers = list(values)
    return f"{statistics.fmean(numbers):.3g} ± {statistics.stdev(numbers):.2g}" if len(numbers) > 1 else f"{numbers[0]:.3g}"


def tables(runs: Runs) -> str:
    """The last rows of the runs, in Markdown."""
    lines = ["| λ₀ > 0 | ‖J‖ posterior | ‖J‖ prior | transition ratio | largest ratio | return |", "| --- " * 6 + "|"]
    for arm, seeds in runs.items():
        cells = [spread(columns[name][-1] for columns in seeds) for name in MEASURES]
        lines.append(f"| {arm} (n = {len(seeds)}) | " + " | ".join(cells) + " |")
    for kind in PENALTIES:
        lines += ["", f"Norm of the gradient of the {kind}'s penalty (λ = 1):", ""]
        lines += ["| trained with λ₀ > 0 | " + " | ".join(GROUPS) + " |", "| --- " * (1 + len(GROUPS)) + "|"]
        for arm, seeds in runs.items():
            cells = [spread(columns[f"{kind}/{group}"][-1] for columns in seeds) for group in GROUPS]
            lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(args: argparse.Namespace) -> None:
    """Make the picture and the tables."""
    from matplotlib.figure import Figure

    runs = read_runs(args)
    figure = Figure(figsize=(15, 8), layout="constrained")
    top, bottom = figure.subfigures(2, 1)
    titles = ("‖∂q/∂u‖ of the posterior", "‖∂q/∂u‖ of the prior", "transition ratio, mean", "largest", "episode return")
    for axes, name, title in zip(top.subplots(1, len(MEASURES)), MEASURES, titles, strict=True):
        for number, (arm, seeds) in enumerate(runs.items()):
            steps = seeds[0]["update"]
            values = np.stack([np.interp(steps, columns["update"], columns[name]) for columns in seeds])
            axes.plot(steps, values.mean(0), color=f"C{number}", label=arm)
            axes.fill_between(steps, values.min(0), values.max(0), color=f"C{number}", alpha=0.2)
        axes.set_title(title)
        axes.set_xlabel("updates")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    axes.legend(title="λ₀ > 0")
    for axes, kind in zip(bottom.subplots(1, 2, sharey=True), PENALTIES, strict=True):
        for number, (arm, seeds) in enumerate(runs.items()):
            means = [np.mean([columns[f"{kind}/{group}"][-1] for columns in seeds]) for group in GROUPS]
            axes.bar(np.arange(len(GROUPS)) + 0.2 * (number - 1.5), means, 0.2, color=f"C{number}", label=arm)
        axes.set_xticks(range(len(GROUPS)), GROUPS)
        axes.set_yscale("log")
        axes.set_title(f"norm of the gradient of the {kind}'s penalty by group, last update (no bar: 0)")
        axes.grid(alpha=0.3)
    with staged(args.figures) as folder:
        figure.savefig(folder / "penalty_reach.png", dpi=90)
    with staged(args.data) as folder:
        (folder / "tables.md").write_text(tables(runs), encoding="utf-8")
    print(tables(runs))


def show_variance(args: argparse.Namespace) -> None:
    """Print the standard deviations that the first seed's runs measured at their end."""
    lines = ["| trained with λ₀ > 0 | penalty | estimate | one state | mean of the batch | gradient |", "| --- " * 6 + "|"]
    for arm in args.arms:
        file = args.data / f"variance_{arm}.csv"
        for row in read_csv(file):
            cells = ["–" if row[name] == "nan" else f"{float(row[name]):.3f}" for name in ("state", "batch", "gradient")]
            name = f"{row['estimator']}, {'all' if float(row['fraction']) == 1 else 'half of the'} states"
            lines.append(f"| {arm} | {row['penalty']} | {name} | " + " | ".join(cells) + " |")
    if len(lines) == 2:
        raise SystemExit(f"{args.data} has no finished runs of the first seed; make them first, without --variance")
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--variance", action="store_true")
    parser.add_argument("--task", default="cartpole-swingup")
    parser.add_argument("--action-repeat", type=int, default=2)
    parser.add_argument("--size", default="debug")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--train-ratio", type=float, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--every", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--max-runs", type=int, help="make at most so many runs now")
    parser.add_argument("--data", type=Path, default=Path("docs/data/penalty_reach"))
    parser.add_argument("--figures", type=Path, default=Path("docs/figures"))
    args = parser.parse_args()
    if args.draw:
        draw(args)
    if args.variance:
        show_variance(args)
    if not (args.draw or args.variance):
        make_runs(args)


if __name__ == "__main__":
    sys.exit(main())
