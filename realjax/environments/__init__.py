"""What a model talks with: messages in, observation and reward out. Nothing here knows a token or a model."""
