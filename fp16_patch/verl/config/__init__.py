"""verl's configuration under a plan: which settings are made, checked and refused."""
