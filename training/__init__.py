"""What the stages share: the frame of a run, recipes, models, the engines that train them, saved states, trackers."""
