"""One package for each stage of training, and nothing else. Code that stages share is in `training/`."""
