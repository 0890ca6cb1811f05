"""Self-contained HTML pages about one trained model, or about several side by side."""
