"""What the stages must agree on. Stages import this package and never each other."""
