"""What a run was, as one page: its figures read from disk, charts, cells that a slider moves along the epochs."""
