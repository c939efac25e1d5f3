"""SOURCE: approximate unrolled differentiation, in its averaged, recorded and matrix-free forms."""
