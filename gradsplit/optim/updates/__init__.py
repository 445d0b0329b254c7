"""The updates of GSO, one file per backend; every one must equal `reference`."""
