"""The derived network: where it comes from, its training, its export."""
