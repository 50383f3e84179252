"""The service: batched decoding under several sets of edits, one worker thread that owns the model, and its HTTP face."""
