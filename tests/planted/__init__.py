"""Networks in which a flip of the decision is hidden inside the ball: attacks miss it, and no proof may hold there."""
