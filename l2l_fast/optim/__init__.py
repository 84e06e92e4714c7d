"""LearnedOptimizer: a trained network behind the interface of torch.optim."""
