"""Where inputs are refused."""
