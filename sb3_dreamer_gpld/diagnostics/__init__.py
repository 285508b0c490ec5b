"""How smooth a world model is and how far its predictions carry, and callbacks that log both during training.

Measures are in :mod:`.measures`, pictures of open-loop predictions in :mod:`.video`, callbacks in :mod:`.callbacks`; the names
below are those to import. Everything calls the model's own nets, without gradient and in their own precision, and leaves no
trace: the global random generators, the replay buffer and the agent's recurrent state are as they were.
"""

from sb3_dreamer_gpld.diagnostics.callbacks import OpenLoopCallback, SmoothnessCallback
from sb3_dreamer_gpld.diagnostics.measures import (
    RATIO_SCALE,
    SCALES,
    ActionSmoothness,
    OpenLoop,
    Smoothness,
    action_smoothness,
    imagined_ratios,
    jacobian_norms,
    open_loop,
    posterior_probabilities,
    posterior_sensitivity,
    posterior_states,
    prediction_errors,
    replay_windows,
    smoothness,
    transition_ratios,
    undisturbed,
)
from sb3_dreamer_gpld.diagnostics.video import image_key, log_video, open_loop_video, require_moviepy, write_mp4

__all__ = [
    "RATIO_SCALE",
    "SCALES",
    "ActionSmoothness",
    "OpenLoop",
    "OpenLoopCallback",
    "Smoothness",
    "SmoothnessCallback",
    "action_smoothness",
    "image_key",
    "imagined_ratios",
    "jacobian_norms",
    "log_video",
    "open_loop",
    "open_loop_video",
    "posterior_probabilities",
    "posterior_sensitivity",
    "posterior_states",
    "prediction_errors",
    "replay_windows",
    "require_moviepy",
    "smoothness",
    "transition_ratios",
    "undisturbed",
    "write_mp4",
]
