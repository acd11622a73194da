"""Programs that use a model which `baton serve` serves, with the libraries that people have."""
