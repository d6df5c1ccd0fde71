"""Which patch holds for which release of a framework, and a source tree's own diff."""
