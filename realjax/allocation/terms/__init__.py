"""What a call costs is made of: products, collectives, decoding, moves; and a device's part of a model."""
