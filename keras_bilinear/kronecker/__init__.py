"""The mathematics of Kronecker sums: shapes, products, fits, cost. No layer, no model."""
