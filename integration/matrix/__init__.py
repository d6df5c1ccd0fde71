"""Which release is tested in what environment and how far, and the jobs that do it."""
