"""Makes real picture shards from Debian fonts and cut-outs: see `pictures.make_pictures` and docs/pictures.md."""
