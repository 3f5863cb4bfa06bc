"""Captures: where the gradients of one measured step are seen, before averaging or as shards."""
