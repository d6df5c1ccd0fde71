"""From the ranks that measure to the record, over Ray, without training waiting for it."""
