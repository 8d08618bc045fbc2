"""What a run says of itself: metrics, seconds by phase, memory, and the report made of them."""
