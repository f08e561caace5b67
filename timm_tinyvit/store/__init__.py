"""The sparse targets of every view on disk or on the Hub: manifest, shards, readers and writers."""
