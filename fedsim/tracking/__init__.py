"""The record of a run: its folder, its metrics, Weights & Biases, the progress display. For rank 0 alone."""
