"""Parts of hyperparameter entries that the tests use."""

PLAIN = {"n_timesteps": 150, "policy": "MlpPolicy"}
SMALL = {"model_size": "debug", "batch_size": 4, "batch_length": 8, "train_ratio": 16, "learning_starts": 64}
