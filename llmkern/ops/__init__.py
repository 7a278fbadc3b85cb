"""The operations, one file or folder each; importing this package defines all of them."""
