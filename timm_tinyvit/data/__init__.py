"""Images and their augmented views: sources, replayable augmentation, data sets, samplers and loaders."""
