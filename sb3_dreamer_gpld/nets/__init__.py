"""What is computed: layers, the world model, the actor-critic and the penalty. Knows nothing of Stable-Baselines3."""
