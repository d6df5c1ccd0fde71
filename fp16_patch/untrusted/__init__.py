"""What others wrote: read within bounds, shown as text."""
