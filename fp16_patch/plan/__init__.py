"""What was decided: the plan, its settings, and every error a user can meet."""
