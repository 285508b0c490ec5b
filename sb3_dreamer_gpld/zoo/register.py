"""Makes DreamerGPLD known to rl_zoo3.

Also for programs of one's own: after :func:`register`, rl_zoo3's functions take ``dreamer_gpld`` as the name of an algorithm.
"""

from __future__ import annotations

from sb3_dreamer_gpld.dreamer_gpld import DreamerGPLD
from sb3_dreamer_gpld.zoo.arguments import NAME, fail
from sb3_dreamer_gpld.zoo.search import convert_params, sample_params


def register() -> None:
    """Make DreamerGPLD known to rl_zoo3, and the environments that this registers to Gymnasium.

    :raises SystemExit: rl_zoo3 is not installed
    """
    try:
        import rl_zoo3
        from rl_zoo3 import hyperparams_opt, import_envs  # noqa: F401  (the second registers environments)
    except ModuleNotFoundError as error:
        if error.name != "rl_zoo3":
            raise
        fail('this needs rl_zoo3: pip install "sb3-dreamer-gpld[zoo]"')
    # Inside rl_zoo3: all scripts share these three tables
    rl_zoo3.ALGOS[NAME] = DreamerGPLD
    hyperparams_opt.HYPERPARAMS_SAMPLER[NAME] = sample_params
    hyperparams_opt.HYPERPARAMS_CONVERTER[NAME] = convert_params
