"""HuggingFace checkpoints in and out, streamed: one rule table per family, read and written tensor by tensor."""
