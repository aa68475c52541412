"""Encoders, heads, batch normalisation over ranks and the momentum teacher."""
