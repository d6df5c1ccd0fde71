"""One optimizer step: loss scale, retry, first scale, growth, gradient statistics, fused kernel."""
