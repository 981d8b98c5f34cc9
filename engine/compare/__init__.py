"""Two models in a browser: blind responses, and votes as preference data."""
