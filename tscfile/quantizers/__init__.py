"""Real coefficients to integers and back."""
