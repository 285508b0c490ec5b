"""Registration with rl_zoo3."""

import rl_zoo3.enjoy
import rl_zoo3.exp_manager
import rl_zoo3.hyperparams_opt
import rl_zoo3.train

from sb3_dreamer_gpld import DreamerGPLD
from sb3_dreamer_gpld.zoo import register, search


def test_registers_the_algorithm_everywhere() -> None:
    register.register()
    for algorithms in (rl_zoo3.ALGOS, rl_zoo3.train.ALGOS, rl_zoo3.enjoy.ALGOS, rl_zoo3.exp_manager.ALGOS):
        assert algorithms["dreamer_gpld"] is DreamerGPLD
    assert rl_zoo3.hyperparams_opt.HYPERPARAMS_SAMPLER["dreamer_gpld"] is search.sample_params
    assert rl_zoo3.hyperparams_opt.HYPERPARAMS_CONVERTER["dreamer_gpld"] is search.convert_params
