"""The `baton` command: the pipeline runner, status, verify, config, report and chat. Imports every other package."""
