"""What a model's precision costs and what range it needs, measured before a run: ``fp16-patch probe``."""
