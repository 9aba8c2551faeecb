"""A run and its folder, checkpoints, and the loop that every kind of training shares."""
