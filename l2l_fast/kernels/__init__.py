"""What csrc offers to Python, and its oracle: configuration, state, the four operators, the plain PyTorch reference."""
