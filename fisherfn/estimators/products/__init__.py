"""Products with matrices that are never formed: Fisher information and Hessian."""
