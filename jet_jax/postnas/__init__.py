"""PostNAS: the search for a hybrid inside a pretrained full-attention model."""
