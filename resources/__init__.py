"""What an architecture costs, and the objective that keeps it within a budget."""
