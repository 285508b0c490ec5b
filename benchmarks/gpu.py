"""Everything that is asked of a GPU machine, in one command and a few minutes.

Usage: python -m benchmarks.gpu [--minutes 8] [--to runs/gpu] [--device cuda] [--sizes 1m 12m] [--only PART ...]

In this order, each part in a process of its own, so that one that breaks leaves the others:

    packages  what is missing here, and what the card is
    tests     tests/test_cuda.py; what it compiles comes after the times of updates
    parity    the recorded updates of the authors' release: largest error of a loss and of a gradient, uncompiled, that
              recorded as a CUDA graph, compiled, and that recorded
    update    milliseconds, kernels and memory of an update, for each size, penalty and way to run it, as far as the time goes
    loop      steps and updates per second of the whole loop with 1 and 16 environments, and with 1 and the replay buffer on
              the device
    walk      walker-walk in the GPLD paper's setting with the time that is left; goes on where an earlier call stopped

Results are printed and saved in ``results.json`` after each part; ``walk.csv`` grows by a row for every episode. No network
is needed. Let nothing else run beside it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
NEEDED = ("numpy", "torch", "gymnasium", "stable_baselines3", "yaml", "pytest", "hypothesis", "tensorboard")
TASKS_NEED = ("shimmy", "dm_control", "mujoco")
PENALTIES: dict[str, dict[str, Any]] = {  # the most wanted figures first
    "hutchinson": dict(posterior_penalty=0.5),
    "off": dict(posterior_penalty=0.0),
    "exact": dict(posterior_penalty=0.5, penalty_estimator="exact"),
}
# Ways to run an update, those of one process together: compiling takes most of its time.
MODES = (("uncompiled", "uncompiled, recorded"), ("compiled", "compiled, recorded"))
RECORDINGS = ("cont0", "disc0", "image0")
LAST_SECONDS = 20.0  # kept for saving at the end of a part


class Part(NamedTuple):
    """One process.

    :param name: of its function in :data:`PARTS`
    :param options: keyword arguments of that function, beside the device and the folder
    :param limit: seconds after which it is stopped
    :param reserve: seconds that it leaves for the parts after it
    :param least: seconds with less of which it is not begun
    """

    name: str
    options: dict[str, Any]
    limit: float
    reserve: float = 0.0
    least: float = 15.0

    @property
    def title(self) -> str:
        return " ".join(
            [self.name, *(value if isinstance(value, str) else json.dumps(value) for value in self.options.values())]
        )


def plan(sizes: list[str]) -> Iterator[Part]:
    """All parts in their order."""
    yield Part("packages", {}, 60.0)
    yield Part("tests", {"chosen": "not compiled"}, 120.0)
    uncompiled, compiled = MODES
    yield Part("parity", {"recordings": RECORDINGS, "modes": uncompiled}, 90.0, reserve=240.0)
    yield Part("parity", {"recordings": RECORDINGS[:1], "modes": compiled}, 150.0, reserve=200.0, least=60.0)
    for penalty in PENALTIES:
        for modes, size in itertools.product(MODES, sizes):
            limit, least = (60.0, 15.0) if modes is uncompiled else (150.0, 60.0)
            yield Part("update", {"size": size, "penalty": penalty, "modes": modes}, limit, reserve=90.0, least=least)
        if penalty == next(iter(PENALTIES)):
            yield Part("tests", {"chosen": "compiled"}, 120.0, reserve=90.0, least=60.0)
    for environments, storage in ((1, "host"), (1, "device"), (16, "host")):
        yield Part("loop", {"size": sizes[0], "environments": environments, "storage": storage}, 120.0, reserve=60.0)
    yield Part("walk", {"size": "12m" if "12m" in sizes else sizes[-1]}, float("inf"))


# ------------------------------------------------------------------------------------------------------------- parts


def note(folder: Path, found: dict[str, Any]) -> None:
    """Keep what a part has found so far, whatever becomes of it."""
    (folder / "part.json").write_text(json.dumps(found))


def packages(device: str, folder: Path, seconds: float) -> dict[str, Any]:
    """Versions of what is here, and names of what is not."""
    names = (*NEEDED, *TASKS_NEED)
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if "torch" in missing:
        return {"missing": missing}
    import torch as th

    distributions = {"yaml": "pyyaml"}
    versions = {name: importlib.metadata.version(distributions.get(name, name)) for name in names if name not in missing}
    card = th.cuda.get_device_name() if th.cuda.is_available() else None
    compilers = {"gcc": shutil.which("gcc"), "triton": importlib.util.find_spec("triton") is not None}
    return {
        "missing": missing,
        "versions": versions,
        "card": card,
        "cuda": th.version.cuda,
        "device": device,
        "compilers": compilers,  # without them nothing can be compiled
    }


def tests(device: str, folder: Path, seconds: float, chosen: str) -> dict[str, Any]:
    """The tests that need a GPU, or some of them, as pytest's ``-k`` chooses them."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, "tests/test_cuda.py"]
    lines = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
        assert running.stdout is not None
        for line in running.stdout:
            print(line, end="", flush=True)  # what is seen of a part that is stopped
            lines += [line.strip()] if line.strip() else []
    if running.returncode != 0:
        raise SystemExit(running.returncode)
    return {"summary": lines[-1:]}


def parity(device: str, folder: Path, seconds: float, recordings: Sequence[str], modes: Sequence[str]) -> dict[str, Any]:
    """Largest relative error of a loss, and of a gradient beside its largest entry, of each recording in each way."""
    found: dict[str, Any] = {}
    for recording in recordings:
        for mode, errors in errors_of(recording, device, modes):
            found.setdefault(recording, {})[mode] = errors
            note(folder, found)
    return found


def errors_of(recording: str, device: str, modes: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """:func:`parity` of one recording, mode by mode."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "nets")]
    import torch as th
    from test_parity import RECORDINGS, Recording
    from torch.utils._pytree import tree_map

    from sb3_dreamer_gpld.execution import CALLS_BEFORE_RECORDING, CudaGraphs, Execution
    from sb3_dreamer_gpld.learner import Draws

    th.backends.cudnn.allow_tf32 = False  # the recordings are in float32
    recorded = Recording(RECORDINGS[recording])
    model = recorded.model()
    arguments = recorded.batch(model), Draws(recorded.world_draws(model), recorded.imagination_draws(model))
    model.device, model.policy = th.device(device), model.policy.to(device)
    moved = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, th.Tensor) else leaf, arguments)
    execution = model.learner.execution = Execution(model.policy, model.device)

    def gradients_of(inputs: tuple) -> th.Tensor:
        model.policy.zero_grad(set_to_none=True)
        total = model.learner.loss(*inputs, model._n_updates).total
        total.backward()
        return total.detach()

    recorder = CudaGraphs(model.device) if model.device.type == "cuda" else None
    for mode in modes:
        if mode.startswith("compiled") and not execution.compiled:
            execution.compile()
        execution.recorder = recorder if mode.endswith("recorded") else None
        for _ in range(CALLS_BEFORE_RECORDING + 2):  # so many that it is captured, and replayed
            total = execution.run_whole(gradients_of, lambda: "parity", moved)
        ours = {key: value.grad.cpu() for key, value in model.policy.named_parameters() if value.grad is not None}
        errors = {
            key: float((ours[key] - value).abs().max() / value.abs().max())
            for key, value in recorded.parameters("grad/").items()
            if key in ours and value.abs().max() > 0
        }
        worst = max(errors, key=errors.__getitem__)
        expected = recorded.tensor("loss_total")
        error = float((total.detach().cpu() - expected).abs() / expected.abs())
        is_recorded = execution.recorder is not None and execution.is_recorded("gradients_of")
        yield mode, {"loss": error, "gradient": errors[worst], "worst": worst, "recorded": is_recorded}


def update(device: str, folder: Path, seconds: float, size: str, penalty: str, modes: Sequence[str]) -> dict[str, Any]:
    """Milliseconds of an update of 16 x 64 steps (median of eleven), kernels that it launches, and memory."""
    import torch as th

    from benchmarks.walker import filled_model
    from sb3_dreamer_gpld.execution import CALLS_BEFORE_RECORDING, CudaGraphs

    options = {"compile": modes[0].startswith("compiled"), "precision": "auto", "buffer_size": 10_000, **PENALTIES[penalty]}
    model = filled_model(model_size=size, device=device, **options)
    execution, found = model.learner.execution, dict[str, Any]()
    recorder = CudaGraphs(model.device) if model.device.type == "cuda" else None
    for mode in modes:
        execution.recorder = recorder if mode.endswith("recorded") else None
        if model.device.type == "cuda":
            th.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        model.train(1, model.batch_size)
        first = time.perf_counter() - start
        model.train(CALLS_BEFORE_RECORDING + 2, model.batch_size)
        is_recorded = execution.recorder is not None and execution.is_recorded("step")
        found[mode] = {"first_s": first, **timed(model), "recorded": is_recorded}
        note(folder, found)  # the profiler may fail
        found[mode] |= launched(model)
        note(folder, found)
    return found


def timed(model: Any) -> dict[str, Any]:
    """Time of an update as it is run now, and on a GPU the memory since the last reset."""
    import numpy as np
    import torch as th

    from benchmarks.yardstick import synchronize

    times = []
    for _ in range(11):
        synchronize(model.device)
        start = time.perf_counter()
        model.train(1, model.batch_size)
        synchronize(model.device)
        times.append(time.perf_counter() - start)
    found = {"ms": 1e3 * float(np.median(times)), "ms_range": [1e3 * min(times), 1e3 * max(times)]}
    if model.device.type == "cuda":
        found["peak_mib"] = th.cuda.max_memory_allocated() / 2**20
        found["reserved_mib"] = th.cuda.max_memory_reserved() / 2**20  # with the pools of graphs
    return found


def launched(model: Any) -> dict[str, Any]:
    """Kernels of an update as it is run now, on a GPU."""
    import torch as th

    from benchmarks.yardstick import synchronize

    found: dict[str, Any] = {}
    if model.device.type == "cuda":
        with th.profiler.profile(activities=[th.profiler.ProfilerActivity.CUDA]) as profile:
            model.train(1, model.batch_size)
            synchronize(model.device)
        kernels = [event for event in profile.events() if event.device_type == th.autograd.DeviceType.CUDA]
        found["kernels"] = len(kernels)
        found["kernel_ms"] = sum(event.device_time for event in kernels) / 1e3
    return found


def loop(device: str, folder: Path, seconds: float, size: str, environments: int, storage: str) -> dict[str, Any]:
    """Steps and updates per second of the whole loop on walker-sized environments without a simulator, once it updates."""
    from stable_baselines3.common.env_util import make_vec_env

    from benchmarks.walker import WalkerSized
    from sb3_dreamer_gpld import DreamerGPLD

    env, rows = make_vec_env(WalkerSized, n_envs=environments), {"storage": storage}
    model = DreamerGPLD(
        "MultiInputPolicy",
        env,
        seed=0,
        model_size=size,
        device=device,
        learning_starts=1100,
        buffer_size=10_000,
        replay_buffer_kwargs=rows,
        compile=device != "cpu",  # there it would take longer than the part may
    )
    model.learn(1200, log_interval=None)  # with the first updates, which may compile
    steps, updates, start = model.num_timesteps, model._n_updates, time.perf_counter()
    while time.perf_counter() - start < min(20.0, seconds / 3):
        model.learn(10 * environments, reset_num_timesteps=False, log_interval=None)
    elapsed = time.perf_counter() - start
    return {
        "steps_per_s": (model.num_timesteps - steps) / elapsed,
        "updates_per_s": (model._n_updates - updates) / elapsed,
    }


def walk(device: str, folder: Path, seconds: float, size: str) -> dict[str, Any]:
    """walker-walk in the GPLD paper's setting, from the checkpoint of an earlier call if there is one."""
    from stable_baselines3.common.env_util import make_vec_env

    from benchmarks.results import read_csv, write_csv
    from sb3_dreamer_gpld import DreamerGPLD, preset
    from sb3_dreamer_gpld.envs import make_dmc

    end = time.perf_counter() + seconds - LAST_SECONDS
    env = make_vec_env(make_dmc, n_envs=16, env_kwargs=dict(task="walker-walk", action_repeat=2))
    checkpoint, buffer_file, table = folder / "walk.zip", folder / "walk_buffer.pkl", folder / "walk.csv"
    if checkpoint.exists() and buffer_file.exists():
        model = DreamerGPLD.load(checkpoint, env=env, device=device)
        model.load_replay_buffer(buffer_file)
    else:
        model = DreamerGPLD(
            "MultiInputPolicy", env, seed=0, device=device, compile=device != "cpu", **{**preset("paper"), "model_size": size}
        )
    rows: list[dict[str, Any]] = [row for row in read_csv(table) if int(row["frames"]) <= model.num_frames]
    begin = time.perf_counter()
    while time.perf_counter() < end:
        model.learn(160, reset_num_timesteps=False, log_interval=None)
        if model.ep_info_buffer:
            rows += [
                {"frames": model.num_frames, "episode_return": float(episode["r"]), "updates": model._n_updates}
                for episode in model.ep_info_buffer
            ]
            model.ep_info_buffer.clear()
            write_csv(table, rows)
    model.save(checkpoint)
    model.save_replay_buffer(buffer_file)
    last = [float(row["episode_return"]) for row in rows[-16:]]
    return {
        "frames": model.num_frames,
        "updates": model._n_updates,
        "last_returns": last,
        "s": time.perf_counter() - begin,
    }


PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    part.__name__: part for part in (packages, tests, parity, update, loop, walk)
}


# ------------------------------------------------------------------------------------------------------ command line


def run_part(part: Part, device: str, folder: Path, seconds: float) -> dict[str, Any]:
    """One part in a process of its own.

    :param part: which
    :param device: of the model
    :param folder: for the files
    :param seconds: until it is stopped
    :return: status, seconds, and what it found, or the end of what it printed
    """
    out = folder / "part.json"
    out.unlink(missing_ok=True)
    inner = max(1.0, seconds - LAST_SECONDS / 2) if part.name == "walk" else seconds
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", part.name, "--options", json.dumps(part.options)]
    command += ["--device", device, "--to", str(folder), "--seconds", str(inner)]
    start = time.perf_counter()
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes) as running:
        try:
            output, _ = running.communicate(timeout=seconds)
            status = "ok" if running.returncode == 0 else "failed"
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)  # with the processes that it has started
            output, _ = running.communicate()
            status = "stopped"
        except BaseException:  # Ctrl-C does not reach a session of its own
            os.killpg(running.pid, signal.SIGKILL)
            raise
    found = json.loads(out.read_text()) if out.exists() else {}
    if status != "ok":
        found["output"] = output[-4000:]
    out.unlink(missing_ok=True)
    return {"part": part.title, "status": status, "s": round(time.perf_counter() - start, 1), **found}


def run_all(parts: list[Part], device: str, folder: Path, minutes: float) -> int:
    """Parts one after the other, as long as there is time.

    :return: how many did not end well
    """
    end = time.perf_counter() + 60 * minutes
    results: list[dict[str, Any]] = []
    missing: set[str] = set()
    for part in parts:
        left = end - time.perf_counter() - part.reserve
        if part.name == "walk" and missing:
            results.append({"part": part.title, "status": f"missing: {', '.join(sorted(missing))}"})
        elif left < part.least:
            results.append({"part": part.title, "status": "no time left"})
        else:
            results.append(run_part(part, device, folder, min(part.limit, left)))
        print(json.dumps(results[-1]), flush=True)
        written = folder / ".results.json"  # not by the package, which some of what is missing would stop
        written.write_text(json.dumps(results, indent=2) + "\n")
        written.replace(folder / "results.json")
        missing = missing or set(results[-1].get("missing", ()))
        if missing & set(NEEDED):
            print(f"Nothing else can run without {', '.join(sorted(missing & set(NEEDED)))}")
            return 1
    return sum(result["status"] != "ok" for result in results)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="of all parts together (default: 8)")
    parser.add_argument("--to", type=Path, default=Path("runs/gpu"), help="folder of the results (default: runs/gpu)")
    parser.add_argument("--device", default="cuda", help="cpu tries the command itself (default: cuda)")
    parser.add_argument("--sizes", nargs="+", default=["1m", "12m"], help="of the models (default: 1m 12m)")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="parts (default: all)")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--options", type=json.loads, default={}, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = args.to.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if args.part:
        found = PARTS[args.part](args.device, folder, args.seconds, **args.options)
        note(folder, found)
        return 0
    parts = [part for part in plan(args.sizes) if args.only is None or part.name in args.only]
    return min(1, run_all(parts, args.device, folder, args.minutes))


if __name__ == "__main__":
    sys.exit(main())
