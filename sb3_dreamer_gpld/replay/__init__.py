"""The parts of the replay buffer: memory of rows, writing of episodes, choice of windows."""
