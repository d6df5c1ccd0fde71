"""An engine's updates under a loss scale. `update` shows what happens to a mini-batch, from top to bottom."""
