"""Number formats: what a weight is stored as, and the product that goes with it."""
