"""What kind of gap a run has, and when to warn of it."""
