"""From files to packed rows: jsonl -> datasets -> packing -> loader."""
