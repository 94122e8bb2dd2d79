"""What an endpoint keeps: its predictions, the corrections that users send, and the way back from an answer."""
