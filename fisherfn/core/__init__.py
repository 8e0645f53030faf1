"""Ground floor: errors, options, dtypes, trees, randomness; knows torch, numpy and optree only."""
