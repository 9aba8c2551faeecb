"""Images: found, decoded, split, and given out as augmented batches."""
