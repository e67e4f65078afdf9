"""Ray -> MosaicML shards: writes what the stages of a curriculum read. The layout is `wemmu.config.shards`."""
