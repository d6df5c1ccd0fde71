"""The sampler/learner log-prob mismatch: its measure and its report."""
