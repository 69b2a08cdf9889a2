"""What stage 1 is watched by while it trains."""
