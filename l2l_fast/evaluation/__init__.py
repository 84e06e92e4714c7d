"""Tuned baselines, comparisons, figures, the experiments of the paper, and the benchmark of the kernels."""
