"""What the state of `MismatchStats` is made of, and how a batch becomes one."""
