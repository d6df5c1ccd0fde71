"""Writers of the reference pages' generated parts."""
