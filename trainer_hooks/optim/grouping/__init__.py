"""Parameter groups: the role of every parameter, the optimizer that takes it, and width transfer."""
