"""Sizes, the penalty's setting and the spaces: what is accepted, and what the errors say."""

import dataclasses
import inspect
import math
import re
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from sb3_dreamer_gpld import DreamerGPLD
from sb3_dreamer_gpld.arguments import KNOWN_ELSEWHERE
from sb3_dreamer_gpld.config import SIZES, ActionSpec, ImageKey, ModelConfig, ObservationSpec, PenaltyConfig, VectorKey
from sb3_dreamer_gpld.schedules import SCHEDULES, default_parameters

# ---------------------------------------------------------------- sizes

PUBLISHED = {  # deter, hidden, classes, units, image depth
    "1m": (512, 64, 4, 64, 4),
    "12m": (2048, 256, 16, 256, 16),
    "25m": (3072, 384, 24, 384, 24),
    "50m": (4096, 512, 32, 512, 32),
    "100m": (6144, 768, 48, 768, 48),
    "200m": (8192, 1024, 64, 1024, 64),
    "400m": (12288, 1536, 96, 1536, 96),
}


@pytest.mark.parametrize(("name", "sizes"), PUBLISHED.items())
def test_published_sizes(name: str, sizes: tuple[int, ...]) -> None:
    config = ModelConfig.make(name)
    assert (config.deter, config.hidden, config.classes, config.units, config.depth) == sizes
    assert (config.stoch, config.blocks) == (32, 8)
    assert config.stoch_size == 32 * sizes[2] and config.feature_size == sizes[0] + 32 * sizes[2]


def test_names_of_the_sizes() -> None:
    assert SIZES.keys() == PUBLISHED.keys() | {"debug"}
    assert ModelConfig.make("debug").feature_size == 32 + 4 * 4


def test_defaults_are_those_of_1m() -> None:
    assert ModelConfig() == ModelConfig.make("1m")


def test_single_fields_override_a_size() -> None:
    config = ModelConfig.make("12m", classes=5, policy_arch=(7, 8))
    assert (config.classes, config.policy_arch, config.deter) == (5, (7, 8), 2048)


@pytest.mark.parametrize(("name", "nearest"), [("12", "12m"), ("400M", "400m"), ("debugg", "debug")])
def test_unknown_size(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"model_size '{name}' does not exist. Did you mean '{nearest}'.* Allowed: debug, 1m"):
        ModelConfig.make(name)


@pytest.mark.parametrize(("name", "nearest"), [("untis", "units"), ("free_nat", "free_nats"), ("netarch", "net_arch")])
def test_unknown_field(name: str, nearest: str) -> None:
    with pytest.raises(TypeError, match=f"policy_kwargs entry '{name}' does not exist. Did you mean '{nearest}'"):
        ModelConfig.make("debug", **{name: 3})


def test_unlike_any_name() -> None:
    with pytest.raises(ValueError, match="'quxx' does not exist. Allowed: debug") as error:
        ModelConfig.make("quxx")
    assert "Did you mean" not in str(error.value)


NO_NUMBERS = [math.nan, math.inf, "1", None, True]
NO_SIZES = [0, -1, 2.0, *NO_NUMBERS]
OPTIONAL_SIZES = [value for value in NO_SIZES if value is not None]
NO_SHARES = [-0.01, 1.01, *NO_NUMBERS]
NO_WEIGHTS = [-1e-9, *NO_NUMBERS]
WRONG: dict[str, list[Any]] = {
    "deter": [*NO_SIZES, 33],  # no multiple of blocks
    "hidden": NO_SIZES,
    "stoch": NO_SIZES,
    "classes": [1, *NO_SIZES],
    "blocks": [*NO_SIZES, 3],
    "units": NO_SIZES,
    "depth": NO_SIZES,
    "policy_arch": [(16, value) for value in NO_SIZES],
    "value_arch": [(value, 16) for value in NO_SIZES],
    "encoder_layers": NO_SIZES,
    "decoder_layers": NO_SIZES,
    "reward_layers": NO_SIZES,
    "continue_layers": NO_SIZES,
    "posterior_layers": NO_SIZES,
    "prior_layers": NO_SIZES,
    "encoder_units": OPTIONAL_SIZES,
    "image_features": OPTIONAL_SIZES,
    "kernel": [4, *NO_SIZES],
    "decoder_blocks": NO_SIZES,
    "normalize_vectors": [1, None, "yes"],
    "unimix": [0.0, *NO_SHARES],
    "bins": [1, 254, *NO_SIZES],
    "min_std": [0.0, 1.5, *NO_WEIGHTS],  # max_std is 1
    "max_std": [0.05, *NO_WEIGHTS],
    "free_nats": NO_WEIGHTS,
    "reconstruction_weight": NO_WEIGHTS,
    "reward_weight": NO_WEIGHTS,
    "continue_weight": NO_WEIGHTS,
    "dyn_weight": NO_WEIGHTS,
    "rep_weight": NO_WEIGHTS,
    "policy_weight": NO_WEIGHTS,
    "value_weight": NO_WEIGHTS,
    "replay_value_weight": NO_WEIGHTS,
    "slow_value_rate": NO_SHARES,
    "percentile_rate": NO_SHARES,
    "percentile_low": [-1, 100.5, *NO_NUMBERS],
    "percentile_high": [4.9, 100.5, *NO_NUMBERS],  # percentile_low is 5
    "reconstruction": ["decodr", "", None, True, 1, ["decoder"]],
    "redundancy_weight": NO_WEIGHTS,
    "redundancy_lambda": NO_WEIGHTS,
    "spectral_norm": ["actor", ["acter"], 3, None],
}


def test_every_field_has_a_check() -> None:
    assert WRONG.keys() == {field.name for field in dataclasses.fields(ModelConfig)}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_value_of_a_field(name: str) -> None:
    for value in WRONG[name]:
        with pytest.raises(ValueError, match="max_std" if (name, value) == ("min_std", 1.5) else name):
            ModelConfig.make("debug", **{name: value})


@pytest.mark.parametrize(
    "fields",
    [
        {"deter": 3, "blocks": 3},
        {"min_std": 0.5, "max_std": 0.5},
        {"percentile_low": 0, "percentile_high": 100},
        {"percentile_low": 50, "percentile_high": 50},
        {"kernel": 1, "bins": 3, "classes": 2},
        {"dyn_weight": 0, "free_nats": 0.0},
        {"slow_value_rate": 1.0, "percentile_rate": 0.0},
        {"units": np.int64(8), "unimix": np.float32(0.5)},
        {"policy_arch": (), "value_arch": [8]},
        {"reconstruction": "redundancy", "redundancy_weight": 0.0, "redundancy_lambda": 0},
    ],
)
def test_values_at_the_limits_are_allowed(fields: dict[str, Any]) -> None:
    config = ModelConfig.make("debug", **fields)
    assert {name: getattr(config, name) for name in fields} == fields


# ---------------------------------------------------------------- penalty


@pytest.mark.parametrize(
    ("field", "argument", "values"),
    [
        ("posterior", "posterior_penalty", NO_WEIGHTS),
        ("prior", "prior_penalty", NO_WEIGHTS),
        ("fraction", "penalty_fraction", [0.0, 1.1, *NO_NUMBERS]),
        ("minimum", "penalty_min", NO_WEIGHTS),
        ("start", "start", [-1, 2.5, *NO_NUMBERS]),
        ("rows", "penalty_rows", OPTIONAL_SIZES),
        ("estimator", "penalty_estimator", ["hutchison", None]),
        ("schedule", "penalty_schedule", ["sqrt", {}, {"decay_steps": 10}]),
    ],
)
def test_wrong_penalty_names_the_constructor_argument(field: str, argument: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=argument):
            PenaltyConfig(**{field: value})


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("sqrttime", "penalty_schedule 'sqrttime' does not exist. Did you mean 'sqrt_time'"),
        ({"name": "linear", "decay_step": 5}, "'linear' 'decay_step' does not exist. Did you mean 'decay_steps'"),
        ({"name": "none", "factor": 1}, "'none' 'factor' does not exist"),
        ({"name": "linear", "decay_steps": 0}, "penalty_schedule's decay_steps"),
        ({"name": "exponential", "decay_steps": math.inf}, "penalty_schedule's decay_steps"),
        ({"name": "cosine", "decay_steps": "many"}, "penalty_schedule's decay_steps"),
        ({"name": "step", "interval": -1}, "penalty_schedule's interval"),
        ({"name": "step", "factor": -0.5}, "penalty_schedule's factor"),
        ({"name": "step", "factor": 1.01}, "penalty_schedule's factor"),
        ({"name": "sqrt_time", "time_scale": 0}, "penalty_schedule's time_scale"),
        ("custom", "penalty_schedule 'custom' needs"),
        ({"name": "custom", "steps": [1, 2], "values": [1.0]}, r"got steps=\[1, 2\], values=\[1.0\]"),
        ({"name": "custom", "steps": [2, 1], "values": [1.0, 2.0]}, "increasing"),
        ({"name": "custom", "steps": [1], "values": [-1.0]}, "penalty_schedule's values"),
    ],
)
def test_wrong_schedule(schedule: str | dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PenaltyConfig(schedule=schedule)


def test_a_penalty_below_its_own_minimum_is_refused() -> None:
    """λ would rise to it."""
    for field, argument in (("posterior", "posterior_penalty"), ("prior", "prior_penalty")):
        with pytest.raises(ValueError, match=f"{argument}=0.0001 is less than penalty_min=0.001, to which λ would rise"):
            PenaltyConfig(**{field: 1e-4})
        for allowed in ({"minimum": 1e-4}, {"schedule": "none"}, {field: 0.0}, {field: 1e-3}):
            PenaltyConfig(**{field: 1e-4, **allowed})


def test_actions_without_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="has no numbers in it; allowed: at least one"):
        ActionSpec.from_space(spaces.Box(-1.0, 1.0, (0,)))


def test_defaults_of_the_penalty_are_the_papers() -> None:
    config = PenaltyConfig()
    assert (config.posterior, config.prior, config.fraction, config.minimum) == (0.5, 0.0, 0.5, 0.001)
    assert (config.rows, config.estimator, config.schedule_name) == (None, "hutchinson", "sqrt_time")
    assert config.schedule_parameters == {"time_scale": 1000.0}


def test_schedules_and_the_defaults_of_their_parameters() -> None:
    decay = {"decay_steps": 100_000}
    assert {name: default_parameters(name) for name in SCHEDULES} == {
        "none": {},
        "linear": decay,
        "exponential": decay,
        "cosine": decay,
        "step": {"interval": 5000, "factor": 0.9},
        "sqrt_time": {"time_scale": 1000.0},
        "custom": {"steps": (), "values": ()},
    }
    for name in SCHEDULES.keys() - {"custom"}:
        assert PenaltyConfig(schedule=name).schedule_parameters == default_parameters(name)


@pytest.mark.parametrize("name", SCHEDULES)
def test_parameters_of_other_schedules_are_refused(name: str) -> None:
    for key in ("t", "initial", "minimum"):  # what every schedule is called with is none of its parameters
        with pytest.raises(ValueError, match=f"parameter of penalty_schedule '{name}' '{key}' does not exist"):
            PenaltyConfig(schedule={"name": name, key: 1.0})


def test_schedule_given_as_a_dict_is_completed_and_left_as_it_is() -> None:
    given = {"name": "step", "factor": 0.5}
    config = PenaltyConfig(schedule=given)
    assert (config.schedule_name, config.schedule_parameters) == ("step", {"interval": 5000, "factor": 0.5})
    assert given == {"name": "step", "factor": 0.5}


@pytest.mark.parametrize(("fraction", "total", "count"), [(1.0, 1024, 1024), (0.5, 1024, 512), (0.5, 15, 7), (0.001, 15, 1)])
def test_number_of_penalised_states(fraction: float, total: int, count: int) -> None:
    assert PenaltyConfig(fraction=fraction).states(total) == count


# ---------------------------------------------------------------- observations


def box(*shape: int, dtype: Any = np.float32) -> spaces.Box:
    return spaces.Box(-1, 1, shape, dtype)


def image(*shape: int) -> spaces.Box:
    return spaces.Box(0, 255, shape, np.uint8)


@pytest.mark.parametrize(
    ("space", "key", "size"),
    [
        (box(3), VectorKey("", (3,)), 3),
        (box(dtype=np.float64), VectorKey("", ()), 1),
        (box(2, 3), VectorKey("", (2, 3)), 6),
        (box(20, 20, 3), VectorKey("", (20, 20, 3)), 1200),  # not in [0, 255]: no image
        (spaces.Box(np.array([-3.0, 0.0]), np.array([1.0, np.inf]), dtype=np.float64), VectorKey("", (2,)), 2),
        (spaces.Box(0, 255, (4,), np.uint8), VectorKey("", (4,)), 4),
        (spaces.Discrete(5), VectorKey("", (), (5,)), 5),
        (spaces.Discrete(5, start=-2), VectorKey("", (), (5,), -2), 5),
        (spaces.MultiDiscrete([3, 4]), VectorKey("", (2,), (3, 4)), 7),
        (spaces.MultiDiscrete([[3, 4], [2, 5]]), VectorKey("", (2, 2), (3, 4, 2, 5)), 14),
        (spaces.MultiBinary(3), VectorKey("", (3,), (2, 2, 2)), 6),
        (spaces.MultiBinary([2, 2]), VectorKey("", (2, 2), (2, 2, 2, 2)), 8),
    ],
)
def test_vector_spaces(space: spaces.Space, key: VectorKey, size: int) -> None:
    spec = ObservationSpec.from_space(space)
    assert spec == ObservationSpec((key,), ())
    assert spec.vector_size == key.size == size


@pytest.mark.parametrize(
    ("space", "normalize", "key"),
    [
        (image(64, 48, 3), True, ImageKey("", 64, 48, 3, False, 255.0)),
        (image(3, 64, 48), True, ImageKey("", 64, 48, 3, True, 255.0)),
        (image(17, 16, 1), True, ImageKey("", 17, 16, 1, False, 255.0)),
        (image(12, 84, 84), True, ImageKey("", 84, 84, 12, True, 255.0)),
        (spaces.Box(0, 1, (32, 40, 3), np.float32), False, ImageKey("", 32, 40, 3, False, 1.0)),
        (spaces.Box(0, 1, (3, 32, 40), np.float32), False, ImageKey("", 32, 40, 3, True, 1.0)),
        (image(32, 40, 3), False, ImageKey("", 32, 40, 3, False, 255.0)),
    ],
)
def test_image_spaces(space: spaces.Space, normalize: bool, key: ImageKey) -> None:
    assert ObservationSpec.from_space(space, normalize) == ObservationSpec((), (key,))


def test_dict_keys_are_sorted_and_images_of_one_size_are_grouped() -> None:
    keys = {"z": box(2), "left": image(64, 64, 3), "a": spaces.Discrete(4), "far": image(32, 32, 1), "depth": image(1, 64, 64)}
    space = spaces.Dict(list(keys.items()))
    assert list(space) == list(keys)  # gymnasium sorts only what is given as a dict
    spec = ObservationSpec.from_space(space)
    assert [key.name for key in spec.vectors] == ["a", "z"] and spec.vector_size == 6
    assert [key.name for key in spec.images] == ["depth", "far", "left"]
    names = {size: [key.name for key in keys] for size, keys in spec.image_groups.items()}
    assert names == {(32, 32): ["far"], (64, 64): ["depth", "left"]}
    assert list(names) == [(32, 32), (64, 64)]


def test_empty_vectors_are_left_out() -> None:
    spec = ObservationSpec.from_space(spaces.Dict({"nothing": box(0), "something": box(1)}))
    assert [key.name for key in spec.vectors] == ["something"]


@pytest.mark.parametrize("space", [box(0), box(2, 0), spaces.Dict({}), spaces.Dict({"nothing": box(0)})])
def test_empty_observation_space(space: spaces.Space) -> None:
    with pytest.raises(ValueError, match="observation space has no numbers"):
        ObservationSpec.from_space(space)


@pytest.mark.parametrize("shape", [(15, 64, 3), (64, 15, 3), (3, 64, 15)])
def test_image_below_16_pixels(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"observation 'eye' is an image of \d+x\d+ pixels; allowed: at least 16"):
        ObservationSpec.from_space(spaces.Dict({"eye": image(*shape)}))


@pytest.mark.parametrize("space", [spaces.Tuple([box(1)]), spaces.Text(3), spaces.Sequence(box(1))])
def test_other_observation_spaces(space: spaces.Space) -> None:
    with pytest.raises(ValueError, match=f"the observation space is a {type(space).__name__} space; allowed: Box"):
        ObservationSpec.from_space(space)
    with pytest.raises(ValueError, match=f"observation 'inner' is a {type(space).__name__} space"):
        ObservationSpec.from_space(spaces.Dict({"inner": space}))


def test_dict_in_a_dict() -> None:
    with pytest.raises(ValueError, match="observation 'inner' is a Dict space"):
        ObservationSpec.from_space(spaces.Dict({"inner": spaces.Dict({"x": box(1)})}))


# ---------------------------------------------------------------- actions


@pytest.mark.parametrize(
    ("space", "spec", "size"),
    [
        (box(6), ActionSpec((6,)), 6),
        (box(2, 3, dtype=np.float64), ActionSpec((2, 3)), 6),
        (box(), ActionSpec(()), 1),
        (spaces.Box(np.array([-3.0, 0.0]), np.array([1.0, 9.0]), dtype=np.float64), ActionSpec((2,)), 2),
        (spaces.Discrete(4), ActionSpec((), (4,)), 4),
        (spaces.Discrete(4, start=3), ActionSpec((), (4,), 3), 4),
        (spaces.MultiDiscrete([3, 2]), ActionSpec((2,), (3, 2)), 5),
        (spaces.MultiBinary(3), ActionSpec((3,), (2, 2, 2)), 6),
        (spaces.MultiBinary([2, 2]), ActionSpec((2, 2), (2, 2, 2, 2)), 8),
    ],
)
def test_action_spaces(space: spaces.Space, spec: ActionSpec, size: int) -> None:
    assert ActionSpec.from_space(space) == spec
    assert spec.size == size


@pytest.mark.parametrize("space", [spaces.Dict({"x": box(1)}), spaces.Tuple([box(1)]), spaces.Text(3)])
def test_other_action_spaces(space: spaces.Space) -> None:
    with pytest.raises(ValueError, match="the action space is .* allowed: Box, Discrete, MultiDiscrete, MultiBinary"):
        ActionSpec.from_space(space)


# ---------------------------------------------------------------- arguments of other algorithms


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("tau", "slow_value_rate"),
        ("use_sde", "exploration_noise"),
        ("n_steps", "return_lambda"),
        ("gae_lambda", "return_lambda"),
        ("clip_range", "optimizer_kwargs"),
        ("policy_delay", "updated together"),
        ("target_kl", "no trust region"),
        ("trainratio", "Did you mean 'train_ratio'"),
    ],
)
def test_arguments_of_other_algorithms_are_explained(name: str, instead: str) -> None:
    with pytest.raises(TypeError, match=f"{name}.*{instead}"):
        DreamerGPLD("MlpPolicy", "Pendulum-v1", **{name: 1})


def test_no_argument_is_explained_away() -> None:
    """What is said to be missing is missing, and what is named in its place is there."""
    own = set(inspect.signature(DreamerGPLD).parameters)
    assert not own & set(KNOWN_ELSEWHERE) and "train_ratio" in own
    sizes = {field.name for field in dataclasses.fields(ModelConfig)}
    for text in KNOWN_ELSEWHERE.values():
        for name in re.findall(r"[a-z]+(?:_[a-z]+)+|\w+(?==)", text):
            assert name in own | sizes | {"optimizer_kwargs", "clip"}, text


def test_the_encoder_s_class_is_explained() -> None:
    with pytest.raises(TypeError, match="features_extractor_class.*world_model_class, see docs/extending.md"):
        DreamerGPLD("MlpPolicy", "Pendulum-v1", policy_kwargs=dict(features_extractor_class=object))


@pytest.mark.parametrize(("batch_size", "verbose", "said"), [(256, 1, True), (256, 0, False), (16, 1, False)])
def test_a_batch_of_many_sequences_is_mentioned(
    batch_size: int, verbose: int, said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    DreamerGPLD("MlpPolicy", "Pendulum-v1", batch_size=batch_size, verbose=verbose, model_size="debug")
    assert ("256 sequences of 64 steps, 16 times the published" in capsys.readouterr().out) == said
