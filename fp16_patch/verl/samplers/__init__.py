"""verl's sampler processes."""
