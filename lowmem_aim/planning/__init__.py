"""What a merge will do: tensors, shards and byte offsets, from headers alone."""
