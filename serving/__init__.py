"""Who gets an answer: the Serve application, its deployment and the client."""
