"""Where the objects come from: the API server's list and watch, or files of manifests."""
