"""Two processes that learn together, on the processor: the same gradient as one process, equal copies, resume, wrong input."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch as th

from sb3_dreamer_gpld import parallel
from sb3_dreamer_gpld.config import RECONSTRUCTIONS
from sb3_dreamer_gpld.parallel import ALONE, Processes

PATHS = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
START = """
import os, sys
import numpy as np
import torch as th
th.set_num_threads(1)
sys.path[:0] = {paths!r}
from test_dreamer_gpld import BOX, RandomSpaces, tiny
from test_saving import Clock
from sb3_dreamer_gpld import DreamerGPLD
rank = int(os.environ["RANK"])

def tell(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # whole: a line that the other process cannot break
"""


def torchrun(script: str, folder: Path, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """Run a Python script in several processes."""
    file = folder / "script.py"
    file.write_text(START.format(paths=PATHS) + textwrap.dedent(script))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=environment, check=False)


# ------------------------------------------------------------------------------------------------ what is computed

GRADIENT = """
from sb3_dreamer_gpld.learner import Draws, Learner
from sb3_dreamer_gpld.nets.actor_critic import ImaginationDraws
from sb3_dreamer_gpld.nets.world_model import WorldModelDraws
from sb3_dreamer_gpld.parallel import ALONE

B, T, H, S = 6, 8, 3, 4
options = dict(prior_penalty=0.3, ent_coef="auto", target_entropy=2.0, imagination_starts=S, batch_size=B)
options["policy_kwargs"] = dict(reconstruction=RECONSTRUCTION)
model = tiny(RandomSpaces(BOX, BOX), precision="float32", **options)
policy = model.policy.double()
generator = th.Generator().manual_seed(0)
for p in policy.parameters():  # heads that predict something
    p.data = 0.3 * th.randn(p.shape, generator=generator, dtype=th.float64)
for name in ("world_model", "actor_critic"):
    getattr(policy, name).bins = getattr(policy, name).bins.double()
K, C = policy.config.stoch, policy.config.classes

def uniform(*shape):
    return th.rand(*shape, generator=generator, dtype=th.float64)

from sb3_dreamer_gpld.nets.world_model import Batch
first = uniform(B, T) < 0.2
batch = Batch({{"": 2 * uniform(B, T, 3) - 1}}, 2 * uniform(B, T, 3) - 1, uniform(B, T), first, uniform(B, T) < 0.2,
    uniform(B, T) < 0.1, uniform(B, 32), uniform(B, C, K))
states = [th.randperm(B // 2 * T, generator=generator)[:12] for _ in range(2)]  # penalised, of either half of the batch
probes = [2.0 * (uniform(K, 24, C) < 0.5) - 1.0 for _ in range(2)]
whole = Draws(
    WorldModelDraws(uniform(B, T, K), th.cat([states[0], states[1] + B // 2 * T]), None, None, *probes),
    ImaginationDraws(uniform(H, B * S, K), th.randn(H, B * S, 3, generator=generator, dtype=th.float64)),
)
half = slice(rank * B // 2, (rank + 1) * B // 2)
its_states, its_starts = slice(12 * rank, 12 * rank + 12), slice(rank * B // 2 * S, (rank + 1) * B // 2 * S)
mine = Draws(
    WorldModelDraws(whole.world_model.stoch[half], states[rank], None, None, *(x[:, its_states] for x in probes)),
    ImaginationDraws(whole.imagination.stoch[:, its_starts], whole.imagination.action[:, its_starts]),
)

def gradient(learner, batch, draws):
    policy.optimizer.zero_grad()
    result = learner.loss(batch, draws, 5)
    result.total.backward()
    means = [term.value.detach().mean() for term in result.terms.values()]
    grads = [p.grad for p in policy.parameters() if p.grad is not None]
    learner.processes.average_([*grads, *means])
    return [*grads, *means, *result.running], list(result.terms)

config = model.learner.config
assert model.processes.size == 2
together, names = gradient(model.learner, batch.select(half), mine)
together = [x.clone() for x in together]
alone, _ = gradient(Learner(policy, config, ALONE), batch, whole)
assert {{"posterior_penalty", "prior_penalty", "policy", "replay_value"}} <= set(names)
assert ("redundancy" in names) == (RECONSTRUCTION == "redundancy")
for ours, reference in zip(together, alone, strict=True):
    assert (ours - reference).abs().max() <= 1e-9 * (1 + reference.abs().max()), (ours, reference)
apart, _ = gradient(Learner(policy, config, ALONE), batch.select(half), mine)
assert max((ours - reference).abs().max() for ours, reference in zip(apart, alone)) > 1e-4  # there is something to average
tell("EQUAL", len(together))
"""


@pytest.mark.parametrize("reconstruction", RECONSTRUCTIONS)
def test_the_gradient_is_that_of_one_process_on_the_whole_batch(reconstruction: str, tmp_path: Path) -> None:
    """Every loss, both penalties, the percentiles and the entropy's coefficient, in float64."""
    script = f"RECONSTRUCTION = {reconstruction!r}\n" + GRADIENT.replace("{{", "{").replace("}}", "}")
    done = torchrun(script, tmp_path)
    assert done.returncode == 0 and done.stdout.count("EQUAL") == 2, done.stdout + done.stderr


RUN = """
env = RandomSpaces(BOX, BOX)
model = tiny(env, train_ratio=16, ent_coef="auto", policy_kwargs={"normalize_vectors": True}, verbose=1)
try:
    tiny(env, batch_size=3)
except ValueError as error:
    assert "batch_size=3 cannot be divided among 2 processes; allowed: multiples of 2" in str(error)
else:
    raise AssertionError
from stable_baselines3.common.callbacks import ConvertCallback, ProgressBarCallback
calls, bar = [], ProgressBarCallback()
model.learn(100, callback=[ConvertCallback(lambda local, _: calls.append(model.num_timesteps) or True), bar])
assert rank != 0 or bar.pbar.n == bar.pbar.total == 100, bar.pbar.n
assert model.num_timesteps == 100 and len(model.replay_buffer.actions[:]) >= 50
assert calls == (list(range(2, 101, 2)) if rank == 0 else [])
assert model._n_updates >= 20, model._n_updates
tensors = [x.flatten().double() for x in model.policy.state_dict().values()]
every = model.processes.gather(th.cat(tensors).unsqueeze(0))
assert th.equal(every[0], every[1])
rows = model.processes.gather(th.as_tensor(model.replay_buffer.observations[:40, 0]).unsqueeze(0))
assert not th.equal(rows[0], rows[1])  # each has met something else
model.save("model")
model.save_replay_buffer("buffer")
model.processes.barrier()  # all files are there
tell("DONE", model._n_updates)
"""


def test_copies_stay_equal_and_the_first_process_alone_reports(tmp_path: Path) -> None:
    done = torchrun(RUN, tmp_path)
    assert done.returncode == 0 and done.stdout.count("DONE") == 2, done.stdout + done.stderr
    files = sorted(path.name for path in tmp_path.iterdir() if path.name != "script.py")
    assert files == ["buffer.pkl", "buffer.rank1.pkl", "model.rank1.pt", "model.zip"]
    steps = [line for line in done.stdout.splitlines() if "total_timesteps" in line]
    assert steps and len(steps) == len(set(steps)), done.stdout  # of the first process alone


RESUME = """
from stable_baselines3.common.callbacks import CheckpointCallback, BaseCallback

def start():
    return tiny(Clock(False), train_ratio=16, seed=3)

def numbers(model):
    return [x.clone() for x in model.policy.state_dict().values()]

whole = start()
whole.learn(320)
whole.learn(80, reset_num_timesteps=False)
stopped = start()
stopped.learn(320)
stopped.save("model")
stopped.save_replay_buffer("buffer")
stopped.processes.barrier()
resumed = DreamerGPLD.load("model", env=Clock(False), device="cpu")
resumed.load_replay_buffer("buffer")
resumed.learn(80, reset_num_timesteps=False)
assert resumed._n_updates == whole._n_updates > stopped._n_updates
for a, b in zip(numbers(whole), numbers(resumed)):
    assert th.equal(a, b)

class Stop(BaseCallback):
    def _on_step(self):
        return self.num_timesteps < 40

model = start().learn(200, callback=Stop())
assert model.num_timesteps == 40, model.num_timesteps
model.learn(20, callback=CheckpointCallback(10, "checkpoints", save_replay_buffer=True), reset_num_timesteps=False)

from stable_baselines3.common.callbacks import CallbackList, EveryNTimesteps
from sb3_dreamer_gpld import SaveRunCallback
model = start().learn(100, callback=CallbackList([CallbackList([SaveRunCallback("run", 40)])]))
again = DreamerGPLD.load_run("run", Clock(False))
assert again.num_timesteps == 100
if rank == 1:
    try:
        model.learn(10, callback=EveryNTimesteps(5, SaveRunCallback("run", 40)))
    except ValueError as error:
        assert "EveryNTimesteps would call it at some steps, in one; allowed: give it to learn by itself" in str(error)
    else:
        raise AssertionError
if rank == 0:
    DreamerGPLD.load("model")  # the other process need not take part
tell("DONE")
"""


def test_resume_is_exact_and_checkpoints_have_the_share_of_every_process(tmp_path: Path) -> None:
    done = torchrun(RESUME, tmp_path)
    assert done.returncode == 0 and done.stdout.count("DONE") == 2, done.stdout + done.stderr
    checkpoints = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert checkpoints == {
        "rl_model_60_steps.zip",
        "rl_model_60_steps.rank1.pt",
        "rl_model_replay_buffer_60_steps.pkl",
        "rl_model_replay_buffer_60_steps.rank1.pkl",
    }
    (tmp_path / "buffer.rank1.pkl").unlink()
    (tmp_path / "model.rank1.pt").unlink()
    script = """
    model = DreamerGPLD.load("model", env=Clock(False), device="cpu")
    for action in (lambda: model.load_replay_buffer("buffer"), lambda: model.learn(8, reset_num_timesteps=False)):
        try:
            action()
        except FileNotFoundError as error:
            tell("MISSING", error)
        if rank == 0 and model.replay_buffer.size():
            break
    """
    done = torchrun(script, tmp_path)
    missing = [line for line in done.stdout.splitlines() if line.startswith("MISSING")]
    assert len(missing) == 2, done.stdout + done.stderr
    assert "buffer.rank1.pkl is missing, the replay buffer of process 1 of 2; allowed: as many processes" in missing[0]
    assert "model.rank1.pt is missing, the share of process 1 of 2" in missing[1]


def test_a_loss_that_is_not_finite_in_one_process_stops_all(tmp_path: Path) -> None:
    """Before any of them has changed its parameters."""
    script = """
    model = tiny(RandomSpaces(BOX, BOX), train_ratio=0).learn(100, log_interval=None)
    if rank == 1:
        model.replay_buffer.rewards[:] = np.nan
    before = [x.clone() for x in model.policy.parameters()]
    try:
        model.train(1, 4)
    except FloatingPointError as error:
        tell("FAULT", error)
    assert all(th.equal(a, b) for a, b in zip(before, model.policy.parameters()))
    """
    done = torchrun(script, tmp_path)
    faults = [line for line in done.stdout.splitlines() if line.startswith("FAULT")]
    assert done.returncode == 0 and len(faults) == 2, done.stdout + done.stderr
    assert len(set(faults)) == 1 and "reward" in faults[0]


# ---------------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("RandomSpaces(BOX, BOX), train_freq=4", "train_freq=4 steps cannot be used in 2"),
        (
            "RandomSpaces(BOX, BOX), train_freq=(1, 'episode'), gradient_steps=1",
            "train_freq=1 episodes cannot be used in 2 processes, which agree",
        ),
        ("VecNormalize(DummyVecEnv([lambda: RandomSpaces(BOX, BOX)])), 'MlpPolicy'", "VecNormalize cannot be used in 2"),
        ("DummyVecEnv([lambda: RandomSpaces(BOX, BOX)] * (1 + rank)), 'MlpPolicy'", "not every process as many"),
    ],
)
def test_what_cannot_be_the_same_in_all_processes(arguments: str, text: str, tmp_path: Path) -> None:
    script = f"""
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
    tiny({arguments}).learn(8)
    """
    done = torchrun(script, tmp_path)
    assert done.returncode != 0 and text in done.stderr, done.stderr


def test_a_process_that_dies_ends_all_and_is_named(tmp_path: Path) -> None:
    script = """
    import signal
    model = tiny(RandomSpaces(BOX, BOX), train_ratio=16)
    collect = model._store_transition
    def store(*args):
        if rank == 1 and model.num_timesteps > 60:
            os.kill(os.getpid(), signal.SIGKILL)
        collect(*args)
    model._store_transition = store
    model.learn(400)
    model.save("never")
    """
    done = torchrun(script, tmp_path)
    assert done.returncode != 0 and "rank      : 1" in done.stderr and "SIGKILL" in done.stderr, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]


def test_a_process_that_was_lost_is_told() -> None:
    def closed(*args: object) -> None:
        raise RuntimeError("Connection closed by peer")

    with pytest.raises(RuntimeError, match=r"Process 0 of 2 lost another one: .* \(Connection closed by peer\)"):
        Processes(0, 2)._exchange(closed)


def test_two_processes_with_one_gpu_are_told() -> None:
    def refused(*args: object) -> None:
        raise RuntimeError("ncclInvalidUsage. Last error: Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000")

    with pytest.raises(RuntimeError, match="Process 1 of 2 has the same GPU as another one, .* allowed: at most as many"):
        Processes(1, 2)._exchange(refused)


@pytest.mark.parametrize(("backends", "allowed"), [("cuda:nccl", False), ("cpu:gloo,cuda:nccl", True), ("cpu:gloo", True)])
def test_a_group_of_gpus_alone_is_refused(backends: str, allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes exchange numbers of the processor, too."""
    for name, value in (("is_initialized", True), ("get_world_size", 2), ("get_rank", 1), ("get_backend_config", backends)):
        monkeypatch.setattr(parallel.dist, name, lambda value=value: value)
    if allowed:
        assert parallel.current().rank == 1
    else:
        with pytest.raises(ValueError, match="backends cuda:nccl, .* allowed: init_process_group"):
            parallel.current()


def test_one_process_exchanges_nothing() -> None:
    x = th.ones(3)
    assert ALONE.gather(x) is x and ALONE.sums([1.0]) == [1.0] and ALONE.told_by_first(x) is x
    assert ALONE.share("batch_size", 7) == 7
    with pytest.raises(ValueError, match="batch_size=7 cannot be divided among 2 processes; allowed: multiples of 2"):
        Processes(0, 2).share("batch_size", 7)
