"""Ground floor: errors, trees, randomness; knows torch, numpy and optree only."""
