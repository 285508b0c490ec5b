"""DreamerV3 with the GPLD Jacobian penalty as a Stable-Baselines3 algorithm."""

from sb3_dreamer_gpld.buffers import SequenceReplayBuffer
from sb3_dreamer_gpld.callbacks import SaveRunCallback
from sb3_dreamer_gpld.dreamer_gpld import DreamerGPLD
from sb3_dreamer_gpld.policies import CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_dreamer_gpld.presets import preset

__version__ = "0.1.0"

__all__ = [
    "CnnPolicy",
    "DreamerGPLD",
    "MlpPolicy",
    "MultiInputPolicy",
    "SaveRunCallback",
    "SequenceReplayBuffer",
    "__version__",
    "preset",
]
