"""Everything that communicates, shards or clips: collectives, layouts of a model over ranks, sharded tensors."""
