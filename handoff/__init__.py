"""The hand-off between stages: manifests, atomic publishing, the contract, verification, resumable state. No torch."""
