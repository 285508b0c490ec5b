"""Agents that are trained already: small policy files, and a list of what they are and how they were made.

They lie in ``trained_agents`` of the repository and of the source release, not in the wheel.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import yaml

from sb3_dreamer_gpld.checks import unknown_name
from sb3_dreamer_gpld.envs import ActionRepeat, registered
from sb3_dreamer_gpld.policies import DreamerPolicy

FOLDER = Path(__file__).parents[1] / "trained_agents"  # where the package runs in a checkout
PLACES = (FOLDER, Path(FOLDER.name))  # or the command is given in one
LIST = "agents.yml"


class TrainedAgent(NamedTuple):
    """An agent of the list.

    :param name: in the list, and of its file
    :param file: what :meth:`DreamerPolicy.save` wrote
    :param env: id of the environment
    :param action_repeat: how many steps of the environment each action lasts
    :param deterministic: whether it returns more with the most probable actions than with sampled ones
    :param returns: by kind of action, "most probable" and "sampled": mean, standard deviation and number of episodes
    :param made_by: the command, seed, frames and versions that made it
    """

    name: str
    file: Path
    env: str
    action_repeat: int
    deterministic: bool
    returns: dict[str, dict[str, float]]
    made_by: dict[str, Any]

    def make_env(self, **kwargs: Any) -> gym.Env[Any, Any]:
        """The environment that it was trained in.

        :param kwargs: of ``gymnasium.make``
        :raises ImportError: packages of the environment are missing
        """
        env = gym.make(registered(self.env), **kwargs)
        return env if self.action_repeat == 1 else ActionRepeat(env, self.action_repeat)

    def load(self, device: str = "cpu") -> DreamerPolicy:
        """The policy. Loading it runs no code of the file.

        :param device: of the policy
        :raises ValueError: the file is damaged
        """
        return DreamerPolicy.load(self.file, device)


def read_agents(folder: Path | None = None) -> dict[str, TrainedAgent]:
    """All agents of a folder, by name.

    :param folder: with the policy files, and their list in ``agents.yml``; None: that of the repository, where the package or
        the current folder is one
    :raises FileNotFoundError: there is no such list
    """
    places = PLACES if folder is None else (folder,)
    folder = next((place for place in places if (place / LIST).is_file()), None)
    if folder is None:
        raise FileNotFoundError(
            f"There is no {LIST} in {' or '.join(map(str, places))}. The trained agents come with the repository and the "
            "source release, not with the wheel: run this in one of these, or name a file in a folder with them"
        )
    entries = yaml.safe_load((folder / LIST).read_text()) or {}
    return {name: TrainedAgent(name, folder / f"{name}.pt", **entry) for name, entry in entries.items()}


def find_agent(name: str) -> TrainedAgent:
    """One agent, from the repository's folder or another one.

    :param name: such as "walker-walk", or a policy file with its list beside it, such as "folder/walker-walk.pt"
    :raises FileNotFoundError: there is no list of agents
    :raises ValueError: it is not in the list; says which are
    """
    path = Path(name)
    elsewhere = path.suffix == ".pt" or path.parent != Path()
    agents = read_agents(path.parent if elsewhere else None)
    known = path.stem if elsewhere else name
    if known not in agents:
        raise ValueError(unknown_name("The trained agent", known, agents))
    return agents[known]
